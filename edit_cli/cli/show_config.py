"""`show-config`: every setting of one option, with its default, what it is for and what it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from edit_cli.cli import help as help_texts
from edit_cli.cli.explain import explain
from edit_cli.cli.hydra_launch import plugins_of
from edit_cli.config import catalog, registry, source, users
from edit_cli.config.build import did_you_mean, register_resolvers
from edit_cli.config.overrides import override_key, unknown_flag
from edit_cli.config.schema import Key, keys
from edit_cli.errors import UsageError

KINDS = (*catalog.GROUPS.values(), "protocol", "stats")
COMMANDS = {"protocol": "sequential"}  # that compose a kind, where `evaluate` does not


def run(what: str, overrides: Sequence[str], as_json: bool) -> int:
    """Print the settings of KIND/NAME; of a method, its name is enough.

    Raises:
        UsageError: there is no such kind, or option.
    """
    for flag in (override for override in overrides if override.startswith("-")):
        raise UsageError(unknown_flag(flag, ("--json", "--help")))
    registry.admit(plugins_of(overrides))
    group, slash, option = what.rpartition("/")
    group = group if slash else "stats" if what == "stats" else "method"
    if group not in KINDS:
        raise UsageError(f"{what}: there is no such kind{did_you_mean(group, KINDS)}")
    if as_json:
        typer.echo(json.dumps([vars(key) for key in described(group, option, overrides)], indent=2, default=str))
    else:
        typer.echo("\n".join(section(group, option, overrides)).rstrip())
    return 0


def of_command(command: str, group: str, option: str, overrides: Sequence[str]) -> list[str]:
    """The settings of an option that a command's overrides choose, be it packaged or of a plug-in; nothing of one that
    is unknown.
    """
    registry.admit(plugins := plugins_of(overrides))
    if option not in [entry.name for entry in catalog.entries(group)]:
        return []
    return section(group, option, [f"plugins=[{','.join(plugins)}]"] if plugins else [], command)


def section(group: str, option: str, overrides: Sequence[str], command: str | None = None) -> list[str]:
    """The settings of an option as help shows them."""
    summary = next((entry.summary for entry in catalog.entries(group) if entry.name == option), "")
    title = f"Settings of {group}={option}" if option != group else f"Settings of {group}"
    lines = [*help_texts.wrapped(summary), ""] if summary else []
    found, tuned = _composed(group, option, overrides, command)
    note = [*help_texts.wrapped(f"With what tune found for this model: {tuned}"), ""] if tuned else []
    return [*lines, *note, *help_texts.settings(title, found)]


def described(group: str, option: str, overrides: Sequence[str], command: str | None = None) -> Iterator[Key]:
    """The settings of an option as a command composes it, before anything is filled in.

    Without a model among the overrides, the settings are those of no model in particular.

    Raises:
        UsageError: there is no such option, or it names no class of settings.
    """
    return _composed(group, option, overrides, command)[0]


def _composed(
    group: str, option: str, overrides: Sequence[str], command: str | None
) -> tuple[Iterator[Key], Path | None]:
    """(settings, the file of what tune found, if it stands in them). Raises as `described`."""
    chosen = [] if group == "stats" else [f"{group}={option}"]
    if group != "model" and not any(override.startswith("model=") for override in overrides):
        chosen.append("model=hf")
    register_resolvers()
    command = command or COMMANDS.get(group, "evaluate")
    try:
        with initialize_config_module("edit_cli.conf", version_base="1.3"):
            whole = compose(command, [*chosen, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, command, [*chosen, *overrides]) from None
    given = [key for override in overrides if (key := override_key(override)).startswith("method.")]
    tuned = users.with_tuned(whole, option, given) if group == "method" else None
    node = whole[group]
    values: Any = OmegaConf.to_container(node, resolve=False)
    cls = source.class_of(values.get(source.TARGET)) if isinstance(values, dict) else None
    if cls is None:
        raise UsageError(f"{group}={option} names no class of settings")
    return keys(cls, f"{group}.", {str(key): value for key, value in values.items()}), tuned
