"""Reference texts by property: `[{relation_id, target_id, samples: [{name, text}]}]`, CounterFact's attribute snippets.

The published file is 0.9 GB of JSON. It is parsed once, one object at a time, into an SQLite file in the cache; a run
then reads the few keys it needs. Small files are read directly.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Iterator, Set
from contextlib import closing
from pathlib import Path
from typing import Any

from edit_cli.datasets.records.files import File
from edit_cli.errors import MissingError
from edit_cli.files.paths import expanded
from edit_cli.monitor import Monitor

Key = tuple[str, str]  # relation id, target id
INDEX_ABOVE = 1 << 25  # bytes
CHUNK = 1 << 20  # characters
LONGEST = 1 << 28  # characters of one object: more means that the file is broken
BETWEEN = re.compile(r"[\s,]*")


def texts_of(keys: Set[Key], file: File, cache_dir: str, monitor: Monitor) -> dict[Key, tuple[str, ...]]:
    """The texts of the given keys, in the order of the file. Keys that it does not hold are absent.

    Raises:
        MissingError: the file cannot be read or has another form.
    """
    try:
        if file.path.stat().st_size > INDEX_ABOVE:
            return _look_up(keys, _index(file, cache_dir, monitor))
        found: dict[Key, tuple[str, ...]] = {}
        for key, texts in _snippets(file.path):
            if key in keys:
                found[key] = found.get(key, ()) + texts
        return found
    except (ValueError, KeyError, TypeError, RecursionError):
        form = "[{relation_id, target_id, samples: [{text}]}]"
        raise MissingError(f"dataset.snippets: {file.label} is not a JSON list of the form {form}") from None
    except (OSError, sqlite3.Error) as error:
        raise MissingError(f"dataset.snippets: {file.label} cannot be read: {error}") from None


def elements(path: Path, chunk: int = CHUNK) -> Iterator[Any]:
    """The elements of a JSON list, one in memory at a time.

    They must be objects or lists: a number could be cut in two.

    Raises:
        ValueError: not a JSON list, or broken inside (JSONDecodeError, UnicodeDecodeError).
    """
    decode = json.JSONDecoder().raw_decode
    with path.open(encoding="utf-8-sig") as stream:
        buffer = stream.read(chunk).lstrip()
        if not buffer.startswith("["):
            raise ValueError("not a JSON list")
        at = 1
        while True:
            between = BETWEEN.match(buffer, at)
            at = between.end() if between else at
            if buffer.startswith("]", at):
                return
            try:
                value, at = decode(buffer, at)
            except ValueError:
                buffer, at = buffer[at:], 0
                more = stream.read(max(chunk, len(buffer)))  # doubled, so that a long object costs linear time
                if not more or len(buffer) > LONGEST:
                    raise
                buffer += more
            else:
                yield value


def _snippets(path: Path) -> Iterator[tuple[Key, tuple[str, ...]]]:
    for value in elements(path):
        texts = tuple(sample["text"] for sample in value["samples"])
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a sample's text is not text")
        yield (str(value["relation_id"]), str(value["target_id"])), texts


def _index(file: File, cache_dir: str, monitor: Monitor) -> Path:
    """The SQLite copy of a snippets file, built on first use; another size or date of the file makes another one."""
    state = file.path.stat()
    identity = f"{file.path.resolve()}|{state.st_size}|{state.st_mtime_ns}"
    target = expanded(cache_dir) / "snippets" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.sqlite"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.part")
    try:
        with closing(sqlite3.connect(part)) as database, monitor.task(f"Indexing {file.label} (once)", None) as advance:
            database.execute("CREATE TABLE snippets (relation TEXT, target TEXT, texts TEXT)")
            for (relation, target_id), texts in _snippets(file.path):
                database.execute("INSERT INTO snippets VALUES (?, ?, ?)", (relation, target_id, json.dumps(texts)))
                advance(1)
            database.execute("CREATE INDEX by_key ON snippets (relation, target)")
            database.commit()
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _look_up(keys: Set[Key], index: Path) -> dict[Key, tuple[str, ...]]:
    query = "SELECT texts FROM snippets WHERE relation = ? AND target = ? ORDER BY rowid"
    with closing(sqlite3.connect(index)) as database:
        found = {
            key: tuple(text for (texts,) in database.execute(query, key) for text in json.loads(texts))
            for key in sorted(keys)
        }
    return {key: texts for key, texts in found.items() if texts}
