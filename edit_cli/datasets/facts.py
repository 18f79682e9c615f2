"""The user's own facts: JSON lines, a JSON list, or CSV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from edit_cli.datasets.base import Source
from edit_cli.datasets.records.rows import Fault, Row, phrase, prompt
from edit_cli.requests import Case, EditRequest, Probe

FIELDS = ("id", "prompt", "subject", "target_new", "target_true", "paraphrases", "neighbors", "split")


@dataclass(frozen=True)
class Facts(Source):
    """One fact a row: `prompt` (with a slot `{}`, or a full sentence that holds the subject), `subject`, `target_new`.

    Optional: `target_true` (what the model says now), `paraphrases` (other ways to ask), `neighbors` (prompts whose
    answer must stay; in JSON also `{prompt, target}`), `id`. Lists are JSON lists, or one text with `|` between its
    items (CSV).
    """

    expects: ClassVar[str] = "prompt, subject, target_new; optional " + ", ".join(
        ("target_true", "paraphrases", "neighbors", "id")
    )
    fields: ClassVar[frozenset[str]] = frozenset(FIELDS)

    def case(self, row: Row) -> Case:
        request = requested(row, row.phrase("subject"))
        new, true = request.target_new, request.target_true
        probes = [Probe("rewrite", request.text, new, true)]
        for path, value in _items(row, "paraphrases"):
            probes.append(Probe("paraphrase", prompt(value, path), new, true))
        for path, value in _items(row, "neighbors"):
            probes.append(_neighbor(value, path, new, true))
        return Case(row.id("id"), (request,), tuple(probes))


def requested(row: Row, subject: str | None) -> EditRequest:
    """The edit that a row asks for, wherever it comes from. subject: None where the fact is about none.

    Raises:
        Fault: it cannot be used.
    """
    new = row.phrase("target_new")
    true = row.phrase("target_true") if row.has("target_true") else None
    if new == true:
        raise Fault("target_new", "equals target_true")
    return EditRequest(row.prompt("prompt") if subject is None else row.template("prompt", subject), subject, new, true)


def _neighbor(value: Any, path: str, new: str, true: str | None) -> Probe:
    """Its answer is its own `target`, else the fact's true one (as in CounterFact), else unknown: whatever the model
    says must stay.
    """
    answer = true
    if isinstance(value, dict):
        if value.get("target") is not None:
            answer = phrase(value["target"], f"{path}.target")
        value, path = value.get("prompt"), f"{path}.prompt"
    return Probe("neighborhood", prompt(value, path), answer, None if answer is None else new)


def _items(row: Row, path: str) -> list[tuple[str, Any]]:
    if not row.has(path):
        return []
    value = row.get(path)
    if isinstance(value, str):
        value = [item.strip() for item in value.split("|")]
    if not isinstance(value, list):
        raise Fault(path, "is neither a list nor text with | between its items")
    return [(f"{path}[{position}]", item) for position, item in enumerate(value)]
