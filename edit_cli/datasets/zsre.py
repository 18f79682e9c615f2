"""zsRE question answering (Levy et al., 2017) as MEND prepared it (Mitchell et al., 2022), in the two uses of the
literature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edit_cli.datasets.base import Source
from edit_cli.datasets.rows import Row
from edit_cli.datasets.subjects import first_name
from edit_cli.errors import UsageError
from edit_cli.requests import Case, EditRequest, Probe

PREFIX = "nq question: "
FIELDS = ("subject", "src", "pred", "rephrase", "alt", "answers", "ans", "loc", "loc_ans", "cond")


@dataclass
class ZsRE(Source):
    """Questions with a paraphrase and an unrelated Natural Questions item.

    Records have no id; theirs is the position in the file.

    `target` "true" writes the correct answer `answers[0]` (ROME, MEMIT, AlphaEdit; the other answers are its aliases);
    "alt" writes the plausible wrong answer `alt` over it (MEND, EasyEdit). The published reference has a dummy as the
    true target of the former; here it has none. `locality_prefix` keeps the "nq question: " that the unrelated
    questions begin with. MALMEN's records, with `ans` and without a subject, are about the first name in the question.
    """

    target: str = "true"
    locality_prefix: bool = True

    expects: ClassVar[str] = (
        "subject, src, rephrase, alt, answers, loc, loc_ans (MEND) or src, rephrase, ans, loc, loc_ans (MALMEN)"
    )
    fields: ClassVar[frozenset[str]] = frozenset((*FIELDS, "split"))

    def __post_init__(self) -> None:
        self.target = self.target.lower()  # the command line reads dataset.target=true as a truth value

    def check(self) -> None:
        super().check()
        if self.target not in ("true", "alt"):
            raise UsageError(f"dataset.target={self.target}: choose true or alt")

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
