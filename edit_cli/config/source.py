"""Where Hydra reads configuration files: those of the package and of the user, with the defaults of the class that each
names under what it says itself. So a default stands in one place, beside the field that it is the default of.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from edit_cli.config import catalog
from edit_cli.config.schema import UNSET, Config, defaults

TARGET = "_target_"


class FilesWithDefaults(FileConfigSource):
    """A folder of YAML files whose `_target_` brings its defaults along."""

    @staticmethod
    def scheme() -> str:
        return "edit-cli"

    def load_config(self, config_path: str) -> ConfigResult:
        found = super().load_config(config_path)
        found.config = with_defaults(found.config)
        return found


class OurFolders(SearchPathPlugin):
    """Puts the package's configurations in front of all others."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.prepend("edit-cli", f"{FilesWithDefaults.scheme()}://{catalog.conf_dir()}")


def register() -> None:
    """Let Hydra know of these, once a process."""
    plugins = Plugins.instance()
    for plugin in (FilesWithDefaults, OurFolders):
        if plugin not in plugins.discover(plugin.__mro__[1]):
            plugins.register(plugin)


def with_defaults(config: Any) -> DictConfig:
    """The configuration with the defaults of the classes that it and its parts name."""
    if not OmegaConf.is_dict(config) or config._is_none() or config._is_missing() or config._is_interpolation():
        return config
    for key in config:
        child = config._get_node(key)
        if isinstance(child, DictConfig):
            config._set_item_impl(key, with_defaults(child))
    node = config._get_node(TARGET)
    cls = settings_of(node._value()) if node is not None else None
    if cls is None:
        return config
    merged = OmegaConf.merge(OmegaConf.create(defaults(cls)), config)
    for key in config:
        if OmegaConf.is_missing(config, key):  # merging would leave the default
            merged._set_item_impl(key, UNSET)
    return merged


def settings_of(target: Any) -> type | None:
    """The class of settings that belongs to a `_target_`: its own, or that of the method that it names. None where
    there is none, which whoever builds it will say.
    """
    found = class_of(target)
    return found if found is not None and issubclass(found, Config) else None


def class_of(target: Any) -> type | None:
    """The dataclass of this package that holds the keys of a `_target_`, if there is one."""
    if not str(target).startswith("edit_cli."):
        return None
    try:
        found = catalog.class_at(str(target))
    except (ImportError, AttributeError):
        return None
    found = getattr(found, "Config", found)
    return found if isinstance(found, type) and is_dataclass(found) else None
