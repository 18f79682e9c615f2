"""What there is to choose from, read from the files in conf/ and the classes that they name: quick enough for help."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path

from edit_cli.config import registry, sketch
from edit_cli.errors import UsageError

FROM_PLUGINS = {"method": registry.METHODS, "dataset": registry.DATASETS}
GROUPS = {"methods": "method", "datasets": "dataset", "models": "model", "corpora": "corpus"}
# classes of settings that help can import, since their modules import nothing heavy
LIGHT = (
    "edit_cli.experiment.",
    "edit_cli.inspection.settings.",
    "edit_cli.tracing.settings.",
)
LISTS = (*GROUPS, "metrics", "runs")


@dataclass(frozen=True)
class Entry:
    """One option of a group: `method=NAME`, and the first comment line of its file."""

    name: str
    summary: str


@cache
def conf_dir() -> Path:
    """The folder of the packaged configurations."""
    import edit_cli.conf

    return Path(edit_cli.conf.__file__).parent


def entries(group: str, root: Path | None = None) -> list[Entry]:
    """Options of one group, by name; those of plug-ins behind the packaged ones."""
    files = sorted(((root or conf_dir()) / group).glob("*.yaml"))
    found = {file.stem: _summary(file) for file in files}
    return [
        *(Entry(name, summary) for name, summary in found.items()),
        *(Entry(e.name, f"from {registry.origin(e)}") for e in plugins(group) if e.name not in found),
    ]


def names(group: str) -> list[str]:
    """Names of the packaged options of one group."""
    return [file.stem for file in sorted((conf_dir() / group).glob("*.yaml"))]


def plugins(group: str) -> list[EntryPoint]:
    """The options of one group that plug-ins bring."""
    return registry.plugins(FROM_PLUGINS[group]) if group in FROM_PLUGINS else []


def plugin(group: str, name: str) -> EntryPoint:
    """The option of that name.

    Raises:
        UsageError: several plug-ins bring one.
    """
    found = [entry for entry in plugins(group) if entry.name == name]
    if len(found) > 1:
        raise UsageError(
            f"{group}={name}: {' and '.join(map(registry.origin, found))} bring one: uninstall one of them"
        )
    return found[0]


def files_of(group: str, option: str, folders: Sequence[Path] = ()) -> list[Path]:
    """The files that an option is made of, in order: those that its defaults list names come first. folders: of the
    user's own configurations.
    """
    places = [folder / group / f"{option}.yaml" for folder in (conf_dir(), *folders)]
    file = next(filter(Path.is_file, places), None)
    if file is None:
        return []
    listed = re.search(r"^defaults:(.*\n(?:[ -].*\n)*)", file.read_text(encoding="utf-8"), re.MULTILINE)
    names = re.findall(r"(?<![\w:@/])([A-Za-z][\w./-]*)", listed[1].replace("_here_", "")) if listed else []
    return [*(found for name in names for found in files_of(group, name, folders)), file]


def target_of(group: str, option: str, folders: Sequence[Path] = ()) -> str | None:
    """The class that an option names, itself or through its defaults list."""
    for file in reversed(files_of(group, option, folders)):
        if found := re.search(r"^_target_: *(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE):
            return found[1]
    brought = next((entry for entry in plugins(group) if entry.name == option), None)
    return None if brought is None else brought.value.replace(":", ".")


def targets(
    command: str, overrides: Sequence[str] = (), folders: Sequence[Path] = ()
) -> Iterator[tuple[str, str, str | None]]:
    """(prefix of its keys, option, class) of everything that a command's configuration is made of: its top, groups with
    a class of their own, and the options that the overrides choose, or the command itself.
    """
    text = "".join((conf_dir() / f"{file}.yaml").read_text(encoding="utf-8") for file in ("common", command))
    if found := re.search(r"^_target_: *(\S+)", text, re.MULTILINE):
        yield "", command, found[1]
    for group, target in re.findall(r"^(\w+):.*\n  _target_: *(\S+)", text, re.MULTILINE):
        yield f"{group}.", command, target
    for group, option in re.findall(r"^  - (?:optional )?(\w+): ([\w.-]+)", text, re.MULTILINE):
        given = [override.partition("=")[2] for override in overrides if override.lstrip("+").startswith(f"{group}=")]
        for name in re.findall(r"[A-Za-z][\w.-]*", given[-1] if given else option):
            yield f"{group}.", name, target_of(group, name, folders)


def keys(command: str, overrides: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """{dotted key: the words that it takes, if it takes some} of a command with the options that the overrides choose,
    or its own.
    """
    found: dict[str, tuple[str, ...]] = {}
    for prefix, _, target in targets(command, overrides):
        found |= {} if target is None else sketch.keys(target, prefix)
    return {key: tuple(dict.fromkeys(_with_options(words))) for key, words in found.items()}


def _with_options(words: Sequence[str]) -> Iterator[str]:
    """The words, with the options of a group for [@GROUP]."""
    for word in words:
        if word.startswith("[@"):
            yield from (f"[{name}]" for name in names(word[2:-1]))
        else:
            yield word


def class_at(target: str) -> type:
    """The class of that name. Raises ImportError or AttributeError."""
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def groups(command: str) -> list[str]:
    """The groups of a command's configuration."""
    text = "".join((conf_dir() / f"{file}.yaml").read_text(encoding="utf-8") for file in ("common", command))
    return re.findall(r"^(?:  - (?:optional )?)?([a-z]\w*):", text, re.MULTILINE)


def choices(command: str) -> list[str]:
    """The groups of which a command's user may choose an option."""
    text = (conf_dir() / f"{command}.yaml").read_text(encoding="utf-8")
    return [group for group in re.findall(r"^  - (?:optional )?(\w+): ", text, re.MULTILINE) if names(group)]


def described() -> list[str]:
    """What `show-config` shows: methods by their names, the rest as KIND/NAME."""
    kinds = [group for group in (*GROUPS.values(), "protocol") if group != "method"]
    return [*names("method"), "stats", *(f"{kind}/{name}" for kind in kinds for name in names(kind))]


def published() -> list[str]:
    """Tables of papers that runs can be put beside."""
    return sorted(file.stem for file in Path(__file__).parents[1].joinpath("published").glob("*.yaml"))


def top_keys(command: str) -> set[str]:
    """What may stand at the top of a command's configuration: its own keys, those of all commands, and groups."""
    return {key.partition(".")[0] for key in keys(command)} | set(groups(command))


def _summary(file: Path) -> str:
    with open(file, encoding="utf-8") as lines:
        first = next(lines, "").strip()
    if first.startswith("# @package"):
        return ""
    return re.sub(r"^\S+\.yaml — ", "", first.lstrip("# ")) if first.startswith("#") else ""
