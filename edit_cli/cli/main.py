"""The command line. Nothing heavy is imported before a command runs, so --help and completion answer at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from edit_cli import distributed, streams
from edit_cli.cli import help as help_texts
from edit_cli.cli.options import (
    BASE,
    PLUGIN,
    Against,
    EditDir,
    Json,
    Out,
    Overrides,
    Published,
    Runs,
    Wanted,
    complete_metrics,
)
from edit_cli.config import catalog
from edit_cli.config.registry import admit
from edit_cli.errors import EditCliError, MissingError
from edit_cli.files.disk import is_refusal, refusal
from edit_cli.files.paths import expanded
from edit_cli.terminal import one_line

INTERRUPTED = 130
HELP = {"help_option_names": ["--help", "-h"]}
PASS_ON = {"ignore_unknown_options": True, "help_option_names": []}  # Hydra's flags stand among the overrides

app = typer.Typer(
    context_settings={"help_option_names": []},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=False,
)


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context, wants_help: Wanted = False, version: Annotated[bool, typer.Option("--version")] = False
) -> None:
    if version:
        from edit_cli import __version__

        typer.echo(f"edit-cli {__version__}")
        raise typer.Exit
    if wants_help or context.invoked_subcommand is None:
        typer.echo(help_texts.overview() if wants_help else help_texts.welcome())
        raise typer.Exit(0 if wants_help else 2)


def _configured(name: str) -> None:
    """Register a command whose settings Hydra composes."""

    def command(overrides: Overrides = None, wants_help: Wanted = False) -> None:
        if wants_help:
            _exit(lambda: _explain(name, overrides or []))
        _exit(lambda: _launch(name, overrides or []))

    app.command(name, context_settings=PASS_ON, add_help_option=False, help=help_texts.COMMANDS[name])(command)


for _name in help_texts.CONFIGURED:
    _configured(_name)


def _command(name: str, plugins: bool = True, **settings: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a command whose function returns the exit code; its options are the function's parameters.

    A parameter `base` takes the options that say which model an edit is put on, as a dict. plugins: whether the command
    takes packages of the user's, which are admitted before it begins.
    """

    def register(work: Callable[..., int]) -> Callable[..., int]:
        def command(plugin: Sequence[str] | None = None, **given: Any) -> None:
            if takes_base:
                given["base"] = {each.name: given.pop(each.name) for each in BASE}
            _exit(lambda: work(**given), plugin)

        own = signature(work, eval_str=True).parameters.values()
        takes_base = any(each.name == "base" for each in own)
        shown = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in own if each.name != "base"]
        shown += [*(BASE if takes_base else ()), *([PLUGIN] if plugins else ())]
        command.__signature__ = Signature(shown)  # type: ignore[attr-defined] # which typer reads
        app.command(name, context_settings=HELP | settings, help=help_texts.OTHERS[name])(command)
        return work

    return register


@_command("show-config", plugins=False, **PASS_ON | HELP)
def show_config(
    what: Annotated[
        str,
        typer.Argument(
            help="a method, or KIND/NAME, such as dataset/fever or model/gpt2-xl",
            autocompletion=lambda incomplete: [one for one in catalog.described() if one.startswith(incomplete)],
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as model=gpt2-xl: as published for it")
    ] = None,
    as_json: Json = False,
) -> int:
    from edit_cli.cli import show_config

    return show_config.run(what, overrides or [], as_json)


@_command("ls")
def ls(
    what: Annotated[
        str,
        typer.Argument(
            help=f"{', '.join(catalog.LISTS[:-1])} or {catalog.LISTS[-1]}",
            autocompletion=lambda: list(catalog.LISTS),
        ),
    ],
    wanted: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="of runs, only those with method=…, dataset=…, model=…, status=… or any setting; * fits anything",
        ),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(help="metric by which runs are sorted, the best first", autocompletion=complete_metrics),
    ] = None,
    as_json: Json = False,
    runs_dir: Annotated[Path, typer.Option(help="where to look for runs")] = Path("runs"),
) -> int:
    from edit_cli.commands import ls

    return ls.run(what, as_json, expanded(runs_dir), wanted or [], sort)


@_command("show")
def show(
    run: Annotated[Path, typer.Argument(help="directory of a run")],
    case: Annotated[str | None, typer.Option(help="show what the model said before and after, for this case")] = None,
    as_json: Json = False,
) -> int:
    from edit_cli.commands import show

    return show.run(expanded(run), case, as_json)


@_command("compare")
def compare(
    runs: Runs,
    against: Against = None,
    x: Annotated[
        str | None,
        typer.Option(help="setting on the x-axis, such as protocol.batch_size; facts: checkpoints of sequential runs"),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="metrics with commas between them; `edit-cli ls metrics` lists them", autocompletion=complete_metrics
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help="setting that tells lines apart, beside the method; tag: each run's own tag is its name"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="OUT.csv, OUT.md or OUT.tex: that file; else OUT.csv, OUT.md, OUT.png and OUT.svg"),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="csv, markdown or latex, printed instead of the table, or for OUT",
            autocompletion=lambda: ["csv", "markdown", "latex"],
        ),
    ] = None,
    published: Published = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="list runs apart that are not alike; refused otherwise")
    ] = False,
) -> int:
    from edit_cli.commands import compare

    return compare.run(runs, x, metrics, by, out and expanded(out), against, published, form, anyway)


@_command("report")
def report(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("report.html"),
    against: Against = None,
    published: Published = None,
) -> int:
    from edit_cli.commands import report

    return report.run(runs, expanded(out), against, published)


@_command("apply")
def apply(edit_dir: EditDir, out: Out, base: dict[str, Any]) -> int:
    from edit_cli.commands import apply
    from edit_cli.experiment.saved_edits import Base

    return apply.run(_edit(edit_dir), expanded(out), Base(**base))


@_command("export")
def export(
    edit_dir: EditDir,
    out: Out,
    to: Annotated[
        str,
        typer.Option(
            help="peft: a LoRA adapter beside the model; gguf-lora: one for llama.cpp; checkpoint: as `apply`",
            autocompletion=lambda: ["peft", "gguf-lora", "checkpoint"],
        ),
    ],
    base: dict[str, Any],
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="the most that an adapter may have in a matrix; without it, as many as it takes"),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(help="of gguf-lora: general.architecture of the base model's file, if it is called otherwise"),
    ] = None,
) -> int:
    from edit_cli.commands import export
    from edit_cli.experiment.saved_edits import Base

    return export.run(_edit(edit_dir), to, expanded(out), Base(**base), rank, arch)


@_command("ask")
def ask(
    edit_dir: EditDir,
    base: dict[str, Any],
    prompts: Annotated[list[str] | None, typer.Argument(help="without any, lines of standard input")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length of an answer")] = 20,
    sample: Annotated[
        int | None,
        typer.Option(min=1, help="draw from so many of the likeliest tokens, instead of taking the likeliest"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of what is drawn")] = 0,
    edited_only: Annotated[bool, typer.Option("--edited-only", help="do not ask the unedited model")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable, an object a line")] = False,
    chat: Annotated[
        str | None,
        typer.Option(
            help="template: in the model's chat template; none: as plain text; auto: in that of instruct models;"
            " without it, as the edit was made",
            autocompletion=lambda: ["template", "none", "auto"],
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="system prompt of the chat")] = None,
) -> int:
    from edit_cli.commands import ask
    from edit_cli.experiment.saved_edits import Base

    asking = ask.Asking(max_new_tokens, sample, seed, edited_only)
    return ask.run(_edit(edit_dir), prompts or [], Base(**base), asking, as_json, ask.Chat(chat, system))


@_command("edits")
def edits(
    directories: Annotated[list[Path], typer.Argument(help="edits, runs with saved edits, or folders of such")],
    every: Annotated[bool, typer.Option("--all", help="list all facts, not only the first ones of each edit")] = False,
    as_json: Json = False,
) -> int:
    from edit_cli.commands import edits

    return edits.run([_edit(directory) for directory in directories], every, as_json)


@_command("undo")
def undo(
    edit_dir: EditDir,
    fact: Annotated[
        list[str],
        typer.Option(help="what to take out: a number as `edits` counts, a subject or a statement; may be repeated"),
    ],
    out: Out,
    base: dict[str, Any],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="settings of the method that the edit cannot name: cache_dir=DIR"
        ),
    ] = None,
) -> int:
    from edit_cli.commands import undo
    from edit_cli.experiment.saved_edits import Base

    return undo.run(_edit(edit_dir), fact, expanded(out), Base(**base), settings or [])


@_command("push", plugins=False)
def push(
    directory: Annotated[
        Path, typer.Argument(help="an edit, a run with one, a checkpoint, an adapter, a trained editor, statistics")
    ],
    to: Annotated[str, typer.Argument(help="hub:owner/name, or hub:owner/name:folder", metavar="HUB")],
    private: Annotated[bool, typer.Option("--private", help="make the repository a private one")] = False,
    revision: Annotated[str | None, typer.Option(help="branch to commit to; made where there is none")] = None,
    message: Annotated[str | None, typer.Option(help="of the commit")] = None,
    update: Annotated[bool, typer.Option("--update", help="add a commit to a repository that is there")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be sent, and send nothing")] = False,
) -> int:
    from edit_cli.commands import push

    return push.run(expanded(directory), to, private, revision, message, update, dry_run)


@_command("env", plugins=False)
def env(as_json: Json = False) -> int:
    from edit_cli.commands import env

    return env.run(as_json)


def _edit(place: Path) -> Path:
    """The folder of an edit or a run that is given; one of the hub is fetched first."""
    from edit_cli.files import hub

    if not hub.is_address(place):
        return expanded(place)
    from edit_cli.console import ConsoleMonitor, Screen
    from edit_cli.experiment.saved_edits import edit_here

    monitor = ConsoleMonitor(Screen())
    with monitor.working(), monitor.phase("fetch"):
        return edit_here(place)


def _explain(name: str, overrides: list[str]) -> int:
    """Help, with the settings of the options that are named beside it."""
    lines = [help_texts.command(name, overrides)]
    for override in overrides:
        group, _, option = override.partition("=")
        if group in catalog.GROUPS.values():
            from edit_cli.cli import show_config

            lines += ["", *show_config.of_command(name, group, option, overrides)]
    typer.echo("\n".join(lines).rstrip())
    return 0


def _launch(name: str, overrides: list[str]) -> int:
    from edit_cli.config.overrides import regroup

    regroup(overrides)  # mistakes that can be seen without Hydra are answered without it
    from edit_cli.cli.hydra_launch import launch
    from edit_cli.experiment.execute import execute
    from edit_cli.experiment.sweep import conclude

    return conclude(*launch(name, overrides, execute))


def _exit(work: Callable[[], int], plugins: Sequence[str] | None = None) -> None:
    """Leave with the exit code that `work` returns or that its error stands for. plugins: packages of the user's."""
    try:
        admit(plugins or ())
        code = work()
    except EditCliError as error:
        _say(f"error: {error}")
        code = error.exit_code
    except OSError as error:
        if not is_refusal(error):
            raise
        _say(f"error: {refusal(error)}")
        code = MissingError.exit_code
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on from here")
        code = INTERRUPTED
    raise typer.Exit(code)


def _say(message: str) -> None:
    if not distributed.follows():
        typer.echo(one_line(message), err=True)


def main() -> None:
    # Threads that wait by spinning slow each other down more than tenfold as soon as anything else runs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    streams.settle()
    try:
        app(prog_name="edit-cli")
    except SystemExit as end:
        if not end.code and (lost := streams.trouble()) is not None:
            _say(f"error: standard output could not be written: {lost.strerror}; what was made is kept")
            raise SystemExit(MissingError.exit_code) from None
        raise


if __name__ == "__main__":
    main()
