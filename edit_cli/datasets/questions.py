"""Anybody's questions with their right answers, which `prepare` makes records of for KE, MEND and their kin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from edit_cli.datasets.base import Source
from edit_cli.datasets.records.rows import Fault, Row, phrase
from edit_cli.errors import RejectedRequest
from edit_cli.requests import Case, EditRequest, Probe, slot_prompt

QUESTION = ("question", "input", "src", "prompt")  # under which of these names a record holds it
ANSWER = ("answers", "answer", "output", "target_true")


@dataclass(frozen=True)
class Questions(Source):
    """One question a record, with one right answer or several, the first of which is asked for.

    An edit writes that answer: to write another one, which the model might have given, let `prepare` make the
    alternatives. Optional: `subject`, `rephrases` (the question in other words), `id`, `split`.
    """

    expects: ClassVar[str] = "question, answers (a text or a list); optional subject, rephrases, id"
    fields: ClassVar[frozenset[str]] = frozenset((*QUESTION, *ANSWER, "subject", "rephrases", "id", "split"))

    def case(self, row: Row) -> Case:
        text, answers = row.prompt(_first(row, QUESTION)), _answers(row)
        request = EditRequest(text, None, answers[0])
        if row.has("subject"):
            subject = row.phrase("subject")
            try:
                request = EditRequest(slot_prompt(text, subject), subject, answers[0])
            except RejectedRequest:
                raise Fault("subject", "does not occur in the question") from None
        reworded = [other for other in row.prompts("rephrases", required=False) if other != text]
        probes = [Probe("rewrite", text, answers[0]), *(Probe("paraphrase", one, answers[0]) for one in reworded)]
        return Case(row.id("id"), (request,), tuple(probes), right=tuple(answers))


def _first(row: Row, names: tuple[str, ...]) -> str:
    """The name under which the record holds something."""
    return next((name for name in names if row.has(name)), names[0])


def _answers(row: Row) -> list[str]:
    """The right answers: a text, a list of texts, or KILT's list of objects."""
    name = _first(row, ANSWER)
    given: Any = row.get(name)
    several = given if isinstance(given, list) else [given]
    found = []
    for place, one in enumerate(several):
        if isinstance(one, dict):
            if one.get("answer") is None:  # KILT's evidence stands in objects of its own
                continue
            one = one["answer"]
        found.append(phrase(one, f"{name}[{place}]" if isinstance(given, list) else name))
    if not found:
        raise Fault(name, "holds no answer")
    return list(dict.fromkeys(found))
