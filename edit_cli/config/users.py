"""Settings that a search found for the user: ~/.config/edit-cli/tuned/METHOD/MODEL.yaml. They stand above the packaged
ones and below the command line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from edit_cli.config.build import did_you_mean
from edit_cli.config.identity import flatten
from edit_cli.config.registry import TARGET
from edit_cli.errors import MissingError, UsageError


def tuned_file(method: str, model: str) -> Path:
    """Where the settings of a method for a model lie, be there some or not. model: `model.name`."""
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    name = re.sub(r"[^\w.=,+-]+", "_", model).strip("._") or "_"
    return Path(home).expanduser() / "edit-cli" / "tuned" / method / f"{name}.yaml"


def with_tuned(node: DictConfig, method: str | None, given: Collection[str]) -> Path | None:
    """Put what was found for the user into `node.method`, but for what the command line gives (`given`: dotted keys).

    The file, or None where there is none.

    Raises:
        MissingError: the file cannot be read. UsageError: it has a key that the method has not.
    """
    if method is None or OmegaConf.select(node, "method") is None:
        return None
    try:
        model = OmegaConf.select(node, "model.name", throw_on_missing=False)
    except OmegaConfBaseException:
        return None  # what is wrong with the model is told where it is made
    file = tuned_file(method, str(model))
    if model is None or not file.is_file():
        return None
    known = flatten(OmegaConf.to_container(node.method, resolve=False))  # type: ignore[arg-type]
    for key, value in flatten(_read(file)).items():
        if key not in known or TARGET in key:
            raise UsageError(
                f"{file}: method={method} has no key {key}{did_you_mean(key, known)}; correct or delete it"
            )
        if not any(_overlap(f"method.{key}", other) for other in given):
            OmegaConf.update(node, f"method.{key}", value)
    return file


def _read(file: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or "it is no YAML"
        raise MissingError(f"{file} cannot be read: {reason}; correct or delete it") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise MissingError(f"{file} holds no settings (KEY: VALUE, line by line): correct or delete it")
    return found


def _overlap(one: str, other: str) -> bool:
    """Whether one key is the other, or a group around it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def written(settings: Mapping[str, Any], comment: str) -> str:
    """A file of settings, {dotted key: value}, as `conf/tuned` has them."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *groups, name = key.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return f"# @package method\n{lines}{yaml.safe_dump(nested, sort_keys=False, default_flow_style=None)}"
