"""Sentences and their translations (Sinitsin et al., 2020): an edit makes a model translate one sentence as wanted, and
other sentences must keep their translations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from importlib.util import find_spec
from typing import Annotated, ClassVar

from annotated_types import Len

from edit_cli import assets
from edit_cli.config.schema import FilePath, Natural, NonNegative, Seed
from edit_cli.datasets.base import Chosen, Source
from edit_cli.datasets.others import beside
from edit_cli.datasets.records.files import File, locate
from edit_cli.datasets.records.reading import Content, contents
from edit_cli.datasets.records.rows import Dropped, Fault, Row
from edit_cli.datasets.subjects import split_of
from edit_cli.errors import MissingError, UsageError
from edit_cli.monitor import Monitor
from edit_cli.requests import Case, EditRequest, Probe

SPLITS = ("train", "validation", "test")
EMBEDDED = assets.FOLDER / "translation" / "pairs.jsonl"


@dataclass(frozen=True)
class Pairs(Source):
    """A sentence, its translation, and the one that is wanted of it.

    Read are records with `source`, `reference` and `wanted` (without it, the reference is wanted), or two texts with a
    sentence a line each, as WMT and IWSLT have them. Probes: rewrite; locality (other sentences of the split, with
    their references).
    """

    has_splits: ClassVar[bool] = True
    expects: ClassVar[str] = "source, reference, optional wanted, split, id; or two texts, a sentence a line"
    fields: ClassVar[frozenset[str]] = frozenset(("source", "reference", "wanted", "split", "id"))

    _: KW_ONLY
    reference_path: FilePath | None = None
    """The text of translations, where path is the one of sentences; null: path holds records."""
    prefix: str = ""
    """What a model wants before a sentence and a space, such as 'translate English to German:'."""
    shares: Annotated[list[NonNegative], Len(3, 3)] | None = None
    """Of train, validation and test, into which sentences fall by their hash, of files without a field split; null:
    0.8, 0.1 and 0.1."""
    others: Natural = 50
    """Other sentences of the split that must keep their translations, drawn for each edit, if possible of those not
    edited themselves; 0: all of the split, as published."""
    seed: Seed = 0
    """Of what is drawn."""

    def locate(self, monitor: Monitor) -> File:
        if self.path is not None:
            return super().locate(monitor)
        if self.reference_path is not None:
            raise UsageError("dataset.reference_path is the text of translations of dataset.path: give both")
        return File(EMBEDDED, "two invented languages", split="test")

    def read(self, file: File) -> Content:
        if self.reference_path is None:
            return super().read(file)
        other = locate(self.reference_path, self.cache_dir, Monitor(), "dataset.reference_path")
        (sources, first), (references, second) = (contents(one.path, one.label) for one in (file, other))
        lines = [text.rstrip("\n").split("\n") for text in (sources, references)]
        if len(lines[0]) != len(lines[1]):
            raise MissingError(
                f"{file.label} has {len(lines[0]):,} lines and {other.label} {len(lines[1]):,}: give two texts that"
                " belong together, line by line"
            )
        rows: list[Row | Dropped] = [
            Row(f"line {index + 1}", index, {"source": source, "reference": reference})
            for index, (source, reference) in enumerate(zip(*lines, strict=True))
        ]
        return Content(rows, hashlib.sha256(f"{first} {second}".encode()).hexdigest())

    def split_of(self, row: Row) -> str | None:
        named = super().split_of(row)
        source = row.values.get("source")
        if named is not None or not isinstance(source, str):
            return named
        return split_of(source, self.shares or (0.8, 0.1, 0.1), SPLITS)

    def case(self, row: Row) -> Case:
        source, reference = row.phrase("source"), row.phrase("reference")
        wanted = row.phrase("wanted") if row.has("wanted") else reference
        if row.has("wanted") and wanted == reference:
            raise Fault("wanted", "is the reference already")
        text = f"{self.prefix} {source}" if self.prefix else source
        request = EditRequest(text, None, wanted, reference if wanted != reference else None)
        probe = Probe("rewrite", request.text, wanted, request.target_true)
        return Case(row.id("id"), (request,), (probe,), right=(reference,))

    def complete(self, chosen: Sequence[Chosen], pool: Sequence[Chosen], file: File, monitor: Monitor) -> list[Case]:
        if find_spec("sacrebleu") is None:
            monitor.note(
                "BLEU is not told: it needs sacrebleu (pip install 'edit-cli[translation]'); what the model writes is"
                " kept, and the same command makes the table again"
            )
        kept = {
            case.id: Probe("locality", case.requests[0].text, case.right[0], group="translation") for _, case in pool
        }
        return beside([case for _, case in chosen], kept, self.others, self.seed)
