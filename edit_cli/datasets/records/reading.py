"""Read a data file into raw rows: JSON, JSON lines, or a table with a header; each of them also compressed by gzip.

A broken row is kept as `Dropped`; the rest goes on. A file of another form gets one line that says what it is.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from edit_cli.datasets.records.rows import Dropped, Row
from edit_cli.errors import MissingError

TABLES = (".csv", ".tsv")
FORMATS = tuple(kind + packed for kind in (".json", ".jsonl", *TABLES) for packed in ("", ".gz"))
DELIMITERS = (",", ";", "\t", "|")
COMMON = frozenset({"id", "case_id", "split", "join"})  # fields that do not tell a record from what is around records
WEB_PAGE = "a web page: download the data themselves"
NO_OBJECT = {list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
FOREIGN = {  # how files begin that are often given instead, and what helps
    b"PK\x03\x04": "a zip archive or an Excel file: give a file of it, as CSV or JSON",
    b"PAR1": "a Parquet file: save its records as JSON lines or CSV",
    b"ARROW1": "an Arrow file: save its records as JSON lines or CSV",
    b"SQLite format 3": "a database: save its records as JSON lines or CSV",
    b"\x80": "a pickle, which would run code when it is read: save its records as JSON lines or CSV",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    b"\xfd7zXZ": "compressed by xz: unpack it, or use gzip",
    b"BZh": "compressed by bzip2: unpack it, or use gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it, or use gzip",
    b"version https://git-lfs": "the pointer of a file in Git LFS: fetch the file itself (git lfs pull)",
    b"<!doctype": WEB_PAGE,
    b"<html": WEB_PAGE,
    b"<?xml": WEB_PAGE,
}


@dataclass(frozen=True)
class Content:
    rows: Sequence[Row | Dropped]  # in the order of the file
    sha256: str


def contents(path: Path, label: str) -> tuple[str, str]:
    """(text, sha256 of the file as it lies) of UTF-8 text, unpacked if it is compressed by gzip.

    Raises:
        MissingError: the file cannot be read or is of a form that cannot be text. `label` names it in the message.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise MissingError(f"{label} cannot be read: {error.strerror}") from None
    plain = raw
    if raw.startswith(b"\x1f\x8b"):
        try:
            plain = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise MissingError(f"{label} is a damaged gzip file ({error}): fetch or pack it again") from None
    if foreign := next((what for start, what in FOREIGN.items() if plain[:30].lower().startswith(start.lower())), None):
        raise MissingError(f"{label} is {foreign}")
    try:
        return plain.decode("utf-8-sig"), hashlib.sha256(raw).hexdigest()
    except UnicodeDecodeError as error:
        line = plain[: error.start].count(b"\n") + 1
        raise MissingError(f"{label} is not UTF-8 text (line {line}); save it as UTF-8") from None


def suffix(path: PurePath) -> str:
    """What the file's name says of its form, apart from the compression."""
    return PurePath(path.name.lower().removesuffix(".gz")).suffix


def read(path: Path, label: str, fields: Collection[str], expects: str) -> Content:
    """Rows of a UTF-8 file. `.csv` and `.tsv` are tables with a header, whose cells are parted by commas, semicolons,
    tabs or |; anything else is JSON: a list, objects one after another (JSON lines), or an object around a list.

    fields: those that a record may have; they tell a record from an object around records. expects: those that it must
    have, for messages.

    Raises:
        MissingError: the file cannot be read, is empty, or of none of these forms. `label` names it in the message.
    """
    text, digest = contents(path, label)
    start = text.lstrip()[:1]
    if not start:
        raise MissingError(f"{label} is empty: give a file with at least one record")
    if suffix(path) in TABLES:
        rows = list(_table(text, label, frozenset(fields), expects))
    elif start in "[{":
        rows = _json(text, label, frozenset(fields))
        _require_objects(rows, label, expects)
    else:
        begins = text.lstrip().split("\n")[0][:40].strip()
        raise MissingError(
            f"{label} is neither a JSON list, nor JSON lines, nor a table named .csv or .tsv: it begins with {begins!r}"
        )
    return Content(rows, digest)


def _json(text: str, label: str, fields: frozenset[str]) -> list[Row | Dropped]:
    """Rows of a list, of an object around one, or of objects one after another, each on a line or on several."""
    values: list[tuple[str, Any]] = []  # with the place of each
    decoder, at = json.JSONDecoder(), _next(text, 0)
    line = 1 + text.count("\n", 0, at)
    while at < len(text):
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            return _broken(text, label, bool(values), error)
        following = _next(text, end)
        if not values and following < len(text) and "\n" not in text[at:end]:
            return list(_json_lines(text))
        values.append((f"line {line}", value))
        line += text.count("\n", at, following)
        at = following
    if len(values) == 1:
        whole = values[0][1]
        found = whole if isinstance(whole, list) else _wrapped(whole, label, fields)
        if found is not None:
            return [_row(f"record {index}", index, value) for index, value in enumerate(found)]
    return [_row(where, index, value) for index, (where, value) in enumerate(values)]


def _require_objects(rows: Sequence[Row | Dropped], label: str, expects: str) -> None:
    """Raises MissingError: every record is a list, a text or the like, whose parts have no names."""
    reasons = {row.reason if isinstance(row, Dropped) else "" for row in rows}
    if len(reasons) == 1 and (reason := reasons.pop()) in map(_no_object, NO_OBJECT):
        raise MissingError(f"{label} names no fields: each record {reason} ({expects})")


def _next(text: str, at: int) -> int:
    """Where the next character after white space is."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _broken(text: str, label: str, begun: bool, error: Exception) -> list[Row | Dropped]:
    """JSON lines of which the first is broken, if others are whole. begun: objects on several lines stand before."""
    rows = list(_json_lines(text)) if not begun and text.lstrip().startswith("{") else []
    if 2 * sum(isinstance(row, Row) for row in rows) < max(len(rows), 1):
        raise MissingError(f"{label} is not valid JSON: {error}") from None
    return rows


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


def _wrapped(value: dict[str, Any], label: str, fields: frozenset[str]) -> list[Any] | None:
    """The records inside an object: its one list of objects, or objects by their names. None: it is a record itself.

    Raises:
        MissingError: several such lists, or a list a field.
    """
    known = value.keys() & fields - COMMON
    if len(known) > 1 and _are_columns([value[key] for key in known]):
        raise MissingError(
            f"{label} holds a list a field ({', '.join(sorted(known)[:5])}): give one object a record (pandas:"
            " orient='records')"
        )
    inside = {key: items for key, items in value.items() if _are_objects(items)}
    richer = [key for key, items in inside.items() if len(items[0].keys() & fields) > len(known)]
    found = richer or ([] if known else list(inside))
    if len(found) > 1:
        raise MissingError(f"{label} holds several lists of records ({', '.join(found[:5])}): give a file with one")
    if found:
        return inside[found[0]]
    records = list(value.values())
    return records if not known and _are_objects(records) and records[0].keys() & fields else None


def _are_columns(values: list[Any]) -> bool:
    """Whether they are lists, or objects by the same row names, of one length."""
    kinds = {type(value) for value in values}
    return kinds in ({list}, {dict}) and len({tuple(value) if kinds == {dict} else len(value) for value in values}) == 1


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _table(text: str, label: str, fields: frozenset[str], expects: str) -> Iterator[Row | Dropped]:
    reader = csv.DictReader(
        io.StringIO(text, newline=""), restval="", strict=True, delimiter=_delimiter(text.split("\n")[0], fields)
    )
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    except csv.Error as error:
        raise MissingError(f"{label} has no readable header: {error}") from None
    names = [name for name in reader.fieldnames if name]
    if not fields.intersection(names):
        first = text.lstrip().split("\n")[0].strip()[:60]
        raise MissingError(
            f"{label} is a table without a header: its first line, {first!r}, names none of the columns that are read"
            f" ({expects})"
        )
    if len(set(names)) < len(names):
        raise MissingError(f"{label} names a column twice in its header")
    index = 0
    while True:
        where = f"line {reader.line_num + 1}"  # where the row starts: quoted cells may span lines
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield Dropped(where, "", "is not valid CSV")
        else:
            beyond = cells.pop(None, [])  # spreadsheets end rows with empty cells
            if any(cell.strip() for cell in beyond):
                yield Dropped(where, "", "has more cells than the header")
            elif any(cell.strip() for cell in cells.values()):
                cells.pop("", None)  # a column without a name numbers the rows
                if not cells.get("join"):
                    cells.pop("join", None)  # in JSON an empty text says something: nothing is to stand there
                yield Row(where, index, cells)
            else:
                continue
        index += 1


def _delimiter(header: str, fields: frozenset[str]) -> str:
    """What parts the cells: that which finds the most fields in the header, or else the most cells."""

    def finds(delimiter: str) -> tuple[int, int]:
        names = [name.strip(' "\r') for name in header.split(delimiter)]
        return len(fields.intersection(names)), len(names)

    return max(DELIMITERS, key=finds)


def _row(where: str, index: int, value: Any) -> Row | Dropped:
    return Row(where, index, value) if isinstance(value, dict) else Dropped(where, "", _no_object(type(value)))


def _no_object(kind: type) -> str:
    return f"is {NO_OBJECT.get(kind, 'null')}, not an object with named fields"
