"""What there is to choose from, read from the names and first lines of the files in conf/: quick enough for --help
and completion.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path

from edit_cli.config import registry
from edit_cli.errors import UsageError

FROM_PLUGINS = {"method": registry.METHODS, "dataset": registry.DATASETS}
GROUPS = {"methods": "method", "datasets": "dataset", "models": "model", "corpora": "corpus"}
LISTS = ("methods", "models", "datasets", "metrics", "runs")


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


def keys(command: str) -> list[str]:
    """Keys of a command's own settings and of what all commands share, for completion."""
    found = []
    chosen = re.findall(r"^  - (protocol): (\w+)", (conf_dir() / f"{command}.yaml").read_text(encoding="utf-8"), re.M)
    for file in ("common", command, *(f"{group}/{option}" for group, option in chosen)):
        above: list[tuple[int, str]] = [(-1, file.partition("/")[0])] if "/" in file else []
        for line in (conf_dir() / f"{file}.yaml").read_text(encoding="utf-8").splitlines():
            if not (match := re.match(r"( *)([a-z]\w*):(.*)", line)):
                continue
            indent = len(match[1])
            above = [(depth, name) for depth, name in above if depth < indent] + [(indent, match[2])]
            if match[3].partition("#")[0].strip():
                found.append(".".join(name for _, name in above))
    return [key for key in dict.fromkeys(found) if not key.startswith("hydra.")]


def top_keys(command: str) -> set[str]:
    """What may stand at the top of a command's configuration: its own keys, those of all commands, and groups."""
    texts = [(conf_dir() / f"{file}.yaml").read_text(encoding="utf-8") for file in ("common", command)]
    return {name for text in texts for name in re.findall(r"^(?:  - (?:optional )?)?([a-z]\w*):", text, re.MULTILINE)}


def _summary(file: Path) -> str:
    with open(file, encoding="utf-8") as lines:
        first = next(lines, "").strip()
    if first.startswith("# @package"):
        return ""
    return re.sub(r"^\S+\.yaml — ", "", first.lstrip("# ")) if first.startswith("#") else ""
