"""The command line. Nothing heavy is imported before a command runs, so --help and completion answer at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from edit_cli import distributed, streams
from edit_cli.cli import help as help_texts
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


def _complete(context: typer.Context, incomplete: str) -> list[str]:
    return help_texts.complete(
        context.info_name or "", [*(context.params.get("overrides") or ()), *context.args], incomplete
    )


Json = Annotated[bool, typer.Option("--json", help="machine-readable")]
Overrides = Annotated[list[str] | None, typer.Argument(autocompletion=_complete, metavar="[KEY=VALUE]...")]
Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="a package of yours whose metrics and edits are used; may be repeated"),
]
Wanted = Annotated[bool, typer.Option("--help", "-h", is_eager=True)]
EditDir = Annotated[Path, typer.Argument(help="directory of an edit, or of a run with saved edits")]
Out = Annotated[Path, typer.Option(help="folder for what is written; must not exist or be empty")]
ModelName = Annotated[
    str | None, typer.Option(help="name in conf/model, or a folder, if not the one the edit was made for")
]
DeviceMap = Annotated[
    str | None, typer.Option(help="how to spread a model that is too large for one device, such as auto")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run code that comes with the model: only if you trust it")
]


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context, wants_help: Wanted = False, version: Annotated[bool, typer.Option("--version")] = False
) -> None:
    if version:
        from edit_cli import __version__

        typer.echo(f"edit-cli {__version__}")
        raise typer.Exit
    if wants_help or context.invoked_subcommand is None:
        typer.echo(help_texts.overview())
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


@app.command("show-config", context_settings=PASS_ON | HELP)
def show_config(
    what: Annotated[str, typer.Argument(help="a method, or KIND/NAME, such as dataset/fever or model/gpt2-xl")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as model=gpt2-xl: as published for it")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show every setting of a method, a data set, a model, a protocol, …, with what it takes."""

    def work() -> int:
        from edit_cli.cli import show_config

        return show_config.run(what, overrides or [], as_json)

    _exit(work)


@app.command("ls", context_settings=HELP)
def ls(
    what: Annotated[
        str,
        typer.Argument(help="methods, models, datasets, metrics or runs", autocompletion=lambda: list(catalog.LISTS)),
    ],
    wanted: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="of runs, only those with method=…, dataset=…, model=…, status=… or any setting; * fits anything",
        ),
    ] = None,
    sort: Annotated[str | None, typer.Option(help="metric by which runs are sorted, the best first")] = None,
    as_json: Json = False,
    runs_dir: Annotated[Path, typer.Option(help="where to look for runs")] = Path("runs"),
    plugin: Plugins = None,
) -> None:
    """List methods, models, datasets, metrics or runs."""

    def work() -> int:
        from edit_cli.commands import ls

        return ls.run(what, as_json, expanded(runs_dir), wanted or [], sort)

    _exit(work, plugin)


@app.command("show", context_settings=HELP)
def show(
    run: Annotated[Path, typer.Argument(help="directory of a run")],
    case: Annotated[str | None, typer.Option(help="show what the model said before and after, for this case")] = None,
    as_json: Json = False,
    plugin: Plugins = None,
) -> None:
    """Show a run: its table, or one case."""

    def work() -> int:
        from edit_cli.commands import show

        return show.run(expanded(run), case, as_json)

    _exit(work, plugin)


@app.command("compare", context_settings=HELP)
def compare(
    runs: Annotated[
        list[str], typer.Argument(help="directories of runs, folders of them, or patterns ('runs/*/memit*')")
    ],
    against: Annotated[
        str | None, typer.Option(help="run, or its name in the table, that the others are paired with, case by case")
    ] = None,
    x: Annotated[
        str | None,
        typer.Option(help="setting on the x-axis, such as protocol.batch_size; facts: checkpoints of sequential runs"),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="metrics with commas between them; `edit-cli ls metrics` lists them")
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
        str | None, typer.Option("--format", help="csv, markdown or latex, printed instead of the table, or for OUT")
    ] = None,
    published: Annotated[
        str | None, typer.Option(help="published tables beside it, such as rome-counterfact, with commas between them")
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="list runs apart that are not alike; refused otherwise")
    ] = False,
    plugin: Plugins = None,
) -> None:
    """Put several runs side by side: a table, differences, published numbers, a figure."""

    def work() -> int:
        from edit_cli.commands import compare

        return compare.run(runs, x, metrics, by, out and expanded(out), against, published, form, anyway)

    _exit(work, plugin)


@app.command("report", context_settings=HELP)
def report(
    runs: Annotated[
        list[str], typer.Argument(help="directories of runs, folders of them, or patterns ('runs/*/memit*')")
    ],
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("report.html"),
    against: Annotated[
        str | None, typer.Option(help="run, or its name in the table, that the others are paired with, case by case")
    ] = None,
    published: Annotated[
        str | None, typer.Option(help="published tables beside it, such as rome-counterfact, with commas between them")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Write a page to look at: tables, figures, every case, settings; several runs side by side."""

    def work() -> int:
        from edit_cli.commands import report

        return report.run(runs, expanded(out), against, published)

    _exit(work, plugin)


@app.command("apply", context_settings=HELP)
def apply(
    edit_dir: EditDir,
    out: Out,
    model: ModelName = None,
    device_map: DeviceMap = None,
    trust_remote_code: TrustRemoteCode = False,
    plugin: Plugins = None,
) -> None:
    """Bake a weight edit into a plain transformers checkpoint."""

    def work() -> int:
        from edit_cli.commands import apply
        from edit_cli.experiment.saved_edits import Base

        return apply.run(expanded(edit_dir), expanded(out), Base(model, trust_remote_code, device_map))

    _exit(work, plugin)


@app.command("export", context_settings=HELP)
def export(
    edit_dir: EditDir,
    out: Out,
    to: Annotated[
        str,
        typer.Option(
            help="peft: a LoRA adapter beside the model; checkpoint: as `apply`, with a card",
            autocompletion=lambda: ["peft", "checkpoint"],
        ),
    ],
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="the most that an adapter may have in a matrix; without it, as many as it takes"),
    ] = None,
    model: ModelName = None,
    device_map: DeviceMap = None,
    trust_remote_code: TrustRemoteCode = False,
    plugin: Plugins = None,
) -> None:
    """Write a weight edit for other programs: a PEFT adapter or a checkpoint, with a model card."""

    def work() -> int:
        from edit_cli.commands import export
        from edit_cli.experiment.saved_edits import Base

        return export.run(expanded(edit_dir), to, expanded(out), Base(model, trust_remote_code, device_map), rank)

    _exit(work, plugin)


@app.command("ask", context_settings=HELP)
def ask(
    edit_dir: EditDir,
    prompts: Annotated[list[str] | None, typer.Argument(help="without any, lines of standard input")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length of an answer")] = 20,
    sample: Annotated[
        int | None,
        typer.Option(min=1, help="draw from so many of the likeliest tokens, instead of taking the likeliest"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of what is drawn")] = 0,
    edited_only: Annotated[bool, typer.Option("--edited-only", help="do not ask the unedited model")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable, an object a line")] = False,
    model: ModelName = None,
    device_map: DeviceMap = None,
    trust_remote_code: TrustRemoteCode = False,
    plugin: Plugins = None,
) -> None:
    """Ask a model with and without an edit, side by side."""

    def work() -> int:
        from edit_cli.commands import ask
        from edit_cli.experiment.saved_edits import Base

        asking = ask.Asking(max_new_tokens, sample, seed, edited_only)
        return ask.run(expanded(edit_dir), prompts or [], Base(model, trust_remote_code, device_map), asking, as_json)

    _exit(work, plugin)


@app.command("edits", context_settings=HELP)
def edits(
    directory: Annotated[Path, typer.Argument(help="an edit, a run with saved edits, or a folder of such")],
    as_json: Json = False,
    plugin: Plugins = None,
) -> None:
    """List saved edits: facts, kind, size, and what each stands on."""

    def work() -> int:
        from edit_cli.commands import edits

        return edits.run(expanded(directory), as_json)

    _exit(work, plugin)


@app.command("env", context_settings=HELP)
def env(as_json: Json = False) -> None:
    """Show versions and devices, as every run stores them."""

    def work() -> int:
        from edit_cli.commands import env

        return env.run(as_json)

    _exit(work)


def _explain(name: str, overrides: list[str]) -> int:
    """Help, with the settings of the options that are named beside it."""
    lines = [help_texts.command(name, overrides)]
    for override in overrides:
        group, _, option = override.partition("=")
        if group in catalog.GROUPS.values() and option in catalog.names(group):
            from edit_cli.cli import show_config

            lines += ["", *show_config.section(group, option, [], name)]
    typer.echo("\n".join(lines).rstrip())
    return 0


def _launch(name: str, overrides: list[str]) -> int:
    from edit_cli.config.overrides import regroup

    regroup(overrides)  # mistakes that can be seen without Hydra are answered without it
    from edit_cli.cli.hydra_launch import launch
    from edit_cli.experiment.execute import execute
    from edit_cli.experiment.sweep import conclude

    outcomes, is_sweep = launch(name, overrides, execute)
    return conclude(outcomes, is_sweep)


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
    sys.exit(main())
