"""FEVER as binary fact-checking (Thorne et al., 2018; De Cao et al., 2021; Mitchell et al., 2022): an edit flips a
claim's label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Annotated, ClassVar

from annotated_types import Ge, Le, Len

from edit_cli.config.schema import Mark, Natural, Sentence
from edit_cli.datasets.pooled import Pooled
from edit_cli.datasets.records.rows import Fault, Row
from edit_cli.datasets.subjects import first_name
from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.requests import Case, EditRequest, Probe, slot_prompt
from edit_cli.writing import joined

PUBLISHED = ("SUPPORTS", "REFUTES")
KILT = ("id", "input", "output", "rephrases", "prediction", "alternatives", "filtered_rephrases", "logit", "meta")
FLAT = ("id", "claim", "label", "verifiable", "evidence")
MALMEN = ("prompt", "equiv_prompt", "unrel_prompt", "alt", "unrel_ans")


@dataclass(frozen=True)
class Claims(Pooled):
    """What sources of claims share: the two labels, and how a claim is put to a model. Those of a model that writes are
    "True" and "False" unless others are given.
    """

    as_text: ClassVar[str | None] = "dataset.template='{} True or False? Answer:'"

    _: KW_ONLY
    labels: Annotated[list[str], Len(2, 2), Mark.DISTINCT] = field(default_factory=lambda: list(PUBLISHED))
    """What the model calls true and false claims."""
    template: Sentence | None = None
    """A question with a slot {} for the claim, for a model that writes; null: the bare claim, for a classifier."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(label.strip() for label in self.labels):
            raise UsageError(f"dataset.labels={self.labels}: give two names, first that of true claims")
        if self.template is not None and self.template.count("{}") != 1:
            raise UsageError(f"dataset.template={self.template!r}: give one slot {{}} for the claim")

    def answer_labels(self, cases: Sequence[Case]) -> tuple[str, ...] | None:
        return tuple(self.labels) if self.template is None else None

    @property
    def names(self) -> tuple[str, str]:
        """What true and false claims are called in targets."""
        if self.template is not None and tuple(self.labels) == PUBLISHED:
            return "True", "False"
        return self.labels[0], self.labels[1]

    def put(self, claim: str) -> str:
        """The claim as it is put to the model."""
        return claim if self.template is None else self.template.replace("{}", claim)

    def label(self, value: str, path: str) -> str:
        """The name of a label of the data.

        Raises:
            Fault: it is neither of the two.
        """
        if value not in PUBLISHED:
            raise Fault(path, f"is neither {PUBLISHED[0]} nor {PUBLISHED[1]}")
        return self.names[PUBLISHED.index(value)]

    def other(self, label: str) -> str:
        return self.names[1 - self.names.index(label)]

    def request(self, claim: str, subject: str | None, new: str) -> EditRequest:
        """The edit; its subject becomes a slot where it stands in the claim."""
        text = self.put(claim)
        try:
            return EditRequest(text if subject is None else slot_prompt(text, subject), subject, new, self.other(new))
        except RejectedRequest:
            return EditRequest(text, None, new, self.other(new))


@dataclass(frozen=True)
class Fever(Claims):
    """Claims with their label, which an edit flips.

    Read are KILT's records as KE prepared them, FEVER's own, and MALMEN's flat ones.

    What is flipped is the base model's `prediction` where the record has one (`alternatives` holds the flipped one),
    else the label. In scope are the rephrasings that the base model judged like the claim. A claim is about its page,
    or else the first name in it.
    """

    _: KW_ONLY
    rephrases: Natural = 2
    """Claims in other words, where the records have some."""
    flips: Annotated[float, Ge(0), Le(1)] = 1.0
    """Share of edits that flip the label; the others write what it is already, by which an editor learns to leave it
    (MEND trains and measures with 0.5)."""

    expects: ClassVar[str] = (
        "input, output, alternatives, filtered_rephrases (KILT) or claim, label (FEVER) or"
        " prompt, alt, equiv_prompt, unrel_prompt, unrel_ans (MALMEN)"
    )
    fields: ClassVar[frozenset[str]] = frozenset((*KILT, *FLAT, *MALMEN, "split"))

    def about(self, row: Row) -> str:
        claim = self._claim(row)
        return _page(row) or first_name(claim) or claim

    def case(self, row: Row) -> Case:
        claim = self._claim(row)
        true, new = self._targets(row)
        request = self.request(claim, first_name(claim), new)
        if self.drawn(row, "flip").random() >= self.flips:
            new = self.other(new)
            request = replace(request, target_new=new, target_true=None)
        probes = [Probe("rewrite", request.text, new, self.other(new))]
        probes += [Probe("paraphrase", self.put(text), new, self.other(new)) for text in self._rephrases(row, claim)]
        self.brought(row)  # a fault in it is the record's
        return Case(row.id("id"), (request,), tuple(probes), right=(true,))

    def asked(self, row: Row, case: Case) -> tuple[str, str | None]:
        return case.requests[0].text, self._targets(row)[0]

    def brought(self, row: Row) -> list[Probe]:
        if not row.has("unrel_prompt"):
            return []
        right = joined(self.label(row.phrase("unrel_ans"), "unrel_ans"), row.join(self.join))
        return [Probe("locality", self.put(row.text("unrel_prompt")), right, group="random")]

    def _claim(self, row: Row) -> str:
        return row.text(next((path for path in ("claim", "input", "prompt") if row.has(path)), "claim"))

    def _targets(self, row: Row) -> tuple[str, str]:
        """(the right label, the one to write)."""
        if row.has("alternatives"):
            new = self.label(row.phrases("alternatives")[0], "alternatives[0]")
            return self.label(_answer(row), "output[0].answer") if "output" in row.values else self.other(new), new
        if row.has("alt"):
            new = self.label(row.phrase("alt"), "alt")
            return self.other(new), new
        if "output" in row.values:
            true = self.label(_answer(row), "output[0].answer")
        else:
            true = self.label(row.phrase("label"), "label")
        return true, self.other(true)

    def _rephrases(self, row: Row, claim: str) -> list[str]:
        path = next((path for path in ("filtered_rephrases", "rephrases", "equiv_prompt") if row.has(path)), None)
        if path is None:
            return []
        found = [text for text in dict.fromkeys(text.rstrip() for text in row.prompts(path)) if text != claim]
        return self.drawn(row, "rephrases").sample(found, min(self.rephrases, len(found)))


def _answer(row: Row) -> str:
    output = row.get("output")
    if (
        not isinstance(output, list)
        or not output
        or not isinstance(output[0], dict)
        or not isinstance(output[0].get("answer"), str)
    ):
        raise Fault("output", "is not a list of objects with an answer")
    return output[0]["answer"]


def _page(row: Row) -> str | None:
    """The title of the page that the first piece of evidence is from (KILT)."""
    output = row.values.get("output")
    found = output[0].get("provenance") if isinstance(output, list) and output and isinstance(output[0], dict) else None
    title = found[0].get("title") if isinstance(found, list) and found and isinstance(found[0], dict) else None
    return title if isinstance(title, str) and title.strip() else None
