"""zsRE as the question answering of trained editors (De Cao et al., 2021; Mitchell et al., 2022): an answer that the
model did not give is
written, reworded questions are in scope, and Natural Questions or other questions of the set must keep their answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from edit_cli.config.schema import FilePath, Natural
from edit_cli.datasets.base import Chosen
from edit_cli.datasets.pooled import Pooled
from edit_cli.datasets.records.files import File, locate
from edit_cli.datasets.records.reading import contents
from edit_cli.datasets.records.rows import Fault, Row
from edit_cli.datasets.subjects import first_name
from edit_cli.datasets.zsre import FIELDS, PREFIX, right_answers
from edit_cli.errors import MissingError, RejectedRequest
from edit_cli.metrics.text import normalize
from edit_cli.monitor import Monitor
from edit_cli.requests import Case, EditRequest, Probe, slot_prompt
from edit_cli.wording import many
from edit_cli.writing import joined

KILT = ("id", "input", "output", "subject", "prediction", "alternatives", "rephrases", "filtered_rephrases", "meta")
FLAT = FIELDS


@dataclass(frozen=True)
class ZsREQuestions(Pooled):
    """One question a record, in KILT's form with the fields of KE (JSON lines), or in MEND's flat one.

    The new answer is an item of `alternatives` (other beams of the base model) that is neither its top answer nor a
    right one; flat records hold theirs in `alt`, and MALMEN's only `ans`, which is written.
    """

    _: KW_ONLY
    alternative: Natural | None = None
    """Which of a record's alternatives is written, from 0; null draws one."""
    rephrases: Natural = 2
    """Questions in other words, drawn from `filtered_rephrases`."""
    unrelated: Literal["nq", "zsre"] = "nq"
    """Where unrelated questions come from: Natural Questions (a record's own item, or nq_path), or other records."""
    nq_path: FilePath | None = None
    """FILE, https://… or hub:… with {"questions": [text], "answers": [text or list of texts]}."""
    locality_prefix: bool = True
    """Keep the "nq question: " of a record's own item."""

    expects: ClassVar[str] = (
        "input, output, alternatives, filtered_rephrases (KILT) or subject, src, rephrase, alt, answers (MEND) or"
        " src, rephrase, ans (MALMEN)"
    )
    fields: ClassVar[frozenset[str]] = frozenset((*KILT, *FLAT, "split"))

    def about(self, row: Row) -> str:
        if row.has("subject"):
            return row.phrase("subject")
        question = self.question(row)
        return first_name(question) or question

    def question(self, row: Row) -> str:
        """The question to edit."""
        return row.prompt("src" if row.has("src") else "input")

    def case(self, row: Row) -> Case:
        self.brought(row)  # a fault in it is the record's
        answers = self.answers(row)
        new, true = (answers[0], None) if self._is_plain(row) else (self.new_answer(row), answers[0])
        request = self.request(row, new, true)
        probes = [Probe("rewrite", request.text, new, true)]
        probes += [Probe("paraphrase", text, new, true) for text in self._rephrases(row)]
        name = row.id("id") if row.has("id") else str(row.index)
        return Case(name, (request,), tuple(probes), right=tuple(answers))

    def asked(self, row: Row, case: Case) -> tuple[str, str | None]:
        return case.requests[0].text, self.answers(row)[0]

    def _is_plain(self, row: Row) -> bool:
        """MALMEN's records hold the answer to write, and no other one."""
        return "ans" in row.values and not row.has("alt") and not row.has("alternatives")

    def request(self, row: Row, new: str, true: str | None) -> EditRequest:
        """The edit; where the subject stands in the question it becomes a slot."""
        question, subject = self.question(row), self.about(row)
        try:
            return EditRequest(slot_prompt(question, subject), subject, new, true)
        except RejectedRequest:
            if row.has("subject"):
                raise Fault("src" if row.has("src") else "input", "does not contain the subject") from None
            return EditRequest(question, None, new, true)

    def answers(self, row: Row) -> list[str]:
        """The right answers, the first of which is asked for."""
        if "output" not in row.values:
            return list(dict.fromkeys(right_answers(row)))
        output = row.get("output")
        given = [one.get("answer") for one in output if isinstance(one, dict)] if isinstance(output, list) else []
        found = [answer.strip() for answer in given if isinstance(answer, str)]
        if not any(found):
            raise Fault("output", "is not a list of objects with an answer")
        return list(dict.fromkeys(answer for answer in found if answer))

    def alternatives(self, row: Row) -> list[str]:
        """Answers that may be written: not the model's own, and none of the right ones.

        Raises:
            Fault: there is none.
        """
        path = "alternatives" if "alternatives" in row.values else "alt"
        given = row.phrases(path) if path == "alternatives" else [row.phrase(path)]
        taken = {normalize(answer) for answer in self.answers(row)}
        taken |= {normalize(row.phrase(said)) for said in ("prediction", "pred") if row.has(said)}
        left = [answer for answer in dict.fromkeys(given) if normalize(answer) not in taken]
        if not left:
            raise Fault(path, "is an answer already")
        return left

    def new_answer(self, row: Row) -> str:
        left = self.alternatives(row)
        if self.alternative is None:
            return self.drawn(row, "alternative").choice(left)
        if self.alternative >= len(left):
            raise Fault("alternatives", f"has no item {self.alternative} that is no answer already")
        return left[self.alternative]

    def _rephrases(self, row: Row) -> list[str]:
        if row.has("rephrase"):
            return [row.prompt("rephrase")]
        path = next((path for path in ("filtered_rephrases", "rephrases") if row.has(path)), None)
        found = [text for text in dict.fromkeys(row.prompts(path)) if text != self.question(row)] if path else []
        if not found:
            lacking = "rephrase" if "src" in row.values else "filtered_rephrases"
            raise Fault(path or lacking, "has no wording but the question's own" if path else "is missing or empty")
        return self.drawn(row, "rephrases").sample(found, min(self.rephrases, len(found)))

    # --- what must stay -----------------------------------------------------------------------------------------------

    def complete(self, chosen: Sequence[Chosen], pool: Sequence[Chosen], file: File, monitor: Monitor) -> list[Case]:
        if self.unrelated == "nq" and self.locality and (without := sum(not self.brought(row) for row, _ in chosen)):
            some = f"{without:,} of {many(len(chosen), 'record')}"
            monitor.note(f"{self.name}: no Natural Questions item in {some}; other records stand in for it")
        return super().complete(chosen, pool, file, monitor)

    def brought(self, row: Row) -> list[Probe]:
        if self.unrelated == "zsre":
            return []
        if self.nq_path is not None:
            items = self._natural_questions
            return [
                Probe("locality", *items[(row.index * self.locality + i) % len(items)], group="random")
                for i in range(self.locality)
            ]
        if not row.has("loc"):
            return []
        question = row.text("loc") + "?"  # the file has none
        question = question if self.locality_prefix else question.removeprefix(PREFIX)
        return [Probe("locality", question, joined(row.phrase("loc_ans"), row.join(self.join)), group="random")]

    @cached_property
    def _natural_questions(self) -> list[tuple[str, str]]:
        """(question, shortest answer) of every item of `nq_path`."""
        assert self.nq_path is not None
        file = locate(self.nq_path, self.cache_dir, Monitor(), "dataset.nq_path")
        return read_natural_questions(file.path, file.label)


def read_natural_questions(path: Path, label: str) -> list[tuple[str, str]]:
    """(question, shortest answer) of every item of `{"questions": […], "answers": […]}`; the question is capitalized
    and gets its mark.

    Raises:
        MissingError: the file is of another form.
    """
    try:
        data: Any = json.loads(contents(path, label)[0])
        pairs = list(zip(data["questions"], data["answers"], strict=True))
        found = [(_as_question(q), min([a] if isinstance(a, str) else a, key=len).strip()) for q, a in pairs]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise MissingError(
            f"dataset.nq_path: {label} is not JSON of the form {{questions: [text], answers: [text or list]}}"
        ) from None
    found = [(question, answer) for question, answer in found if answer]
    if not found:
        raise MissingError(f"dataset.nq_path: {label} holds no question with an answer")
    return found


def _as_question(text: str) -> str:
    text = text.strip().rstrip("?")
    return text[:1].upper() + text[1:] + "?"
