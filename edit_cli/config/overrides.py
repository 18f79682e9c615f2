"""Command-line arguments on their way from Typer to Hydra, as plain text.

Imports nothing heavy: mistakes are answered at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from enum import Enum
from types import MappingProxyType
from typing import Any

from edit_cli.config.schema import Mark, is_text, is_texts, marks
from edit_cli.errors import UsageError

WITH_VALUE = {"--config-dir", "-cd", "--cfg", "-c", "--package", "-p"}
SINGLE = {"--multirun", "-m", "--resolve", "--info", "-i", "--hydra-help"}
MULTIRUN = {"-m", "--multirun"}
RETRY = "--retry-failed"
FLAGS = (*WITH_VALUE, *SINGLE, "--help", "--dry-run", "--out", RETRY)
FUNCTION = re.compile(
    r"(bool|choice|extend_list|float|glob|int|interval|json_str|range|shuffle|sort|str|tag)\(.*\)", re.DOTALL
)
QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
NO_WORDS = ("true", "false", "nan", "inf", "null")  # of Hydra's grammar
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


Kinds = Mapping[str, "Kind"]


class Kind(Enum):
    """Settings whose values are taken as typed, but for null, ${…} and, in a sweep, commas between values."""

    TEXT = "text"
    FILE = "a file or a folder: a leading ~ is filled in"
    TEXTS = "a list of texts"
    SENTENCE = "text of which every character is part"


def kind_of(hint: Any) -> Kind | None:
    """How a field is typed, by its annotation; None where Hydra's grammar tells."""
    if is_texts(hint):
        return Kind.TEXTS
    if not is_text(hint):
        return None
    found = marks(hint)
    return Kind.SENTENCE if Mark.SENTENCE in found else Kind.FILE if Mark.FILE in found else Kind.TEXT


def regroup(arguments: Sequence[str], kinds: Kinds = MappingProxyType({})) -> list[str]:
    """Flags first, then all overrides together, as Hydra's parser wants them; texts are quoted. `--dry-run` and
    `--out FILE` are settings, too; of `--retry-failed`, which says what is left out of a sweep, Hydra does not hear.

    kinds: of settings that hold text, by dotted key.

    Raises:
        UsageError: a flag that does not exist, or a word that is no KEY=VALUE.
    """
    flags: list[str] = []
    overrides: list[str] = []
    waiting, sweeps = list(arguments), not MULTIRUN.isdisjoint(arguments)
    while waiting:
        argument = waiting.pop(0)
        flag, equals, value = argument.partition("=")
        if flag in WITH_VALUE:
            if not equals and not waiting:
                raise UsageError(f"{flag} needs a value{'; try --cfg job' if flag in ('--cfg', '-c') else ''}")
            value = value if equals else waiting.pop(0)
            flags += [flag, _flag_value(flag, value)]
        elif flag in SINGLE and not equals:
            flags.append(flag)
            if flag in ("--info", "-i") and waiting and waiting[0] in INFO:
                flags.append(waiting.pop(0))
        elif argument == RETRY:
            if not sweeps:
                raise UsageError(f"{RETRY} goes with -m: it runs those jobs of a sweep again that have failed")
        elif argument == "--dry-run":
            overrides.append("dry_run=true")
        elif flag == "--out":
            if not equals and not waiting:
                raise UsageError("--out needs a file: --out FILE")
            overrides.append(_override(f"out={value if equals else waiting.pop(0)}", kinds, sweeps))
        elif argument.startswith("-"):
            raise UsageError(unknown_flag(argument))
        else:
            overrides.append(_override(argument, kinds, sweeps))
    if {"--cfg", "-c"} & set(flags) and "--resolve" not in flags:
        flags.append("--resolve")
    return flags + overrides


def override_key(override: str) -> str:
    """The key of `KEY=VALUE`, without the marks of Hydra's grammar (+, ++, ~) and without a package."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def _flag_value(flag: str, value: str) -> str:
    if flag in ("--cfg", "-c") and value not in ("job", "hydra", "all"):
        raise UsageError(f"--cfg {value}: choose job (the settings of this command), hydra or all")
    return os.path.expanduser(value) if flag in ("--config-dir", "-cd") else value


def unknown_flag(argument: str, known: Sequence[str] = FLAGS) -> str:
    """What is said of a flag that does not exist. known: those that do."""
    name, _, value = argument.lstrip("-").partition("=")
    if re.fullmatch(r"[A-Za-z][\w.-]*", name) and len(name) > 1:
        near = get_close_matches(f"--{name}", known, n=1)
        if near and not value:
            return f"there is no option {argument}; did you mean {near[0]}?"
        return (
            f"there is no option {argument}; settings are written without dashes:"
            f" {name.replace('-', '_')}={value or 'VALUE'}"
        )
    return f"there is no option {argument}; see --help"


def _override(argument: str, kinds: Kinds, sweeps: bool) -> str:
    key, equals, value = argument.partition("=")
    if argument.startswith("~"):
        return argument
    if not equals:
        raise UsageError(f"{argument!r} is no setting: write KEY=VALUE, such as method=memit or limit=50")
    if not key.strip("+ "):
        raise UsageError(f"{argument!r} names no setting: write KEY=VALUE, such as limit=50")
    return f"{key}={_value(kinds.get(key.lstrip('+')), value, sweeps)}"


def _value(kind: Kind | None, value: str, sweeps: bool) -> str:
    """`value` as Hydra's grammar wants it, so that it means what was typed where the key holds text."""
    if kind is Kind.SENTENCE:
        return literal(re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value))
    if kind in (Kind.TEXT, Kind.FILE):
        if sweeps and FUNCTION.fullmatch(value):
            return value
        return ",".join(_text(part, kind is Kind.FILE) for part in (_apart(value) if sweeps else [value]))
    if kind is Kind.TEXTS and (found := re.fullmatch(r"\[([^][{}'\"\\]*)\]", value)) and found[1].strip():
        return f"[{','.join(_text(part.strip(), False) for part in found[1].split(','))}]"
    return value


def _text(value: str, is_path: bool) -> str:
    if value == "null":
        return value
    return quoted(os.path.expanduser(value) if is_path else value)


def _apart(values: str) -> Iterator[str]:
    """The values of a sweep: what stands between commas that are not in quotes."""
    rest = values
    while found := re.match(rf"({QUOTED.pattern}|[^,]*)(,|$)", rest, re.DOTALL):
        yield found[1]
        if not found[2]:
            return
        rest = rest[found.end() :]


def quoted(text: str) -> str:
    """`text` as one literal value of Hydra's grammar, unless it is quoted already or a plain word."""
    if QUOTED.fullmatch(text):
        return text
    if re.fullmatch(r"[A-Za-z_/][\w/.-]*", text, re.ASCII) and text.lower() not in NO_WORDS:
        return text
    return literal(text)


def literal(text: str) -> str:
    """`text` as one quoted value of Hydra's grammar, quotes of its own included."""
    # within quotes only the quote, and backslashes before one, have to be escaped
    escaped = re.sub(r"(\\*)(?='|$)", lambda found: found[1] * 2, text).replace("'", r"\'")
    return f"'{escaped}'"


def unquoted(value: str) -> str:
    """What `quoted` was given, but for words that were quoted already."""
    if not QUOTED.fullmatch(value):
        return value
    return re.sub(rf"(\\*)(?={value[0]}|$)", lambda found: found[1][: len(found[1]) // 2], value[1:-1])
