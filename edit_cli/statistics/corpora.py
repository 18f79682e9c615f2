"""Where the text of the second moments comes from: the embedded world, a local file, or a data set on the hub.

A corpus gives documents in an order drawn from a seed, the same at every call, so that a pass over it can be continued.
"""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any

from edit_cli import assets
from edit_cli.config.schema import Config, Count, FilePath
from edit_cli.errors import MissingError, UsageError
from edit_cli.files.paths import expanded

WORLD = assets.FOLDER / "world" / "corpus.txt"
OFFLINE_REMEDY = "give a local text instead: corpus=file corpus.path=FILE (plain text, one document a line, or .jsonl)"


@dataclass(frozen=True, kw_only=True)
class Corpus(Config, ABC):
    """A source of documents."""

    place = "corpus"

    @abstractmethod
    def documents(self, seed: int) -> Iterator[str]:
        """Non-blank texts in an order that depends on `seed` alone.

        Raises:
            MissingError: the source cannot be read; names the field and the remedy.
        """

    @abstractmethod
    def require(self) -> None:
        """Refuse a source that cannot be read, without reading it.

        Raises:
            MissingError: as `documents`.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON-able; equal for equal text. Never needs a network.

        It is part of the key under which statistics are stored.
        """

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name for people: in file names and messages."""

    def size(self) -> int | None:
        """How many documents there are, where that is cheap to tell."""
        return None


@dataclass(frozen=True)
class TextFile(Corpus):
    """A local file, UTF-8. Its identity is the content's sha256, so that a moved file is the same corpus and a changed
    one is another.
    """

    path: FilePath
    """One document a line: plain text, or JSON objects if the name ends in .jsonl."""
    field: str = "text"
    """Where a .jsonl object keeps its text."""

    def documents(self, seed: int) -> Iterator[str]:
        lines = array("Q", self._starts)
        random.Random(seed).shuffle(lines)
        with self._open() as file:
            for start in lines:
                file.seek(start)
                text = self._text(file.readline(), start)
                if text.strip():
                    yield text

    def require(self) -> None:
        self._open().close()

    def identity(self) -> dict[str, Any]:
        return {"kind": "file", "sha256": self._sha256, "field": self.field if self._is_jsonl else None}

    @property
    def label(self) -> str:
        return Path(self.path).stem

    def size(self) -> int:
        return len(self._starts)

    @property
    def _is_jsonl(self) -> bool:
        return Path(self.path).suffix in (".jsonl", ".ndjson")

    @cached_property
    def _starts(self) -> array[int]:
        """Byte offsets of the lines that are not blank: the file may be larger than memory."""
        starts, position = array("Q"), 0
        with self._open() as file:
            for line in file:
                if line.strip():
                    starts.append(position)
                position += len(line)
        if not starts:
            raise MissingError(f"corpus.path={self.path} holds no text")
        return starts

    @cached_property
    def _sha256(self) -> str:
        with self._open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _open(self) -> BufferedReader:
        try:
            return expanded(self.path).open("rb")
        except OSError as error:
            raise MissingError(f"corpus.path={self.path} cannot be read: {error.strerror}") from None

    def _text(self, line: bytes, start: int) -> str:
        try:
            text = line.decode("utf-8").rstrip("\r\n")
            if self._is_jsonl:
                text = json.loads(text)[self.field]
        except UnicodeDecodeError:
            raise MissingError(f"corpus.path={self.path} is no UTF-8 text at byte {start}") from None
        except (ValueError, RecursionError):
            raise MissingError(f"corpus.path={self.path} holds no JSON at byte {start}: {line[:60]!r}") from None
        except (KeyError, TypeError, IndexError):
            raise UsageError(
                f"corpus.field={self.field}: no such field in {self.path} at byte {start}: {line[:60]!r}"
            ) from None
        if not isinstance(text, str):
            raise UsageError(
                f"corpus.field={self.field} holds {type(text).__name__}, not text, in {self.path} at byte {start}"
            )
        return text


@dataclass
class PairFile:
    """What models with an encoder are trained on: JSON lines, a prompt and its answer each, under the names `fields`.

    key: the setting that names the file, for messages.
    """

    path: str
    fields: tuple[str, str] = ("prompt", "answer")
    key: str = "corpus.path"

    def pairs(self) -> list[tuple[str, str]]:
        """(prompt, answer) of every line, in order.

        Raises:
            MissingError: no such file, or a line that holds no two such texts; names it.
        """
        found = []
        try:
            with open(Path(self.path).expanduser(), encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        found.append(self._pair(line, number))
        except OSError as error:
            raise MissingError(f"{self.key}={self.path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise MissingError(f"{self.key}={self.path} is no UTF-8 text") from None
        if not found:
            raise MissingError(f"{self.key}={self.path} holds no text")
        return found

    def _pair(self, line: str, number: int) -> tuple[str, str]:
        try:
            values = json.loads(line)
            prompt, answer = (values[name].strip() for name in self.fields)
        except (ValueError, KeyError, TypeError, AttributeError):
            prompt = answer = ""
        if not prompt or not answer:
            raise MissingError(
                f"{self.key}={self.path} holds no JSON object with the texts {' and '.join(self.fields)} in line"
                f" {number}: {line.strip()[:60]!r}"
            )
        return prompt, answer


def embedded_pairs(kind: str) -> list[tuple[str, str]]:
    """(prompt, answer) pairs that the packaged models of this kind ("seq2seq" or "classifier") were trained on: of
    every record the edited prompt, its other trained wordings, and what others are asked.
    """
    form = {"seq2seq": "questions", "classifier": "claims"}[kind]
    found: dict[tuple[str, str], None] = {}
    for record in json.loads((WORLD.parent / f"{form}.json").read_text(encoding="utf-8")):
        own = [record["prompt"].replace("{}", record["subject"]), *record["paraphrases_seen"]]
        found.update(dict.fromkeys((prompt, record["target_true"]) for prompt in own))
        asked = [one for group in ("same_relation", "same_subject", "unrelated") for one in record[group]]
        found.update(dict.fromkeys((one["prompt"], one["target"]) for one in asked))
    return list(found)


@dataclass(frozen=True)
class EmbeddedText(Corpus):
    """The sentences about the embedded world, on which the tiny model was trained."""

    def require(self) -> None:
        self._file.require()

    def documents(self, seed: int) -> Iterator[str]:
        return self._file.documents(seed)

    def identity(self) -> dict[str, Any]:
        return self._file.identity()

    @property
    def label(self) -> str:
        return "embedded"

    def size(self) -> int:
        return self._file.size()

    @cached_property
    def _file(self) -> TextFile:
        return TextFile(str(WORLD))


@dataclass(frozen=True)
class HubText(Corpus):
    """A data set of the hub, streamed: only what is read is downloaded.

    A stream is shuffled by its shards and then within a buffer, because it has no random access.
    """

    id: str
    """owner/name on the hub."""
    subset: str | None = None
    """The configuration of the data set, if it has several."""
    split: str = "train"
    """Which split is read."""
    field: str = "text"
    """Where a row keeps its text."""
    revision: str | None = None
    """A commit of the data set; null: the newest, which may change."""
    buffer: Count = 10_000
    """Documents held while shuffling the stream."""

    def documents(self, seed: int) -> Iterator[str]:
        for row in self._rows(seed):
            if self.field not in row:
                raise UsageError(f"corpus.field={self.field}: {self.id} has the fields {', '.join(sorted(row))}")
            if row[self.field] and row[self.field].strip():
                yield row[self.field]

    def identity(self) -> dict[str, Any]:
        fields = {key: getattr(self, key) for key in ("id", "subset", "split", "field", "revision", "buffer")}
        return {"kind": "hub", **fields}

    @property
    def label(self) -> str:
        return "-".join(filter(None, (self.id.rpartition("/")[2], self.subset)))

    def _rows(self, seed: int) -> Iterator[dict[str, Any]]:
        rows = self._stream().shuffle(seed=seed, buffer_size=self.buffer)
        try:
            yield from rows
        except Exception as error:  # whatever the transport raises when a connection breaks
            raise MissingError(
                f"corpus.id={self.id}: the hub stopped answering ({_reason(error)}); run the same command again"
            ) from error

    def require(self) -> None:
        """One question without retries: a machine without a network is told at once."""
        from huggingface_hub import HfApi

        try:
            HfApi().dataset_info(self.id, revision=self.revision, timeout=5)
        except Exception as error:  # whatever the transport raises without a network
            raise MissingError(
                f"corpus.id={self.id} was looked for on the hub: {_reason(error)}; {OFFLINE_REMEDY}"
            ) from None

    def _stream(self) -> Any:
        """The data set, unread."""
        self.require()
        import datasets

        try:
            return datasets.load_dataset(self.id, self.subset, split=self.split, revision=self.revision, streaming=True)
        except (OSError, ValueError) as error:
            raise MissingError(
                f"corpus.id={self.id} corpus.subset={self.subset} corpus.split={self.split}: {_reason(error)}"
            ) from None


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
