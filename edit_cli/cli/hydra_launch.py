"""Hands a command's arguments to Hydra, runs its jobs, and turns whatever goes wrong into one line and an exit code."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from edit_cli import streams
from edit_cli.config import catalog, registry, source
from edit_cli.config.build import did_you_mean, register_resolvers
from edit_cli.config.composed import Composed
from edit_cli.config.overrides import (
    MULTIRUN,
    RETRY,
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

NOT_IN_TAG = ("method", "model", "dataset", "tag", "run_dir", "runs_dir", "hydra")


Execute = Callable[[Composed], Outcome]


def launch(command: str, arguments: Sequence[str], execute: Execute) -> tuple[list[Outcome], Sweep | None]:
    """Compose and run `command`.

    (outcomes in order of their jobs, the sweep that they are of, if it is kept on disk); none where Hydra only printed.

    Raises:
        UsageError: the arguments or the configuration they name make no sense.
    """
    import hydra

    argv = regroup(arguments)
    named = plugins_of(argv)
    registry.admit(named)
    registry.check()
    folders = _refuse_hidden(argv)
    register_resolvers()
    argv = with_defaults(regroup(arguments, kinds(command, argv, folders)))
    overrides = [argument for argument in argv if "=" in argument and not argument.startswith("-")]
    _refuse_unread(command, argv)
    keys = _swept(overrides)
    argv = [_late(argument, keys) if argument in overrides else argument for argument in argv]
    outcomes: list[Outcome] = []
    swept = not MULTIRUN.isdisjoint(argv)
    process, kept = os.getpid(), "dry_run=true" not in overrides
    with TemporaryDirectory(prefix="edit-cli-") as elsewhere:
        root = expanded(_given(overrides, "runs_dir", "runs")) if kept else Path(elsewhere)
        sweep = _sweep(command, arguments, argv, keys, root) if swept and not follows() else None

        def job(config: DictConfig) -> None:  # in a worker process, if the launcher makes some
            register_resolvers()
            settings = HydraConfig.get()
            if os.getpid() != process:
                streams.settle()
                by_joblib = settings.runtime.choices["hydra/launcher"] == "joblib"
                if by_joblib and sweep is not None and _is_free_to_choose(config):
                    take_one(sweep.folder)
            in_sweep = settings.mode == RunMode.MULTIRUN
            number = settings.job.num if in_sweep else 0
            varied = tuple(text for text in settings.overrides.task if override_key(text) in keys)
            if sweep is not None:
                if number in sweep.spared:
                    return
                sweep.begin(number, varied)
            choices = {
                group: choice for group, choice in settings.runtime.choices.items() if not group.startswith("hydra/")
            }
            tag = _tag(config.get("tag"), varied) if in_sweep else config.get("tag")
            given = tuple(key for text in settings.overrides.task if (key := override_key(text)).startswith("method."))
            typed = {"overrides": tuple(settings.overrides.task), "arguments": tuple(arguments)}
            ended = execute(Composed(command, config, choices, tag, in_sweep, tuple(named), given, **typed))
            outcome = Outcome(ended.exit_code, ended.run_dir, number, varied, ended.error)
            outcomes.append(outcome) if sweep is None else sweep.end(outcome)

        own, sys.argv = sys.argv, [f"edit-cli {command}", *argv]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # its exceptions come to us, who say what they mean
        try:
            hydra.main(version_base="1.3", config_path="pkg://edit_cli.conf", config_name=command)(job)()
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise explain(error, command, overrides) from None
        except KeyboardInterrupt:
            if sweep is not None and kept:
                Screen().note(sweep.progress())
            raise
        except RuntimeError as error:
            if sweep is None or not _is_of_launcher(error):
                raise
            Screen().error(f"a process of this sweep was lost: {str(error).strip().splitlines()[0]}")
        finally:
            sys.argv = own
        if sweep is None:
            return outcomes, None
        return sweep.outcomes(), sweep if kept else None


def _sweep(command: str, arguments: Sequence[str], argv: Sequence[str], keys: set[str], root: Path) -> Sweep:
    """The sweep that is launched. Raises UsageError: one that was never begun is to be retried."""
    typed = [argument for argument in arguments if argument != RETRY]
    overrides = [argument for argument in argv if "=" in argument and not argument.startswith("-")]
    sweep = Sweep.of(command, typed, overrides, _jobs(overrides, keys), root)
    return replace(sweep, spared=sweep.retried()) if RETRY in arguments else sweep


def _jobs(overrides: Sequence[str], keys: set[str]) -> list[list[str]]:
    """What each job of a sweep varies, as Hydra's own sweeper deals them out; nothing where another one does."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    own = [text for text in overrides if not override_key(text).startswith(("hydra.", "hydra/"))]
    if any(override_key(text).startswith(("hydra.sweeper", "hydra/sweeper")) for text in overrides):
        return []
    try:
        batches = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(own), None)
    except HydraException:
        return []  # Hydra will say so, or look into folders for a glob
    return [[text for text in job if override_key(text) in keys] for batch in batches for job in batch]


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


def explain(error: Exception, command: str, overrides: Sequence[str]) -> UsageError:
    """What Hydra or OmegaConf complain about, in terms of what was typed."""
    text = str(error)
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if isinstance(error, MissingConfigException):
        return UsageError(_missing_option(text, first))
    if isinstance(error, OverrideParseException):
        wrong = next((override for override in overrides if not _parses(override)), None)
        named = f"cannot read {wrong}" if wrong else f"cannot read the settings ({first})"
        return UsageError(
            f"{named}: quote texts with special characters, such as 'key=\"a, b\"', and close every bracket"
        )
    if first.startswith("Config group override must be a string"):
        wrong = next((override for override in overrides if _is_no_option(override)), "an override")
        return UsageError(f"{wrong} names no option: groups take names, such as method=memit")
    if found := re.search(r"Ambiguous value for argument '(.+?)'", text):
        return UsageError(
            f"{found[1]} gives several values: add -m to run them one after another, or write a list: key=[a,b]"
        )
    if found := re.match(r"Could not override '(.+?)'", first):
        return UsageError(_unknown_key(found[1].partition("@")[0], command, overrides))
    if found := re.match(r"Could not append to config\. An item is already at '(.+?)'", first):
        return UsageError(f"+{found[1]}: that setting exists already; write {found[1]}=VALUE without the +")
    if found := re.match(r"Could not delete from config\. '(.+?)' does not exist", first):
        return UsageError(_unknown_key(found[1], command, overrides))
    return UsageError(first)


def _missing_option(text: str, first: str) -> str:
    found = re.search(r"Could not find '((?:hydra/)?[^/']+)/([^']*)'", text)
    if not found:
        return first
    group, option = found[1], found[2]
    if option.startswith("submitit"):
        return f"{group}={option} needs another package: pip install 'edit-cli[submitit]'"
    listed = re.search(r"Available options in '.*?':\n((?:\t.+\n?)+?)(?:Config search path|$)", text)
    known = listed[1].split() if listed else catalog.names(group)
    return f"{group}={option}: there is no such {group}{did_you_mean(option, known)}"


def _unknown_key(key: str, command: str, overrides: Sequence[str]) -> str:
    """Names beside it come first, then all, so that `lmit` is `limit` and `layers` is `method.layers`."""
    known = _known_keys(command, overrides)
    parent, _, name = key.rpartition(".")
    if 1 <= len(owners := _options_with(parent, name)) <= 3:
        return f"unknown key {key} here; it belongs to {' and '.join(f'{parent}={owner}' for owner in owners)}"
    beside = [name for name in known if name.rpartition(".")[0] == parent]
    for names in (beside, known, [name for name in known if name.rpartition(".")[2] == key]):
        if "did you mean" in (near := did_you_mean(key, names)):
            return f"unknown key {key}{near}"
    return f"unknown key {key}{did_you_mean(key, beside or [name for name in known if '.' not in name])}"


def _options_with(group: str, key: str) -> list[str]:
    """Options of a group (`method`, `protocol`, …) whose own file has that key."""
    files = sorted((catalog.conf_dir() / group).glob("*.yaml")) if group and "." not in group else []
    with_keys = ((file.stem, source.with_defaults(OmegaConf.load(file)).keys()) for file in files)
    return [option for option, keys in with_keys if key in keys]  # `in` the node denies a key that waits for its value


def _known_keys(command: str, overrides: Sequence[str]) -> list[str]:
    """Keys of the command with the chosen options (the first of several), and the groups: enough to guess what a
    misspelled one was.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    chosen = [
        text.partition(",")[0] for text in overrides if override_key(text) in (*catalog.GROUPS.values(), "protocol")
    ]
    chosen += [text for text in overrides if override_key(text) == "hydra.searchpath"]
    for choices in (chosen, []):
        GlobalHydra.instance().clear()
        try:
            with hydra.initialize_config_module("edit_cli.conf", version_base="1.3"):
                return _flat(hydra.compose(command, choices))
        except (HydraException, OmegaConfBaseException):
            continue  # an option of the user's own, or one that does not exist
    return list(catalog.GROUPS.values())


def _flat(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in map(str, config):
        node = config._get_node(key)
        keys.append(f"{prefix}{key}")
        if (
            isinstance(node, DictConfig)
            and not node._is_interpolation()
            and not node._is_missing()
            and not node._is_none()
        ):
            keys += _flat(node, f"{prefix}{key}.")
    return [key for key in keys if not key.endswith("_target_")]


def _parses(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _is_no_option(override: str) -> bool:
    """Whether it gives a group, or a package of one, something that is no name."""
    key, _, value = override.lstrip("+").partition("=")
    return (
        "." not in key
        and ("@" in key or key in (*catalog.GROUPS.values(), "protocol"))
        and not re.match("[A-Za-z]", value.removeprefix("null"))
    )


def _swept(overrides: Sequence[str]) -> set[str]:
    """Keys that get several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    try:
        parsed = parser.parse_overrides(list(overrides))
    except HydraException:
        return set()  # Hydra will say so
    return {override_key(str(override.input_line)) for override in parsed if override.is_sweep_override()}


def _late(override: str, swept: set[str]) -> str:
    """Hydra first composes a sweep without what is swept, where a key of another method is unknown: as one of one
    choice, it waits.
    """
    key = override_key(override)
    if key in swept or "." not in key or key.partition(".")[0] not in swept or override.startswith("~"):
        return override
    name, _, value = override.partition("=")
    return f"{name}=choice({value})"


def _tag(given: str | None, varied: Sequence[str]) -> str | None:
    """The user's tag and what a sweep varies, apart from what the run directory is named by anyway."""
    parts = [given] if given else []
    for text in varied:
        key = override_key(text)
        if key.partition(".")[0] not in NOT_IN_TAG or ("." in key and not key.startswith("hydra.")):
            value = unquoted(text.partition("=")[2]).strip("[]'\"")
            parts.append(f"{key.rpartition('.')[2]}={value}")
    return re.sub(r"[^\w.=,+-]+", "_", ",".join(parts)) or None


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
            raise UsageError(_unknown_key(key, command, [argument for argument in argv if "=" in argument]))


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
