"""Command-line arguments on their way from Typer to Hydra, as plain text.

Imports nothing heavy: mistakes are answered at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

from edit_cli.errors import UsageError

WITH_VALUE = {"--config-dir", "-cd", "--cfg", "-c", "--package", "-p"}
ALONE = {"--multirun", "-m", "--resolve", "--info", "-i", "--hydra-help"}
# Free text, in which commas, braces and quotes mean themselves
TEXT_KEYS = {"edit.prompt", "edit.subject", "edit.target", "edit.target_true", "dataset.template"}
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def regroup(arguments: Sequence[str]) -> list[str]:
    """Flags first, then all overrides together, as Hydra's parser wants them; texts are quoted.

    Raises:
        UsageError: a flag that does not exist, or a word that is no KEY=VALUE.
    """
    flags: list[str] = []
    overrides: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        flag, equals, value = argument.partition("=")
        if flag in WITH_VALUE:
            if not equals and not waiting:
                raise UsageError(f"{flag} needs a value{'; try --cfg job' if flag in ('--cfg', '-c') else ''}")
            value = value if equals else waiting.pop(0)
            flags += [flag, _known_cfg(value) if flag in ("--cfg", "-c") else value]
        elif flag in ALONE and not equals:
            flags.append(flag)
            if flag in ("--info", "-i") and waiting and waiting[0] in INFO:
                flags.append(waiting.pop(0))
        elif argument.startswith("-"):
            raise UsageError(_unknown_flag(argument))
        else:
            overrides.append(_override(argument))
    if {"--cfg", "-c"} & set(flags) and "--resolve" not in flags:
        flags.append("--resolve")
    return flags + overrides


def override_key(override: str) -> str:
    """The key of `KEY=VALUE`, without the marks of Hydra's grammar (+, ++, ~) and without a package."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def _known_cfg(value: str) -> str:
    if value not in ("job", "hydra", "all"):
        raise UsageError(f"--cfg {value}: choose job (the settings of this command), hydra or all")
    return value


def _unknown_flag(argument: str) -> str:
    name, _, value = argument.lstrip("-").partition("=")
    if re.fullmatch(r"[A-Za-z][\w.-]*", name) and len(name) > 1:
        near = get_close_matches(f"--{name}", [*WITH_VALUE, *ALONE, "--help"], n=1)
        if near and not value:
            return f"there is no option {argument}; did you mean {near[0]}?"
        return (
            f"there is no option {argument}; settings are written without dashes:"
            f" {name.replace('-', '_')}={value or 'VALUE'}"
        )
    return f"there is no option {argument}; see --help"


def _override(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if argument.startswith("~"):
        return argument
    if not equals:
        raise UsageError(f"{argument!r} is no setting: write KEY=VALUE, such as method=memit or limit=50")
    if not key.strip("+ "):
        raise UsageError(f"{argument!r} names no setting: write KEY=VALUE, such as limit=50")
    return f"{key}={quoted(value)}" if key.lstrip("+") in TEXT_KEYS else argument


def quoted(text: str) -> str:
    """`text` as one literal value of Hydra's grammar, unless it is quoted already."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text
    # within quotes only the quote, and backslashes before one, have to be escaped
    escaped = re.sub(r"(\\*)(?='|$)", lambda found: found[1] * 2, text).replace("'", r"\'")
    return f"'{escaped}'"
