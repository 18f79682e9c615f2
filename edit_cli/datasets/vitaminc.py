"""VitaminC as SERAC's fact-checking (Schuster et al., 2021; Mitchell et al., 2022): evidence is asserted, claims
follow or do not.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar

from edit_cli.datasets.base import Chosen
from edit_cli.datasets.fever import PUBLISHED, Claims
from edit_cli.datasets.records.files import File
from edit_cli.datasets.records.rows import Fault, Row
from edit_cli.monitor import Monitor
from edit_cli.requests import Case, Probe

FIELDS = (
    "unique_id",
    "case_id",
    "wiki_revision_id",
    "label",
    "claim",
    "evidence",
    "page",
    "revision_type",
    "id",
    "FEVER_id",
)
NEITHER = "NOT ENOUGH INFO"
SHORTEST = 10  # words of evidence: it must have more


@dataclass(frozen=True)
class VitaminC(Claims):
    """One piece of evidence a record, asserted to be true.

    Its claim is in scope if the evidence supports or refutes it.

    If it does neither, the claim is a near miss (hard), which must keep its label, as claims about other pages must
    (easy): whatever the model says of them, no right label is used.
    """

    id_fields: ClassVar[tuple[str, ...]] = ("unique_id",)

    _: KW_ONLY
    balance: bool = False
    """Use as many records of each of the three labels as of the rarest, as SERAC trains."""
    one_a_page: bool = True
    """Use one record of a page, and of pages of which one title holds the other, so that no batch contradicts
    itself."""

    expects: ClassVar[str] = "claim, evidence, label, page, revision_type"
    fields: ClassVar[frozenset[str]] = frozenset((*FIELDS, "split"))

    def about(self, row: Row) -> str:
        return row.phrase("page")

    def case(self, row: Row) -> Case:
        if row.has("revision_type") and row.get("revision_type") != "real":
            raise Fault("revision_type", "is not real")
        claim, evidence, label = row.text("claim"), row.text("evidence"), row.phrase("label")
        if len(evidence.split()) <= SHORTEST:
            raise Fault("evidence", f"has no more than {SHORTEST} words")
        if label not in (*PUBLISHED, NEITHER):
            raise Fault("label", f"is none of {', '.join((*PUBLISHED, NEITHER))}")
        request = self.request(evidence, row.phrase("page"), self.names[0])
        probes = [Probe("rewrite", request.text, self.names[0], self.names[1])]
        if label == NEITHER:
            probes.append(Probe("locality", self.put(claim), group="hard"))
        else:
            answer = self.label(label, "label")
            probes.append(Probe("paraphrase", self.put(claim), answer, self.other(answer)))
        return Case(row.id("unique_id"), (request,), tuple(probes))

    def relation(self, row: Row, case: Case) -> str | None:
        return None

    def asked(self, row: Row, case: Case) -> tuple[str, str | None]:
        return self.put(row.text("claim")), None

    def usable(self, records: Sequence[Chosen]) -> list[Chosen]:
        kept = _one_a_page(records) if self.one_a_page else list(records)
        return _balanced(kept, self.seed) if self.balance else kept

    def complete(self, chosen: Sequence[Chosen], pool: Sequence[Chosen], file: File, monitor: Monitor) -> list[Case]:
        # claims on the same page may follow from the evidence: they are no locality
        cases = super().complete(chosen, pool, file, monitor)
        return [
            replace(case, probes=tuple(probe for probe in case.probes if probe.group != "same_subject"))
            for case in cases
        ]


def _one_a_page(records: Sequence[Chosen]) -> list[Chosen]:
    """The first record of each page, in order; a page whose title holds another's, or is held by it, counts as the
    same.
    """
    titles = [" ".join(row.phrase("page").casefold().split()) for row, _ in records]
    all_titles = set(titles)
    family = {title: min((part for part in _parts(title) if part in all_titles), key=len) for title in all_titles}
    taken: set[str] = set()
    kept = []
    for record, title in zip(records, titles, strict=True):
        if family[title] not in taken:
            taken.add(family[title])
            kept.append(record)
    return kept


def _parts(title: str) -> list[str]:
    """Every run of words of a title, itself included."""
    words = title.split()
    return [" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)]


def _balanced(records: Sequence[Chosen], seed: int) -> list[Chosen]:
    """As many of each label as of the rarest, drawn; in the order of the file."""
    by_label: dict[str, list[int]] = {}
    for number, (row, _) in enumerate(records):
        by_label.setdefault(row.phrase("label"), []).append(number)
    fewest = min(map(len, by_label.values()))
    rng = random.Random(f"{seed} balance")
    kept = {number for label in sorted(by_label) for number in rng.sample(by_label[label], fewest)}
    return [record for number, record in enumerate(records) if number in kept]
