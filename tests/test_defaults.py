"""A default, its sentence and its bounds are written once: what Python takes, the command line takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

from edit_cli.cli.help import CONFIGURED
from edit_cli.config import catalog, sketch, source
from edit_cli.config.build import register_resolvers, settings
from edit_cli.config.schema import Config, default_of, documented, hints, keys, linked

OPTIONS = [(group, name) for group in (*catalog.GROUPS.values(), "protocol") for name in catalog.names(group)]
COMPOSED = [(group, name) for group, name in OPTIONS if group != "model" or name in ("hf", "tiny-gpt2", "gpt2-xl")]
# whose values come from what is chosen, so that no constant can say them
CHOSEN = {"limit", "records", "corpus", "trained_on", "layers"}


@cache
def composed(command: str, *overrides: str) -> DictConfig:
    register_resolvers()
    with hydra.initialize_config_module("edit_cli.conf", version_base="1.3"):
        return hydra.compose(command, list(overrides))


def of(group: str, option: str) -> tuple[type, DictConfig]:
    """The class of an option, and what the command line makes of it where nothing is given for a model."""
    more = () if group == "model" else ("model=hf", "model.id=any")
    node = composed("sequential" if group == "protocol" else "evaluate", f"{group}={option}", *more)[group]
    cls = source.settings_of(node._target_)
    if cls is None:
        pytest.skip("not converted")
    return cls, node


def stated(group: str, option: str) -> dict[str, Any]:
    """What the option's own files say."""
    said: Any = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.load, catalog.files_of(group, option))))
    return said


def differing(cls: type, values: dict[str, Any], node: DictConfig, said: dict[str, Any]) -> Iterator[str]:
    """Keys whose value on the command line is not Python's default, though no file says so."""
    for name, default in values.items():
        hint = hints(cls)[name]
        if isinstance(default, Config):
            if linked(hint) is None:
                yield from differing(type(default), vars(default), node[name], said.get(name, {}))
        elif name not in said and name not in CHOSEN and plain(node, name) != listed(default):
            yield f"{cls.__name__}.{name}"


def plain(node: DictConfig, name: str) -> Any:
    value = "???" if OmegaConf.is_missing(node, name) else node[name]
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def listed(value: Any) -> Any:
    return "???" if value is MISSING else list(value) if isinstance(value, tuple) else value


@pytest.mark.thin(2)
@pytest.mark.parametrize(("group", "option"), COMPOSED)
def test_python_and_the_command_line_agree(group, option):
    cls, node = of(group, option)
    values = {field.name: default_of(field) for field in fields(cls) if field.init}
    assert list(differing(cls, values, node, stated(group, option))) == []


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_no_file_repeats_a_default(group, option):
    cls = source.settings_of(catalog.target_of(group, option)) or pytest.skip("not converted")
    said: Any = OmegaConf.to_container(OmegaConf.load(catalog.conf_dir() / group / f"{option}.yaml"))
    if "defaults" in said:  # a variant departs from another option, not from the class
        return
    by_name = {field.name: default_of(field) for field in fields(cls)}
    assert [key for key, value in said.items() if key in by_name and listed(by_name[key]) == value] == []


@pytest.mark.parametrize(("group", "option"), COMPOSED)
def test_every_setting_says_what_it_is_for(group, option):
    cls = source.settings_of(catalog.target_of(group, option)) or pytest.skip("not converted")
    assert [key.name for key in keys(cls) if not key.sentence.endswith((".", ")"))] == []


@pytest.mark.parametrize("method", catalog.names("method"))
def test_completion_knows_the_settings_of_every_method(method):
    """It reads them off the source text; here the class itself is asked."""
    target = catalog.target_of("method", method) or ""
    cls = source.settings_of(target) or pytest.skip("not converted")
    sketched = {name.partition(".")[0] for name in sketch.keys(target, "")}
    assert sketched == {key.name.partition(".")[0] for key in keys(cls)}


@pytest.mark.parametrize("command", CONFIGURED)
def test_the_top_of_a_command_is_what_its_class_says(command):
    more = ("edit.prompt=a", "edit.target=b") if command == "edit" else ()
    found = settings(composed(command, *more))
    cls: type = type(found)
    for field in fields(found):
        assert field.name in documented(cls)
        if field.name not in CHOSEN | {"edit"}:
            assert getattr(found, field.name) == default_of(field)
