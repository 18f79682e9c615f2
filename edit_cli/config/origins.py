"""Where each setting of a run comes from: the command line, what tune found, what is published for the model, the file
of an option, another setting, or the default of its class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from edit_cli.config import catalog, users
from edit_cli.config.composed import Composed
from edit_cli.config.identity import flatten
from edit_cli.config.overrides import override_key
from edit_cli.config.registry import TARGET

COMMAND_LINE, TUNE, DEFAULT = "command line", "tune", "default"
SKIPPED = ("type", "defaults", TARGET)  # last parts of keys that are no settings


def origins(composed: Composed) -> dict[str, str]:
    """{dotted key: origin} of every setting that is not the default of its class.

    An origin is `command line`, `tune`, the packaged file that has the key (`conf/tuned/memit/gpt2-xl.yaml`), a file of
    the user's (`method/mine.yaml`), or the setting that the value is taken from (`${model.default_limit}`).
    """
    typed = [key for text in composed.overrides if (key := override_key(text)) not in composed.choices]
    raw = flatten(_plain(composed.node))
    layers = list(_layers(composed))
    found = {}
    for key in flatten(composed.plain):
        if key.rpartition(".")[2] in SKIPPED:
            continue
        if any(_within(key, other) for other in typed):
            found[key] = COMMAND_LINE
        elif layer := next((name for name, keys in layers if any(_within(key, other) for other in keys)), None):
            found[key] = layer
        elif link := next((str(value) for name, value in raw.items() if _within(key, name) and _is_link(value)), None):
            found[key] = link
    return found


def _layers(composed: Composed) -> Iterator[tuple[str, list[str]]]:
    """(origin, the keys that it has), those that win first."""
    method, model = composed.choices.get("method"), composed.node.get("model")
    if method is not None and composed.command != "tune" and model is not None:
        file = users.tuned_file(method, str(model.get("name")))
        if file.is_file():
            yield TUNE, _keys(file, "method")
    if method is not None:
        file = catalog.conf_dir() / "tuned" / method / f"{composed.choices.get('model')}.yaml"
        if file.is_file():
            yield _told(file), _keys(file, "method")
    folders = _folders(composed.arguments)
    for group, option in composed.choices.items():
        for file in reversed(catalog.files_of(group, option, folders)):
            yield _told(file, folders), _keys(file, group)
    for name in (composed.command, "common"):
        file = catalog.conf_dir() / f"{name}.yaml"
        if file.is_file():
            yield _told(file), _keys(file)


def _keys(file: Path, group: str | None = None) -> list[str]:
    found = flatten(_plain(OmegaConf.load(file)))
    prefix = f"{group}." if group else ""
    return [f"{prefix}{key}" for key, value in found.items() if key.rpartition(".")[2] not in SKIPPED and value != {}]


def _told(file: Path, folders: Sequence[Path] = ()) -> str:
    """The file without the place where it is installed, or kept."""
    if file.is_relative_to(catalog.conf_dir()):
        return f"conf/{file.relative_to(catalog.conf_dir())}"
    return next((str(file.relative_to(folder)) for folder in folders if file.is_relative_to(folder)), file.name)


def _folders(arguments: Sequence[str]) -> list[Path]:
    """The folders of the user's own configurations."""
    apart = [Path(folder) for flag, folder in pairwise(arguments) if flag in ("--config-dir", "-cd")]
    return apart + [Path(text.partition("=")[2]) for text in arguments if text.startswith(("--config-dir=", "-cd="))]


def _plain(node: Any) -> dict[str, Any]:
    found = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_dict(node) else {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _within(key: str, other: str) -> bool:
    """Whether a key is the other one, or lies in the group of that name."""
    return f"{key}.".startswith(f"{other}.")


def _is_link(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("${")
