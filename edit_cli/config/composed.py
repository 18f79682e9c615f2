"""One command's configuration as Hydra composed it, on its way to typed objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from edit_cli.config import catalog
from edit_cli.config.build import build, plain_containers, register_resolvers, settings, target_class
from edit_cli.config.identity import flatten
from edit_cli.config.source import TARGET, with_defaults
from edit_cli.errors import UsageError

PLACES = ("checkpoint", "trained_on", "cache_dir", "hub", "defaults", TARGET)  # keys that tell no method from another


@dataclass(frozen=True)
class Composed:
    """What Hydra hands over, and what its run directory is called by.

    choices: the option of each group, such as {"method": "memit"}. tag: the user's, or made of what a sweep varies.
    plugins: packages that the command line names. given: keys of the method that the command line gives. overrides: all
    that it gives to this job, as Hydra reads them. arguments: what was typed.
    """

    command: str
    node: DictConfig
    choices: dict[str, str]
    tag: str | None = None
    in_sweep: bool = False
    plugins: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()

    @cached_property
    def settings(self) -> Any:
        """The typed top. Raises UsageError."""
        return settings(self.node)

    def part(self, group: str) -> Any:
        """The typed object of a group. Raises UsageError."""
        return build(self.node[group])

    def class_of(self, group: str) -> type:
        """The class that a group names. Raises UsageError."""
        return target_class(self.node[group])

    def has(self, key: str) -> bool:
        """Whether there is a value under a dotted key."""
        return OmegaConf.select(self.node, key, throw_on_missing=False) is not None

    def lacks(self, key: str) -> bool:
        """Whether a dotted key waits for a value that must be given."""
        group, _, name = key.rpartition(".")
        return OmegaConf.is_missing(OmegaConf.select(self.node, group), name)

    def fill(self, group: str, values: Mapping[str, Any]) -> None:
        """Give values, by dotted key, to settings of a group that wait for one."""
        for key, value in values.items():
            if self.lacks(f"{group}.{key}"):
                OmegaConf.update(self.node, f"{group}.{key}", value)

    def is_linked(self, key: str) -> bool:
        """Whether a value at the top comes from another key."""
        return OmegaConf.is_interpolation(self.node, key)

    @cached_property
    def plain(self) -> dict[str, Any]:
        """The resolved configuration as dicts and lists; values that nothing needed stay `???`."""
        return plain_containers(self.node)

    def departures(self, group: str) -> dict[str, Any]:
        """{dotted key: value as written} of a group's settings that are not the packaged ones. Empty for an option of
        the user's own.
        """
        packaged = _flat(_packaged(group, self.choices[group], self.choices.get("model", "")))
        own = _flat(self.node[group])
        return {key: value for key, value in own.items() if key in packaged and packaged[key] != value}


def composed(
    command: str, choices: Mapping[str, str], values: Mapping[str, Any], overrides: Sequence[str] = ()
) -> Composed:
    """What a command would be given by `{group: option}` and `{dotted key: value}`, and by KEY=VALUE as they are typed.

    Raises:
        UsageError: there is no such option or key, or one cannot be read.
    """
    register_resolvers()
    with _composing():
        try:
            node = compose(command, [*(f"{group}={option}" for group, option in choices.items()), *overrides])
        except MissingConfigException as error:
            raise UsageError(f"{error.missing_cfg_file} is no option: `edit-cli ls` shows what there is") from None
        except (HydraException, OmegaConfBaseException) as error:
            raise UsageError(f"{' '.join(overrides)}: {str(error).strip().splitlines()[0]}") from None
    for key, value in values.items():
        try:
            OmegaConf.update(node, key, value)
        except (ConfigKeyError, ConfigAttributeError):
            raise UsageError(f"unknown key {key}") from None
    return Composed(command, node, dict(choices))


@contextmanager
def _composing() -> Iterator[None]:
    """Hydra's `compose` for the block, also within a job that Hydra runs."""
    around = GlobalHydra.instance()
    kept, around.hydra = around.hydra, None
    try:
        with initialize_config_module("edit_cli.conf", version_base="1.3"):
            yield
    finally:
        around.hydra = kept


def packaged_option(group: str, option: str) -> Any:
    """The typed object of a packaged option, as `evaluate` composes it."""
    register_resolvers()
    with _composing():
        return build(compose("evaluate", [f"{group}={option}"])[group])


def model_called(name: str, values: Mapping[str, Any]) -> Any:
    """The options of a packaged model, or of one in a folder or on the hub. values: of other keys of `model`.

    Raises:
        UsageError: there is no such key, or it takes another value.
    """
    given = {f"model.{key}": value for key, value in values.items()}
    packaged = name in catalog.names("model")
    if not packaged:
        given["model.id"] = name
    return composed("edit", {"model": name if packaged else "hf"}, given).part("model")


def _packaged(group: str, option: str, model: str) -> DictConfig:
    """The packaged option with what is published for the model."""
    files = [*catalog.files_of(group, option), catalog.conf_dir() / "tuned" / option / f"{model}.yaml"]
    if group != "method":
        files.pop()
    return with_defaults(OmegaConf.merge(*(OmegaConf.load(file) for file in files if Path(file).is_file()), {}))


def _flat(node: Any) -> dict[str, Any]:
    """{dotted key: value as it is written, interpolations included}, without places."""
    found = OmegaConf.to_container(node, resolve=False)
    flat = flatten({str(key): value for key, value in found.items()}) if isinstance(found, dict) else {}
    return {key: value for key, value in flat.items() if key not in PLACES}
