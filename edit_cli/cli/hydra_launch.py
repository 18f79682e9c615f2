"""Hands a command's arguments to Hydra, runs its jobs, and turns whatever goes wrong into one line and an exit code."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import hydra
import hydra.version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from edit_cli import streams
from edit_cli.cli.explain import explain, unknown_key
from edit_cli.cli.swept import late, sweep_of, swept_keys, tag_of
from edit_cli.config import catalog, registry, source
from edit_cli.config.build import register_resolvers
from edit_cli.config.composed import Composed
from edit_cli.config.overrides import (
    MULTIRUN,
    Kind,
    kind_of,
    literal,
    override_key,
    regroup,
    unquoted,
)
from edit_cli.config.schema import leaves
from edit_cli.console import Screen
from edit_cli.distributed import follows
from edit_cli.errors import UsageError
from edit_cli.experiment.devices import take_one
from edit_cli.experiment.job import Outcome
from edit_cli.experiment.sweep import Sweep
from edit_cli.files.paths import expanded

Execute = Callable[[Composed], Outcome]
LAUNCHER = "hydra/launcher"
HYDRA, CONF = "1.3", "pkg://edit_cli.conf"


@dataclass
class Jobs:
    """The jobs of one command line, which Hydra calls with their configurations.

    plugins: packages that the command line names. keys: those that a sweep varies. process: the one that launches.
    """

    command: str
    arguments: Sequence[str]
    plugins: tuple[str, ...]
    keys: set[str]
    execute: Execute
    sweep: Sweep | None
    process: int = field(default_factory=os.getpid)
    ended: list[Outcome] = field(default_factory=list)

    def run(self, config: DictConfig) -> None:
        """One of them, in a worker process if the launcher makes some; what it came to goes to the sweep, if it is of
        one.
        """
        register_resolvers()
        settings = HydraConfig.get()
        if os.getpid() != self.process:
            self._settle(settings.runtime.choices[LAUNCHER], config)
        overrides = tuple(settings.overrides.task)
        in_sweep = settings.mode == RunMode.MULTIRUN
        number = settings.job.num if in_sweep else 0
        varied = tuple(text for text in overrides if override_key(text) in self.keys)
        if self.sweep is not None:
            if number in self.sweep.spared:
                return
            self.sweep.begin(number, varied)
        choices = {
            group: choice for group, choice in settings.runtime.choices.items() if not group.startswith("hydra/")
        }
        composed = Composed(
            self.command,
            config,
            choices,
            tag_of(config.get("tag"), varied) if in_sweep else config.get("tag"),
            in_sweep,
            self.plugins,
            tuple(key for text in overrides if (key := override_key(text)).startswith("method.")),
            overrides=overrides,
            arguments=tuple(self.arguments),
        )
        ended = self.execute(composed)
        outcome = Outcome(ended.exit_code, ended.run_dir, number, varied, ended.error)
        self.ended.append(outcome) if self.sweep is None else self.sweep.end(outcome)

    def _settle(self, launcher: str, config: DictConfig) -> None:
        """In a process of its own: with streams of its own, and a GPU where joblib starts one process for each."""
        streams.settle()
        if launcher == "joblib" and self.sweep is not None and _is_free_to_choose(config):
            take_one(self.sweep.folder)


def launch(command: str, arguments: Sequence[str], execute: Execute) -> tuple[list[Outcome], Sweep | None]:
    """Compose and run `command`.

    (outcomes in order of their jobs, the sweep that they are of, if it is kept on disk); none where Hydra only printed.

    Raises:
        UsageError: the arguments or the configuration they name make no sense.
    """
    argv = regroup(arguments)
    named = plugins_of(argv)
    registry.admit(named)
    registry.check()
    folders = _refuse_hidden(argv)
    register_resolvers()
    argv = with_defaults(regroup(arguments, kinds(command, argv, folders)))
    overrides = [argument for argument in argv if "=" in argument and not argument.startswith("-")]
    _refuse_unread(command, argv)
    keys = swept_keys(overrides)
    argv = [late(argument, keys) if argument in overrides else argument for argument in argv]
    swept, kept = not MULTIRUN.isdisjoint(argv), "dry_run=true" not in overrides
    with TemporaryDirectory(prefix="edit-cli-") as elsewhere:
        root = expanded(_given(overrides, "runs_dir", "runs")) if kept else Path(elsewhere)
        sweep = sweep_of(command, arguments, argv, keys, root) if swept and not follows() else None
        jobs = Jobs(command, arguments, tuple(named), keys, execute, sweep)
        launcher = _given(overrides, LAUNCHER, "")
        if sweep is not None and kept and launcher.startswith("submitit") and find_spec("submitit"):
            Screen().note(sweep.awaited(launcher))
        try:
            _hand_over(command, argv, overrides, jobs)
        except KeyboardInterrupt:
            if sweep is not None and kept:
                Screen().note(sweep.progress())
            raise
        if sweep is None:
            return jobs.ended, None
        return sweep.outcomes(), sweep if kept else None


def _hand_over(command: str, argv: Sequence[str], overrides: Sequence[str], jobs: Jobs) -> None:
    """Let Hydra read the command line and call the jobs.

    Raises:
        UsageError: it does not understand the command line.
    """
    own, sys.argv = sys.argv, [f"edit-cli {command}", *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its exceptions come to us, who say what they mean
    try:
        if all(argument in overrides and not override_key(argument).startswith("hydra") for argument in argv):
            _run_one(command, overrides, jobs)
        else:
            hydra.main(version_base=HYDRA, config_path=CONF, config_name=command)(jobs.run)()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise explain(error, command, overrides) from None
    except RuntimeError as error:
        if jobs.sweep is None or not _is_of_launcher(error):
            raise
        Screen().error(f"a process of this sweep was lost: {str(error).strip().splitlines()[0]}")
    finally:
        sys.argv = own


def _run_one(command: str, overrides: Sequence[str], jobs: Jobs) -> None:
    """What `hydra.main` does where values alone are named. It would compose twice: first to ask whether a configuration
    asks for several jobs, which ours never do.
    """
    hydra.version.setbase(HYDRA)
    own = Hydra.create_main_hydra2(task_name=command, config_search_path=create_config_search_path(CONF))
    try:
        own.run(command, jobs.run, list(overrides))
    finally:
        GlobalHydra.instance().clear()


def _is_free_to_choose(config: DictConfig) -> bool:
    """Whether a job says nothing of the devices that it runs on."""
    said = {key: OmegaConf.select(config, key) for key in ("model.device", "model.device_map", "processes")}
    return said == {"model.device": "auto", "model.device_map": None, "processes": 1}


def _is_of_launcher(error: Exception) -> bool:
    """Whether it says that a worker of joblib or a job of SLURM ended without an answer."""
    return type(error).__module__.partition(".")[0] in ("joblib", "submitit")


def kinds(command: str, argv: Sequence[str], folders: Sequence[Path]) -> dict[str, Kind]:
    """{dotted key: how it is typed} of the settings that hold text, of the command with the options it is given."""
    overrides = [argument for argument in argv if "=" in argument]
    found: dict[str, Kind] = {}
    for prefix, _, target in catalog.targets(command, overrides, folders):
        if target is not None and (cls := source.class_of(target)) is not None:
            typed = ((key, kind_of(hint)) for key, hint in leaves(cls, prefix))
            found |= {key: kind for key, kind in typed if kind is not None}
    return found


def with_defaults(argv: Sequence[str]) -> list[str]:
    """A user's folder of configurations is read as the packaged one is: with the defaults of the classes they name."""
    words = list(argv)
    for flag in ("--config-dir", "-cd"):
        while flag in words:
            folder = Path(words.pop(words.index(flag) + 1)).resolve()
            words.remove(flag)
            words.append(f"hydra.searchpath=[{literal(f'{source.FilesWithDefaults.scheme()}://{folder}')}]")
    return words


def _refuse_hidden(argv: Sequence[str]) -> list[Path]:
    """The folders of the user's own configurations. Hydra reads packaged files before a user's: one of the same name
    would silently not be read.
    """
    folders = [Path(folder) for flag, folder in itertools.pairwise(argv) if flag in ("--config-dir", "-cd")]
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"--config-dir {folder}: no such folder")
        for file in sorted(folder.rglob("*.yaml")):
            name = file.relative_to(folder)
            if (catalog.conf_dir() / name).is_file():
                raise UsageError(
                    f"{file} has the name of a packaged file ({name}), which comes first: give yours another name"
                )
            if any(entry.name == file.stem for entry in catalog.plugins(str(name.parent))):
                raise UsageError(f"{file} has the name of what a plug-in brings: give yours another name")
    return folders


def _refuse_unread(command: str, argv: Sequence[str]) -> None:
    """Hydra adds whatever `+KEY=VALUE` names, and takes away what `~KEY` does; what stands at the top under another
    name than ours, nothing reads, and without a group no command knows what to do.
    """
    for override in (argument for argument in argv if argument.startswith(("+", "~"))):
        key = override_key(override)
        if override.startswith("~") and key in (*catalog.GROUPS.values(), "protocol"):
            raise UsageError(f"~{key}: `{command}` cannot do without; choose another one by {key}=NAME")
        if override.startswith("+") and re.split(r"[./]", key)[0] not in catalog.top_keys(command):
            raise UsageError(unknown_key(key, command, [argument for argument in argv if "=" in argument]))


def plugins_of(overrides: Sequence[str]) -> list[str]:
    """The packages that the command line names.

    Raises:
        UsageError: it gives no list of names.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = [override for override in overrides if override_key(override) == "plugins"]
    if not given:
        return []
    wrong = UsageError(f"{given[-1]}: give a list of packages, such as plugins=[mypackage]")
    try:
        parsed = OverridesParser.create().parse_override(given[-1])
    except HydraException:
        raise wrong from None
    value = [] if parsed.is_sweep_override() else parsed.value()
    if not isinstance(value, list) or parsed.is_sweep_override() or not all(isinstance(name, str) for name in value):
        raise wrong
    return [str(name) for name in value]


def _given(overrides: Sequence[str], key: str, default: str) -> str:
    given = (override.partition("=")[2] for override in reversed(overrides) if override_key(override) == key)
    return unquoted(next(given, default))
