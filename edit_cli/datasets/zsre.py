"""zsRE question answering (Levy et al., 2017) as MEND prepared it (Mitchell et al., 2022), in the two uses of the
literature.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

from edit_cli.datasets.base import Source
from edit_cli.datasets.records.rows import Row
from edit_cli.datasets.subjects import first_name
from edit_cli.requests import Case, EditRequest, Probe

PREFIX = "nq question: "
FIELDS = ("subject", "src", "pred", "rephrase", "alt", "answers", "ans", "loc", "loc_ans", "cond")


@dataclass(frozen=True)
class ZsRE(Source):
    """Questions with a paraphrase and an unrelated Natural Questions item.

    Records have no id; theirs is the position in the file.

    The published reference has a dummy as the true target of a correct answer; here it has none. MALMEN's records, with
    `ans` and without a subject, are about the first name in the question.
    """

    _: KW_ONLY
    target: Literal["true", "alt"] = "true"
    """What is written: the correct answer `answers[0]`, whose aliases the others are (ROME, MEMIT, AlphaEdit), or the
    plausible wrong answer `alt` over it (MEND, EasyEdit); records with an empty one are dropped."""
    locality_prefix: bool = True
    """Keep the "nq question: " of the unrelated questions, as ROME does."""

    expects: ClassVar[str] = (
        "subject, src, rephrase, alt, answers, loc, loc_ans (MEND) or src, rephrase, ans, loc, loc_ans (MALMEN)"
    )
    fields: ClassVar[frozenset[str]] = frozenset((*FIELDS, "split"))

    def case(self, row: Row) -> Case:
        subject = row.phrase("subject") if "subject" in row.values else first_name(row.prompt("src"))
        answer, *others = right_answers(row)
        if self.target == "true":
            new, true, aliases = answer, None, tuple(dict.fromkeys(other for other in others if other != answer))
        else:
            new, true, aliases = row.phrase("alt"), answer, ()
        prompt = row.prompt("src") if subject is None else row.sentence("src", subject)
        request = EditRequest(prompt, subject, new, true)
        probes = (
            Probe("rewrite", request.text, new, aliases=aliases),
            Probe("paraphrase", row.prompt("rephrase"), new, aliases=aliases),
            Probe("locality", self._unrelated(row), row.phrase("loc_ans")),
        )
        return Case(str(row.index), (request,), probes, right=tuple(dict.fromkeys((answer, *others))))

    def _unrelated(self, row: Row) -> str:
        question = row.text("loc") + "?"  # the file has none
        return question if self.locality_prefix else question.removeprefix(PREFIX)


def right_answers(row: Row) -> list[str]:
    """The right answers, at least one: `answers`, or the one `ans` of MALMEN's records."""
    if "answers" in row.values or not row.has("ans"):
        return row.phrases("answers")
    return row.phrases("ans") if isinstance(row.get("ans"), list) else [row.phrase("ans")]
