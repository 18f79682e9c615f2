"""The prefixes x_1 … x_j of the sentences of a corpus, streamed."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from edit_cli.inspection.settings import InspectOptions

if TYPE_CHECKING:
    from edit_cli.lm.model import LM

END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[\"'“(]?\w)")
STRIDE = 1 << 20  # more tokens than any sentence has: a place is sentence · STRIDE + token


@dataclass(frozen=True)
class Sentence:
    """ids: its tokens. first: its first one that is no special token. fresh: tokens that end a prefix which no earlier
    sentence has begun with.
    """

    number: int
    document: int
    ids: tuple[int, ...]
    first: int
    fresh: tuple[int, ...]


@dataclass(frozen=True)
class Prefix:
    """The tokens up to one place, without those that a tokenizer puts before each text (`start`)."""

    start: tuple[int, ...]
    ids: tuple[int, ...]
    next: int | None
    document: int

    @property
    def whole(self) -> tuple[int, ...]:
        return self.start + self.ids


@dataclass
class Prefixes:
    """The distinct prefixes of the first `limit` documents of the corpus.

    A prefix that several sentences begin with counts once, at its first place: by causality it fires the same keys.
    sentences: those that something still holds on to (`keep`). documents, count: how many documents and prefixes have
    been read.
    """

    lm: LM
    options: InspectOptions
    limit: int | None
    sentences: dict[int, Sentence] = field(default_factory=dict)
    documents: int = 0
    count: int = 0
    _seen: set[int] = field(default_factory=set)

    def chunks(self, tokens: int) -> Iterator[list[Sentence]]:
        """Sentences in groups of at least so many tokens. Raises as `Corpus.documents`."""
        chunk: list[Sentence] = []
        size = 0
        for sentence in self._read():
            self.sentences[sentence.number] = sentence
            chunk.append(sentence)
            size += len(sentence.ids)
            if size >= tokens:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    def _read(self) -> Iterator[Sentence]:
        number, special = 0, set(self.lm.tokenizer.all_special_ids)
        for text in islice(self.options.corpus.documents(self.options.seed), self.limit):
            parts = [part for part in map(str.strip, END_OF_SENTENCE.split(text)) if part]
            rows = self.lm.tokenizer(parts, truncation=True, max_length=self.options.max_length)["input_ids"]
            for row in rows:
                ids = tuple(self.lm.head.vocabulary.readable(row))
                first = next((place for place, token in enumerate(ids) if token not in special), len(ids))
                while len(ids) > first and ids[-1] in special:  # an end that some tokenizers add
                    ids = ids[:-1]
                if fresh := self._fresh(ids, first):
                    yield Sentence(number, self.documents, ids, first, fresh)
                    number += 1
            self.documents += 1

    def _fresh(self, ids: tuple[int, ...], first: int) -> tuple[int, ...]:
        found, digest = [], 0
        for place, token in enumerate(ids):
            digest = hash((digest, token))
            if place + 1 >= first + self.options.shortest and digest not in self._seen:
                self._seen.add(digest)
                found.append(place)
        self.count += len(found)
        return tuple(found)

    def at(self, place: int) -> Prefix:
        """The prefix that ends at a place."""
        sentence, token = self.sentences[place // STRIDE], place % STRIDE
        ids, first = sentence.ids, sentence.first
        following = ids[token + 1] if token + 1 < len(ids) else None
        return Prefix(ids[:first], ids[first : token + 1], following, sentence.document)

    def keep(self, places: set[int]) -> None:
        """Let go of all sentences without one of these places."""
        held = {place // STRIDE for place in places}
        self.sentences = {number: sentence for number, sentence in self.sentences.items() if number in held}


class Sample:
    """So many places of a stream, each as likely as any other."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.places = size, list[int]()
        self._random, self._passed = random.Random(seed), 0

    def see(self, places: list[int]) -> None:
        for place in places:
            self._passed += 1
            if len(self.places) < self.size:
                self.places.append(place)
            elif (slot := self._random.randrange(self._passed)) < self.size:
                self.places[slot] = place
