"""Facts that a model already knows, as ROME traced them: nothing new to write, only what to ask and the expected
answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edit_cli.datasets.base import Source
from edit_cli.datasets.records.rows import Row
from edit_cli.requests import Case, EditRequest, Probe

FIELDS = ("known_id", "subject", "attribute", "template", "prediction", "prompt", "relation_id")


@dataclass(frozen=True)
class KnownFacts(Source):
    """One fact a row: `prompt` (a sentence that holds the `subject`, up to its answer) and `attribute`, the answer.

    `template` is ignored: some prompts go on after it. The answer is both the true and the new target.
    """

    expects: ClassVar[str] = "known_id, subject, attribute, prompt"
    fields: ClassVar[frozenset[str]] = frozenset((*FIELDS, "split"))

    def case(self, row: Row) -> Case:
        subject, answer = row.phrase("subject"), row.phrase("attribute")
        request = EditRequest(row.sentence("prompt", subject), subject, answer, answer)
        return Case(row.id("known_id"), (request,), (Probe("rewrite", request.text, answer),))
