"""Where Hydra reads configuration files: those of the package and of the user, with the defaults of the class that each
names under what it says itself. So a default stands in one place, beside the field that it is the default of.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from edit_cli.config import catalog, registry
from edit_cli.config.registry import TARGET
from edit_cli.config.schema import UNSET, Config, defaults
from edit_cli.errors import UsageError


class FilesWithDefaults(FileConfigSource):
    """A folder of YAML files whose `_target_` brings its defaults along."""

    @staticmethod
    def scheme() -> str:
        return "edit-cli"

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self.plugins = registry.admitted()  # what the workers of a sweep have to be told

    def load_config(self, config_path: str) -> ConfigResult:
        registry.admit(self.plugins)
        found = super().load_config(config_path)
        found.config = with_defaults(found.config)
        return found


class PluginOptions(ConfigSource):
    """What plug-ins bring, as options of their groups: no file is needed where the defaults of the class will do."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self.plugins = registry.admitted()

    @staticmethod
    def scheme() -> str:
        return "edit-cli-plugins"

    def load_config(self, config_path: str) -> ConfigResult:
        registry.admit(self.plugins)
        group, name = self._split(config_path)
        target = catalog.plugin(group, name).value.replace(":", ".")
        named = {"name": name} if group == "dataset" else {}
        config = with_defaults(OmegaConf.create({TARGET: target, **named}))
        return ConfigResult(self.provider, f"{self.scheme()}://{config_path}", config, {"package": None})

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path in catalog.FROM_PLUGINS

    def is_config(self, config_path: str) -> bool:
        group, name = self._split(config_path)
        return name in self.list(group, None)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        registry.admit(self.plugins)
        return sorted({entry.name for entry in catalog.plugins(config_path)})

    @staticmethod
    def _split(config_path: str) -> tuple[str, str]:
        group, _, name = config_path.removesuffix(".yaml").partition("/")
        return group, name


class OurFolders(SearchPathPlugin):
    """Puts the package's configurations in front of all others, and what plug-ins bring behind them."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.prepend("edit-cli", f"{FilesWithDefaults.scheme()}://{catalog.conf_dir()}")
        search_path.append("plugins", f"{PluginOptions.scheme()}://")


def register() -> None:
    """Let Hydra know of these, once a process."""
    plugins = Plugins.instance()
    for plugin in (FilesWithDefaults, PluginOptions, OurFolders):
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
    merged: Any = OmegaConf.merge(OmegaConf.create(defaults(cls)), config)
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
    """The dataclass of this package, or of a plug-in, that holds the keys of a `_target_`, if there is one."""
    try:
        found = registry.target(str(target), TARGET)
    except (ImportError, UsageError):
        return None
    found = getattr(found, "Config", found)
    return found if isinstance(found, type) and is_dataclass(found) else None
