"""Read a data file into raw rows: a JSON list, JSON lines, or CSV with a header.

A broken row is kept as `Dropped`; the rest goes on.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edit_cli.datasets.rows import Dropped, Row
from edit_cli.errors import MissingError

FORMATS = (".json", ".jsonl", ".csv")


@dataclass(frozen=True)
class Content:
    rows: list[Row | Dropped]  # in the order of the file
    sha256: str


def read(path: Path, label: str) -> Content:
    """Rows of a UTF-8 file. `.csv` is read as CSV; anything else must start with `[` (JSON list) or `{` (JSON lines).

    Raises:
        MissingError: the file cannot be read, is empty, is not UTF-8, or is none of these formats. `label` names it in
            the message.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise MissingError(f"{label} cannot be read: {error.strerror}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise MissingError(f"{label} is not UTF-8 text (line {line}); save it as UTF-8") from None
    start = text.lstrip()[:1]
    if not start:
        raise MissingError(f"{label} is empty: give a file with at least one record")
    if path.suffix.lower() == ".csv":
        rows = _csv(text, label)
    elif start == "[":
        rows = _json_list(text, label)
    elif start == "{":
        rows = _json_lines(text)
    else:
        raise MissingError(f"{label} is neither a JSON list, nor JSON lines, nor a .csv file")
    return Content(list(rows), hashlib.sha256(raw).hexdigest())


def _json_list(text: str, label: str) -> Iterator[Row | Dropped]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MissingError(f"{label} is not valid JSON: {error}") from None
    for index, value in enumerate(values):
        yield _row(f"record {index}", index, value)


def _json_lines(text: str) -> Iterator[Row | Dropped]:
    index = 0
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON texts may hold other line separators
        if not line.strip():
            continue
        try:
            yield _row(f"line {number}", index, json.loads(line))
        except (ValueError, RecursionError):
            yield Dropped(f"line {number}", "", "is not valid JSON")
        index += 1


def _csv(text: str, label: str) -> Iterator[Row | Dropped]:
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    except csv.Error as error:
        raise MissingError(f"{label} has no readable header: {error}") from None
    if len(set(reader.fieldnames)) < len(reader.fieldnames):
        raise MissingError(f"{label} names a column twice in its header")
    index = 0
    while True:
        where = f"line {reader.line_num + 1}"  # where the row starts: quoted cells may span lines
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield Dropped(where, "", "is not valid CSV")
        else:
            yield Dropped(where, "", "has more cells than the header") if None in values else _row(where, index, values)
        index += 1


def _row(where: str, index: int, value: Any) -> Row | Dropped:
    return (
        Row(where, index, value)
        if isinstance(value, dict)
        else Dropped(where, "", "is not an object with named fields")
    )
