"""What there is to choose from, read from the names and first lines of the files in conf/: quick enough for --help
and completion.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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
    """Options of one group, by name."""
    files = sorted(((root or conf_dir()) / group).glob("*.yaml"))
    return [Entry(file.stem, _summary(file)) for file in files]


def names(group: str) -> list[str]:
    """Names of the options of one group."""
    return [file.stem for file in sorted((conf_dir() / group).glob("*.yaml"))]


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
