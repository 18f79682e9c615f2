"""From Hydra's nodes to typed objects: nothing below sees a node."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path, PurePath
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from edit_cli.config import catalog, registry, schema, source
from edit_cli.config.schema import Config, SettingError, is_text, is_texts, part_of, plain_options, shown
from edit_cli.errors import UsageError


def register_resolvers() -> None:
    """`${corpus_config:NAME}`: the packaged corpus of that name. Models name theirs, and a defaults list cannot look
    there. `${last_part:ID}`: what a folder or a hub id is called.
    """

    def corpus_config(name: str) -> DictConfig:
        if name not in catalog.names("corpus"):
            raise ValueError(f"model.corpus={name} names no packaged corpus: choose one by corpus=NAME")
        return source.with_defaults(OmegaConf.load(catalog.conf_dir() / "corpus" / f"{name}.yaml"))

    def last_part(model_id: str) -> str:
        return PurePath(model_id).name.removeprefix("embedded:") or Path(model_id).resolve().name

    source.register()
    OmegaConf.register_new_resolver("corpus_config", corpus_config, replace=True)
    OmegaConf.register_new_resolver("last_part", last_part, replace=True)


UNPUBLISHED = "because nothing is published"
GROUPS = ("method", "model", "dataset", "protocol", "stats", "edit", "splits")


def settings(config: DictConfig) -> Any:
    """What stands at the top of a command's configuration, as the class that it names.

    Raises:
        UsageError: a setting of the wrong type, or one value in the place of a group.
    """
    values = schema.hints(target_class(config))  # what is a group elsewhere may be one value of this command
    for group in GROUPS:
        if group not in config or (group in values and part_of(values[group]) is None):
            continue
        if not isinstance(value := _value(config, group, group), DictConfig):
            raise UsageError(f"{group}={value}: this is a group of settings, not one value")
    return build(config, partly=True)


def build(node: DictConfig, kind: type | None = None, *, partly: bool = False) -> Any:
    """The object that a node of the configuration describes; parts with a `_target_` of their own are built first.

    kind: the dataclass to make where the node names none. Only classes of this package and of plug-ins are
    made. partly: the node holds more than the object's fields.

    Raises:
        UsageError: an unknown key, a value of the wrong type, or one that is missing; names the key in full.
    """
    cls = target_class(node) if node.get("_target_") is not None else kind
    if cls is None or inspect.isabstract(cls):
        raise UsageError(
            f"{_path(node)} names no _target_: choose one of the packaged options, or add the line to your file"
        )
    return made_of(node, cls, partly)


def made_of(node: DictConfig, cls: type, partly: bool = False) -> Any:
    """An object of that class, whatever class the node names; else as `build`."""
    hints = get_type_hints(cls, include_extras=True)
    known = {field.name: field for field in fields(cls) if field.init}
    made: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    waiting = ""  # for a value that must be given: what is wrong is told first
    for key in node:
        if key == "_target_":
            continue
        path = _path(node, key)
        if key not in known:
            if partly:
                continue
            raise UsageError(f"unknown key {path}{did_you_mean(str(key), known)}")
        if OmegaConf.is_missing(node, key):
            waiting = waiting or path
            continue
        value = _value(node, key, path)
        part = part_of(hints[key])
        if isinstance(value, DictConfig) and ("_target_" in value or part):
            made[key] = build(value, part)
        elif part and not (value is None and NoneType in get_args(_bare(hints[key]))):
            raise UsageError(f"{path}={value}: this is a group of settings, not one value")
        else:
            plain[key] = value
    made |= {key: _read(_contained(value), hints[key]) for key, value in plain.items()}
    if waiting:
        _refuse_wrong(cls, made, node)
        raise UsageError(_missing(waiting))
    lacking = [
        name
        for name, field in known.items()
        if name not in made and field.default is MISSING and field.default_factory is MISSING
    ]
    if lacking:
        raise UsageError(f"{_path(node, lacking[0])} has no value: give {_path(node, lacking[0])}=VALUE")
    try:
        built = cls(**made)  # what a class itself refuses, it explains better
    except SettingError as error:
        raise error.at(str(node._get_full_key(None) or "")) from None
    return built


def _refuse_wrong(cls: type, made: dict[str, Any], node: DictConfig) -> None:
    """Refuse what of the values that are there a field does not take."""
    if issubclass(cls, Config):
        for key, value in made.items():
            try:
                schema.checked(cls, key, value)
            except SettingError as error:
                raise error.at(str(node._get_full_key(None) or "")) from None


def _read(value: Any, hint: Any) -> Any:
    """A value as a field takes it where a file, or the environment, wrote it otherwise: 3 where text is wanted, and
    "3" where a number is.
    """
    if isinstance(value, list) and is_texts(hint):
        return [_read(part, str) for part in value]
    if isinstance(value, bool | int | float) and is_text(hint):
        return shown(value)
    if isinstance(value, str) and not is_text(hint) and str not in plain_options(hint):
        with suppress(ValueError):
            return json.loads(value)
    return value


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _contained(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, (DictConfig, ListConfig)) else value


def target_class(node: DictConfig) -> type:
    """The dataclass that a node names by `_target_`. Raises UsageError if there is none, here or in a plug-in."""
    target, key = str(node.get("_target_")), f"{_path(node)}._target_"
    cls = registry.target(target, key)
    if not (is_dataclass(cls) or hasattr(cls, "Config")):
        raise UsageError(f"{key}={target}: there is no such class of settings in this version")
    return cls


def plain_containers(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration as files hold it: dicts and lists, classes by their names; values that nothing needed
    stay `???`.
    """
    try:
        return registry.without_paths(OmegaConf.to_container(config, resolve=True))
    except InterpolationResolutionError as error:
        raise UsageError(_interpolation(error)) from None


def did_you_mean(
    word: str, known: Sequence[str] | Mapping[str, Any], choices: str = "there are", listed_by: str = ""
) -> str:
    """The end of a message about an unknown name: what it may have meant, else all there is, or the command that lists
    what would fill a screen.
    """
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; `{listed_by}` lists them" if listed_by else f"; {choices}: {', '.join(map(str, known))}"


def _value(node: DictConfig, key: str, path: str) -> Any:
    try:
        if OmegaConf.is_missing(node, key):
            raise UsageError(_missing(path))
        return node[key]
    except InterpolationResolutionError as error:
        raise UsageError(_interpolation(error)) from None


def _missing(path: str) -> str:
    """What a value of `???` means to a user; methods get theirs from the published settings of a model."""
    remedy = f"give {path}=VALUE"
    if path.startswith("method."):
        return f"{path} has no value, {UNPUBLISHED} for this method on this model: {remedy}"
    return f"{path} has no value: {remedy}"


def _path(node: DictConfig, key: Any = None) -> str:
    """The key's full name, as it is written on the command line."""
    return str(node._get_full_key(key)) or "the configuration"


def _interpolation(error: InterpolationResolutionError) -> str:
    first = str(error).splitlines()[0]
    if found := re.search(r"Missing mandatory value: (\S+)", first):
        return f"{found[1]} has no value: give {found[1]}=VALUE"
    cause = re.sub(r"^\w+ raised while resolving interpolation: ", "", first)
    return f"{error.full_key}: {cause}" if error.full_key else cause
