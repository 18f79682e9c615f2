"""JSON on disk: strict, whole or not at all, and readable after a kill at any moment."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edit_cli.errors import MissingError
from edit_cli.files.disk import replacing_file

DEEPEST = 60  # levels of objects and lists in each other


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON in ASCII (texts may hold anything): numbers that are not finite become null."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader, or a run killed meanwhile, finds the old one or the new one, never a part.

    Raises:
        MissingError: it cannot be written.
    """
    with replacing_file(path) as temporary:
        temporary.write_text(to_json(value, indent=1) + "\n", encoding="ascii")


def parse(text: str | bytes) -> Any:
    """The value that JSON stands for.

    Raises:
        ValueError: it is no strict JSON, or nested deeper than anything that this package writes.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [
            part
            for parent in level
            if isinstance(parent, (dict, list))
            for part in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(part, (dict, list))
        ]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        MissingError: it is missing or damaged; names it.
    """
    try:
        value = parse(path.read_bytes())
    except FileNotFoundError:
        raise MissingError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise MissingError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise MissingError(f"{path} cannot be read: it holds no object")
    return value


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(lines, byte at which the last whole one ends). What a killed process left of a last line does not count."""
    try:
        pieces = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise MissingError(f"{path} cannot be read: {error.strerror}") from None
    lines: list[dict[str, Any]] = []
    end = 0
    for number, piece in enumerate(pieces[:-1], 1):
        try:
            line = parse(piece)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            if number == len(pieces) - 1 and not pieces[-1]:
                break  # a last line of which only the space on disk was kept (power loss)
            raise MissingError(
                f"{path}, line {number}, is damaged: delete that line and run again, or start with overwrite=true"
            )
        lines.append(line)
        end += len(piece) + 1
    return lines, end
