"""Command-line arguments on their way from Typer to Hydra, as plain text.

Imports nothing heavy: mistakes are answered at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from edit_cli.errors import UsageError

WITH_VALUE = {"--config-dir", "-cd", "--cfg", "-c", "--package", "-p"}
ALONE = {"--multirun", "-m", "--resolve", "--info", "-i", "--hydra-help"}
MULTIRUN = {"-m", "--multirun"}
# Sentences of a fact: every character is part of them
FACTS = {"edit.prompt", "edit.subject", "edit.target", "edit.target_true", "edit.join", "dataset.template"}
# Settings that hold text, by the last part of their names, at the top and in groups. What stands there is taken as
# typed but for null, ${…} and, in a sweep, commas between values. A test holds these to the fields of the dataclasses.
TOP_PATHS = {"base_edit", "cache_dir", "run_dir", "runs_dir"}
TOP_TEXTS = {*TOP_PATHS, "side", "tag"}
PATHS = set(
    "cache_dir checkpoint corpus id implied_path import_npz locality_path model nq_path offload_folder path"
    " perplexity_text snippets tokenizer true_false_path".split()
)
TEXTS = PATHS | set(
    "answers averaged blocks condition contradictions describes device dtype elsewhere ending family field"
    " final_norm init join kind kl_position kl_prompt learn licence memory mixing mlp_out mode module name"
    " objective optimiser outer part past_keys pooling precision quantise records replace revision router rule"
    " schedule score sentiment sha256 size split stays subset target template test_split train_split trained_on"
    " trains transformed unrelated url variant weighting".split()
)
TEXT_LISTS = set("fields ids kinds labels locality lora_modules modules plugins prefixes starts trackers".split())
FUNCTION = re.compile(
    r"(bool|choice|extend_list|float|glob|int|interval|json_str|range|shuffle|sort|str|tag)\(.*\)", re.DOTALL
)
QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
NO_WORDS = ("true", "false", "nan", "inf", "null")  # of Hydra's grammar
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def regroup(arguments: Sequence[str]) -> list[str]:
    """Flags first, then all overrides together, as Hydra's parser wants them; texts are quoted.

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
        elif flag in ALONE and not equals:
            flags.append(flag)
            if flag in ("--info", "-i") and waiting and waiting[0] in INFO:
                flags.append(waiting.pop(0))
        elif argument.startswith("-"):
            raise UsageError(_unknown_flag(argument))
        else:
            overrides.append(_override(argument, sweeps))
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


def _override(argument: str, sweeps: bool) -> str:
    key, equals, value = argument.partition("=")
    if argument.startswith("~"):
        return argument
    if not equals:
        raise UsageError(f"{argument!r} is no setting: write KEY=VALUE, such as method=memit or limit=50")
    if not key.strip("+ "):
        raise UsageError(f"{argument!r} names no setting: write KEY=VALUE, such as limit=50")
    return f"{key}={_value(key.lstrip('+'), value, sweeps)}"


def _value(key: str, value: str, sweeps: bool) -> str:
    """`value` as Hydra's grammar wants it, so that it means what was typed where the key holds text."""
    if key in FACTS:
        return literal(re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value))
    group, _, name = key.rpartition(".")
    if key.startswith("hydra."):
        return value
    if key in TOP_TEXTS or (group and name in TEXTS):
        if sweeps and FUNCTION.fullmatch(value):
            return value
        is_path = name in (PATHS if group else TOP_PATHS)
        return ",".join(_text(part, is_path) for part in (_apart(value) if sweeps else [value]))
    if name in TEXT_LISTS and (found := re.fullmatch(r"\[([^][{}'\"\\]*)\]", value)) and found[1].strip():
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
