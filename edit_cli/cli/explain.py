"""What Hydra and OmegaConf complain about, in terms of what was typed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from edit_cli.config import catalog, source
from edit_cli.config.build import did_you_mean
from edit_cli.config.overrides import override_key
from edit_cli.errors import UsageError


def explain(error: Exception, command: str, overrides: Sequence[str]) -> UsageError:
    """What Hydra or OmegaConf complain about, in terms of what was typed."""
    text = str(error)
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if isinstance(error, MissingConfigException):
        return UsageError(_missing_option(text, first))
    if isinstance(error, OverrideParseException):
        wrong = next((override for override in overrides if not _parses(override)), None)
        if wrong and (unknown := _unknown(override_key(wrong), command, overrides)):
            return UsageError(unknown)
        named = f"cannot read {wrong}" if wrong else f"cannot read the settings ({first})"
        return UsageError(
            f"{named}: quote texts with special characters, such as 'key=\"a, b\"', and close every bracket"
        )
    if first.startswith("Config group override must be a string"):
        wrong = next((override for override in overrides if _is_no_option(override)), "an override")
        return UsageError(f"{wrong} names no option: groups take names, such as method=memit")
    if found := re.search(r"Ambiguous value for argument '(.+?)'", text):
        if unknown := _unknown(override_key(found[1]), command, overrides):
            return UsageError(unknown)
        return UsageError(
            f"{found[1]} gives several values: add -m to run them one after another, or write a list: key=[a,b]"
        )
    if found := re.match(r"Could not override '(.+?)'", first):
        return UsageError(unknown_key(found[1].partition("@")[0], command, overrides))
    if found := re.match(r"Could not append to config\. An item is already at '(.+?)'", first):
        return UsageError(f"+{found[1]}: that setting exists already; write {found[1]}=VALUE without the +")
    if found := re.match(r"Could not delete from config\. '(.+?)' does not exist", first):
        return UsageError(unknown_key(found[1], command, overrides))
    return UsageError(first)


def _missing_option(text: str, first: str) -> str:
    found = re.search(r"Could not find '((?:hydra/)?[^/']+)/([^']*)'", text)
    if not found:
        return first
    group, option = found[1], found[2]
    if option.startswith("submitit"):
        return f"{group}={option} needs another package: pip install 'edit-cli[submitit]'"
    listed = re.search(r"Available options in '.*?':\n((?:\t.+\n?)+?)(?:Config search path|$)", text)
    known = listed[1].split() if listed else catalog.names(group)
    return f"{group}={option}: there is no such {group}{did_you_mean(option, known)}"


def _unknown(key: str, command: str, overrides: Sequence[str]) -> str | None:
    """What is said of a key that there is not, be its value as it may; None of one that there is."""
    readable = [override for override in overrides if _parses(override)]
    known = _known_keys(command, readable)
    return None if key in known or key.startswith("hydra") else unknown_key(key, command, readable)


def unknown_key(key: str, command: str, overrides: Sequence[str]) -> str:
    """Names beside it come first, then all, so that `lmit` is `limit` and `layers` is `method.layers`."""
    every = _known_keys(command, overrides)
    known = [name for name in every if name != key]
    parent, _, name = key.rpartition(".")
    if key == "protocol":
        return f"{command} has one protocol, so there is none to choose: its settings are protocol.KEY=VALUE"
    if key in every and any(override_key(text) == parent and "," in text for text in overrides):
        return f"unknown key {key}: not every {parent} of the sweep has it; sweep those that do by themselves"
    if 1 <= len(owners := _options_with(parent, name)) <= 3:
        return f"unknown key {key} here; it belongs to {' and '.join(f'{parent}={owner}' for owner in owners)}"
    beside = [name for name in known if name.rpartition(".")[0] == parent]
    for names in (beside, known, [name for name in known if name.rpartition(".")[2] == key]):
        if "did you mean" in (near := did_you_mean(key, names)):
            return f"unknown key {key}{near}"
    return f"unknown key {key}{did_you_mean(key, beside or [name for name in known if '.' not in name])}"


def _options_with(group: str, key: str) -> list[str]:
    """Options of a group (`method`, `protocol`, …) whose own file has that key."""
    files = sorted((catalog.conf_dir() / group).glob("*.yaml")) if group and "." not in group else []
    with_keys = ((file.stem, source.with_defaults(OmegaConf.load(file)).keys()) for file in files)
    return [option for option, keys in with_keys if key in keys]  # `in` the node denies a key that waits for its value


def _known_keys(command: str, overrides: Sequence[str]) -> list[str]:
    """Keys of the command with the chosen options (the first of several), and the groups: enough to guess what a
    misspelled one was.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    chosen = [
        text.partition(",")[0] for text in overrides if override_key(text) in (*catalog.GROUPS.values(), "protocol")
    ]
    chosen += [text for text in overrides if override_key(text) == "hydra.searchpath"]
    for choices in (chosen, []):
        GlobalHydra.instance().clear()
        try:
            with hydra.initialize_config_module("edit_cli.conf", version_base="1.3"):
                return _flat(hydra.compose(command, choices))
        except (HydraException, OmegaConfBaseException):
            continue  # an option of the user's own, or one that does not exist
    return list(catalog.GROUPS.values())


def _flat(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in map(str, config):
        node = config._get_node(key)
        keys.append(f"{prefix}{key}")
        if (
            isinstance(node, DictConfig)
            and not node._is_interpolation()
            and not node._is_missing()
            and not node._is_none()
        ):
            keys += _flat(node, f"{prefix}{key}.")
    return [key for key in keys if not key.endswith("_target_")]


def _parses(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _is_no_option(override: str) -> bool:
    """Whether it gives a group, or a package of one, something that is no name."""
    key, _, value = override.lstrip("+").partition("=")
    return (
        "." not in key
        and ("@" in key or key in (*catalog.GROUPS.values(), "protocol"))
        and not re.match("[A-Za-z]", value.removeprefix("null"))
    )
