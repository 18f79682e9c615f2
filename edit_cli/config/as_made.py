"""The settings that a saved edit was made with, taken from its file as far as a file may say them.

A file may come from anywhere. It names a packaged method and gives plain values, which are held against the method's
fields as those of the command line are; whatever names a place, a class or the environment comes from the user.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from edit_cli.config import catalog, registry
from edit_cli.config.build import target_class
from edit_cli.config.composed import PLACES, composed
from edit_cli.config.overrides import override_key
from edit_cli.config.schema import Mark, hints, linked, marks, part_of
from edit_cli.errors import MissingError, UsageError

UNSAFE = re.compile(r"\$\{")


def method_node(
    told: Mapping[str, Any], model: Mapping[str, str], values: Mapping[str, Any], given: Sequence[str], file: Path
) -> DictConfig:
    """The configuration of a method as an edit tells it.

    Args:
        told: `method` of the edit's manifest: name and settings.
        model: {"model": option}.
        values: settings of that option.
        given: the user's own KEY=VALUE, which count most.
        file: the manifest, for messages.

    Raises:
        UsageError: a setting that this version does not take, or one that only the user can give; says which.
        MissingError: the file names no method of this version, or has what no file may have.
    """
    if UNSAFE.search(str(told)):
        raise MissingError(f"{file} is damaged: method holds ${{…}}; make the edit again")
    chosen = next((text.partition("=")[2] for text in given if override_key(text) == "method"), told.get("name"))
    known = [entry.name for entry in catalog.entries("method")]
    if chosen not in known:
        raise MissingError(f"{file}: made by {chosen}, which is no method here: give method=NAME, and its settings")
    own = [text for text in given if override_key(text) != "method"]
    whole = composed("edit", {"method": chosen, **model}, values, own)
    node, keys = whole.node, {override_key(text) for text in own}
    if chosen == told.get("name"):
        cls = target_class(node.method)
        for key, value, hint in _settings(getattr(cls, "Config", cls), told, "method", node, file):
            if key in keys or key.partition(".")[0] in keys:
                continue
            if Mark.FILE in marks(hint):
                if value is not None and value != OmegaConf.select(node, key):
                    raise UsageError(f"{file}: {key} named a file that an edit cannot name: give {key}=FILE")
                continue
            OmegaConf.update(node, key, value)
    return node.method


def _settings(
    cls: type, told: Mapping[str, Any], at: str, node: DictConfig, file: Path
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, what the file says, annotation) of the settings of a class that the file has and may say."""
    for field in fields(cls):  # type: ignore[arg-type]
        if not field.init or field.name not in told or field.name in PLACES:
            continue
        hint, value, key = hints(cls)[field.name], told[field.name], f"{at}.{field.name}"
        part = part_of(hint)
        if part is None or not isinstance(value, Mapping):
            yield key, value, hint
            continue
        link = re.fullmatch(r"\$\{([\w.]+)\}", linked(hint) or "")
        key = link[1] if link else key
        if not inspect.isabstract(part):
            yield from _settings(part, value, key, node, file)
            continue
        here = OmegaConf.to_container(OmegaConf.select(node, key), resolve=True)
        if _plain(value) != _plain(registry.without_paths(here)):
            name = field.name
            raise UsageError(f"{file}: made with another {name} than the model's own: give {name}=NAME, as it was then")


def _plain(part: Mapping[str, Any]) -> dict[str, Any]:
    """What a part says but for places."""
    return {key: value for key, value in part.items() if key not in PLACES and key != "path"}
