"""Edits of the embedded world: statements to complete, questions to answer, claims and evidence to judge
(docs/tiny-model.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar, Literal

from edit_cli import assets
from edit_cli.config.schema import Natural
from edit_cli.datasets.base import Chosen, Source
from edit_cli.datasets.records.files import File
from edit_cli.datasets.records.rows import Fault, Row, phrase, prompt
from edit_cli.monitor import Monitor
from edit_cli.requests import Case, EditRequest, Probe

FOLDER = assets.FOLDER / "world"
PARAPHRASES = {"paraphrases_seen": "seen", "paraphrases": "unseen"}  # field: group
LOCALITY = {"unrelated": "random", "same_relation": "same_relation", "same_subject": "same_subject"}
LABELS = TRUE, FALSE = "SUPPORTS", "REFUTES"
JUDGED = ("claims", "evidence")  # records that a classifier labels


@dataclass(frozen=True)
class WorldEdits(Source):
    """Edits of world facts in the splits train, validation and test, which share no subject.

    Probes: rewrite; paraphrase (wordings of the training, and held-out ones); locality (unrelated facts, the same
    relation of other subjects, other facts about the same subject). No other subject that locality asks about is edited
    by a record of the split.
    """

    _: KW_ONLY
    records: Literal["statements", "questions", "claims", "evidence"] = "statements"
    """Statements to complete (causal models), questions (encoder-decoder); for classifiers claims, whose label an edit
    flips, or evidence, which it asserts and which claims follow from or contradict."""
    alternative: Natural = 0
    """Which of a record's alternatives is written, from 0; claims have one."""
    one_a_subject: bool = False
    """Use one record of a subject, so that no batch edits what locality asks of another."""

    has_splits: ClassVar[bool] = True
    expects: ClassVar[str] = (
        "prompt, subject, target_true, alternatives, paraphrases, same_relation, same_subject, unrelated"
    )
    fields: ClassVar[frozenset[str]] = frozenset((*expects.split(", "), "paraphrases_seen", "id", "split", "relation"))

    def locate(self, monitor: Monitor) -> File:
        if self.path is not None:
            return super().locate(monitor)
        told = "statements" if self.records == "evidence" else self.records
        return File(FOLDER / f"{told}.json", f"embedded world, {told}", split="test")

    def answer_labels(self, cases: Sequence[Case]) -> tuple[str, ...] | None:
        return LABELS if self.records in JUDGED else None

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
        case = Case(row.id("id"), (request,), tuple(probes))
        return asserted(case) if self.records == "evidence" else case


def asserted(case: Case) -> Case:
    """A statement's edit as VitaminC's: it is told as evidence, whose label becomes SUPPORTS.

    In scope is, for each other wording, the claim that follows from it and the one that it refutes, which names the
    answer of before. Out of scope are claims about other facts, with the labels that they have; every second one about
    the same relation claims of another subject what the evidence says of its own.
    """
    (old,) = case.requests
    new, true = old.target_new, old.target_true
    told: list[Probe] = []
    relation = 0
    for probe in case.probes:
        if probe.kind == "rewrite":
            told.append(Probe("rewrite", _claim(old.text, new), TRUE, FALSE))
        elif probe.kind == "paraphrase":
            told.append(replace(probe, prompt=_claim(probe.prompt, new), target=TRUE, foil=FALSE))
            told.append(replace(probe, prompt=_claim(probe.prompt, true), target=FALSE, foil=TRUE))
        else:
            relation += probe.group == "same_relation"
            said = new if probe.group == "same_relation" and relation % 2 == 0 else probe.target
            label = TRUE if said == probe.target else FALSE
            told.append(replace(probe, prompt=_claim(probe.prompt, said), target=label))
    request = EditRequest(_claim(old.prompt, new), old.subject, TRUE, FALSE)
    return Case(case.id, (request,), tuple(told))


def _claim(prompt: str, answer: str | None) -> str:
    """A statement and its answer as a sentence."""
    return f"{prompt} {answer}."


def _asked(row: Row, path: str) -> list[tuple[str, str]]:
    """(prompt, target) of each item of a list, which may be missing."""
    items: Any = row.get(path) if row.has(path) else []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise Fault(path, "is not a list of objects")
    return [
        (prompt(item.get("prompt"), f"{path}[{number}].prompt"), phrase(item.get("target"), f"{path}[{number}].target"))
        for number, item in enumerate(items)
    ]
