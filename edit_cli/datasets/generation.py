"""Generation as MEND edits it (Mitchell et al., 2022): after a passage the model is to go on with a given text of
about ten tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import takewhile
from typing import Annotated, Any, ClassVar

from annotated_types import Ge

from edit_cli.config.schema import Count, FilePath
from edit_cli.datasets.base import Chosen
from edit_cli.datasets.pooled import Entry, Pooled
from edit_cli.datasets.records.files import File, locate
from edit_cli.datasets.records.reading import Content, contents, suffix
from edit_cli.datasets.records.rows import Fault, Row
from edit_cli.errors import MissingError
from edit_cli.monitor import Monitor
from edit_cli.requests import Case, EditRequest, Probe

LEAST_WORDS = 50  # of a paragraph of running text, as published


@dataclass(frozen=True)
class Continuations(Pooled):
    """A passage and its continuation, which is written.

    In scope is the same continuation after the end of the passage alone.

    Read are MEND's files, `{"n_tokens", "original": [text], "completions": [text]}` (what a completion has beyond its
    original is the continuation); records with `passage` and `continuation`; or running text, one paragraph a line
    (.txt): of paragraphs of at least 50 words and no others than ASCII characters, the first `passage_words` words are
    the passage and the next `words` are written. Other passages must go on as they did, with the text that follows in
    them. The subject of a record, for the splits, is its `source` (an article), else the passage itself.
    """

    _: KW_ONLY
    words: Count = 8
    """Words of the continuation of running text, about ten tokens."""
    passage_words: Annotated[int, Ge(2)] = 32
    """Words of the passage of running text."""
    locality_path: FilePath | None = None
    """Running text whose passages must stay, such as Wikitext-103; null: other records."""

    expects: ClassVar[str] = (
        "passage, continuation; or MEND's n_tokens, original, completions; or a .txt file with a paragraph a line"
    )
    fields: ClassVar[frozenset[str]] = frozenset(("id", "source", "passage", "continuation", "split"))

    def read(self, file: File) -> Content:
        if suffix(file.path) == ".txt":
            return self._running_text(file)
        text, digest = contents(file.path, file.label)
        try:
            value = json.loads(text) if text.lstrip()[:1] == "{" else None
        except (ValueError, RecursionError):
            value = None  # JSON lines, or damaged: the common reader tells
        if isinstance(value, dict) and "completions" in value:
            rows = [
                Row(f"record {number}", number, pair) for number, pair in enumerate(_completions(value, file.label))
            ]
            return Content(rows, digest)
        return super().read(file)

    def _running_text(self, file: File) -> Content:
        text, digest = contents(file.path, file.label)
        rows = []
        for number, article, paragraph in paragraphs(text):
            words = paragraph.split()
            passage, rest = words[: self.passage_words], words[self.passage_words :][: self.words]
            values = {"source": article or paragraph, "passage": " ".join(passage), "continuation": " ".join(rest)}
            if len(rest) == self.words:
                rows.append(Row(f"line {number}", number, values))
        if not rows:
            least = max(LEAST_WORDS, self.passage_words + self.words)
            raise MissingError(f"{file.label} holds no paragraph (one a line) of {least} words or more")
        return Content(rows, digest)

    def about(self, row: Row) -> str:
        return row.phrase("source" if row.has("source") else "passage")

    def relation(self, row: Row, case: Case) -> str | None:
        return None

    def case(self, row: Row) -> Case:
        passage, continuation = row.prompt("passage"), row.phrase("continuation")
        words = passage.split()
        if len(words) < 2:
            raise Fault("passage", "has a single word")
        dropped = self.drawn(row, "prefix").randint(1, max(1, len(words) // 2))
        request = EditRequest(passage, None, continuation)
        shorter = passage.split(None, dropped)[dropped]
        return Case(
            row.id("id"),
            (request,),
            (Probe("rewrite", passage, continuation), Probe("paraphrase", shorter, continuation)),
        )

    def asked(self, row: Row, case: Case) -> tuple[str, str | None]:
        return row.prompt("passage"), row.phrase("continuation")

    def others(self, pool: Sequence[Chosen], monitor: Monitor) -> list[Entry]:
        if self.locality_path is None:
            return super().others(pool, monitor)
        file = locate(self.locality_path, self.cache_dir, monitor, "dataset.locality_path")
        return [self.entry(row, self.case(row)) for row in self._running_text(file).rows if isinstance(row, Row)]


def _completions(value: dict[str, Any], label: str) -> Iterator[dict[str, Any]]:
    """Passage and continuation of each of MEND's completions; where they part from the original, back to the last
    space before it.
    """
    originals, completions = value.get("original"), value["completions"]
    if not isinstance(originals, list) or not isinstance(completions, list) or len(originals) != len(completions):
        raise MissingError(f"{label}: original and completions are not two lists of the same length")
    for original, completion in zip(originals, completions, strict=True):
        if not isinstance(original, str) or not isinstance(completion, str):
            yield {"passage": original, "continuation": completion}  # dropped, with the reason
            continue
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(original, completion, strict=False)))
        if shared < len(completion) and not completion[shared].isspace():
            shared = completion.rfind(" ", 0, shared) + 1
        yield {"passage": completion[:shared].rstrip(), "continuation": completion[shared:].strip()}


def paragraphs(text: str) -> Iterator[tuple[int, str | None, str]]:
    """(line number, title of the article, paragraph) of those with enough words and ASCII characters only; titles
    are lines `= … =`.
    """
    article = None
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line.startswith("= ") and line.endswith(" =") and not line.startswith("= = "):
            article = line.strip("= ")
        elif len(line.split()) >= LEAST_WORDS and line.isascii():
            yield number, article, line
