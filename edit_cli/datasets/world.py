"""Edits of the embedded world: statements to complete, questions to answer, claims to judge (docs/tiny-model.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from edit_cli import assets
from edit_cli.datasets.base import Chosen, Source
from edit_cli.datasets.files import File
from edit_cli.datasets.rows import Fault, Row, phrase, prompt
from edit_cli.errors import MissingError, UsageError
from edit_cli.monitor import Monitor
from edit_cli.requests import Case, EditRequest, Probe

FOLDER = assets.FOLDER / "world"
PARAPHRASES = {"paraphrases_seen": "seen", "paraphrases": "unseen"}  # field: group
LOCALITY = {"unrelated": "random", "same_relation": "same_relation", "same_subject": "same_subject"}
CLAIMS, LABELS = "claims", ("SUPPORTS", "REFUTES")


@dataclass
class WorldEdits(Source):
    """Edits of world facts in the splits train, validation and test, which share no subject.

    records: statements, questions or claims. alternative: which of a record's alternatives is written, from 0 (claims
    have one).
    one_a_subject: the first record of each subject only, so that no batch edits what locality asks of another of its
    records.

    Probes: rewrite; paraphrase (wordings of the training, and held-out ones); locality (unrelated facts, the same
    relation of other subjects, other facts about the same subject). No other subject that locality asks about is edited
    by a record of the split.
    """

    records: str = "statements"
    alternative: int = 0
    one_a_subject: bool = False

    has_splits: ClassVar[bool] = True
    expects: ClassVar[str] = (
        "prompt, subject, target_true, alternatives, paraphrases, same_relation, same_subject, unrelated"
    )
    fields: ClassVar[frozenset[str]] = frozenset((*expects.split(", "), "paraphrases_seen", "id", "split", "relation"))

    def check(self) -> None:
        super().check()
        if self.alternative < 0:
            raise UsageError(f"dataset.alternative={self.alternative}: give 0 or more")

    def locate(self, monitor: Monitor) -> File:
        if self.path is not None:
            return super().locate(monitor)
        if not self.records.isidentifier():
            raise UsageError(
                f"dataset.records={self.records}: give statements, questions or claims; a file of your own goes to"
                " dataset.path"
            )
        file = FOLDER / f"{self.records}.json"
        if not file.is_file():
            raise MissingError(f"dataset.records={self.records}: give statements, questions or claims")
        return File(file, f"embedded world, {self.records}", split="test")

    def answer_labels(self) -> tuple[str, ...] | None:
        return LABELS if self.records == CLAIMS else None

    def usable(self, records: Sequence[Chosen]) -> list[Chosen]:
        if not self.one_a_subject:
            return list(records)
        first = {case.requests[0].subject: (row, case) for row, case in reversed(records)}
        return [(row, case) for row, case in records if first[case.requests[0].subject][1] is case]

    def case(self, row: Row) -> Case:
        subject, true = row.phrase("subject"), row.phrase("target_true")
        alternatives = row.phrases("alternatives")
        if self.alternative >= len(alternatives):
            raise Fault("alternatives", f"has no item {self.alternative}")
        new = alternatives[self.alternative]
        if new == true:
            raise Fault("alternatives", "equals target_true")
        request = EditRequest(row.template("prompt", subject), subject, new, true)
        probes = [Probe("rewrite", request.text, new, true)]
        for path, group in PARAPHRASES.items():
            probes += [Probe("paraphrase", text, new, true, group=group) for text in row.prompts(path, required=False)]
        for path, group in LOCALITY.items():
            probes += [Probe("locality", text, target, group=group) for text, target in _asked(row, path)]
        return Case(row.id("id"), (request,), tuple(probes))


def _asked(row: Row, path: str) -> list[tuple[str, str]]:
    """(prompt, target) of each item of a list, which may be missing."""
    items: Any = row.get(path) if row.has(path) else []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise Fault(path, "is not a list of objects")
    return [
        (prompt(item.get("prompt"), f"{path}[{number}].prompt"), phrase(item.get("target"), f"{path}[{number}].target"))
        for number, item in enumerate(items)
    ]
