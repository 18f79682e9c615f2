"""Demonstrations for in-context editing: facts of a data set, told as a model should answer once a new fact stands
before a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edit_cli.editors.retrieval.base import PROMPT, told
from edit_cli.lm.embeddings import Embedder
from edit_cli.requests import Case, EditRequest
from edit_cli.writing import as_text

KINDS = ("copy", "update", "retain")


@dataclass(frozen=True)
class Told:
    """A fact of the store.

    text: with its new answer; subject: whom it is about; asked: {kind: (prompt, answer) after the new fact}.
    """

    prompt: str
    answer: str
    subject: str | None
    asked: dict[str, tuple[str, str]]


def tell(case: Case) -> list[Told]:
    """copy asks the edited prompt, update a paraphrase, retain a prompt whose answer stays.

    What a case lacks is told as a copy.
    """
    paraphrase = next((probe.text for probe in case.probes if probe.kind == "paraphrase"), None)
    kept = next(
        (
            (probe.text, probe.target)
            for probe in case.probes
            if probe.kind in ("neighborhood", "locality") and probe.target
        ),
        None,
    )
    found = []
    for request in case.requests:
        copy = (request.text, request.target_new)
        asked = {
            "copy": copy,
            "update": (paraphrase, request.target_new) if paraphrase else copy,
            "retain": kept or copy,
        }
        found.append(Told(request.text, request.target_new, request.subject, asked))
    return found


class Store:
    """Facts to demonstrate with, and the embedding of each (n, width), computed once."""

    def __init__(self, cases: Sequence[Case], embed: Embedder) -> None:
        self.facts = [fact for case in cases for fact in tell(case)]
        self.vectors: Tensor = embed([shown(fact, "copy") for fact in self.facts]) if self.facts else torch.zeros(0, 0)

    def nearest(self, request: EditRequest, vector: Tensor, count: int) -> list[Told]:
        """The facts that are most like an edit, most similar first.

        None is about its subject: that would tell the answer to what is asked.
        """
        if not self.facts:
            return []
        order = (self.vectors @ vector.to(self.vectors)).argsort(descending=True, stable=True).tolist()
        apart = (self.facts[i] for i in order if not _about(self.facts[i], request))
        return [fact for fact, _ in zip(apart, range(count), strict=False)]


def _about(fact: Told, request: EditRequest) -> bool:
    return fact.prompt == request.text or (fact.subject is not None and fact.subject == request.subject)


def headed(prompt: str, answer: str, asked: str) -> str:
    """A prompt with a new fact before it."""
    return told(PROMPT, as_text(prompt, answer), asked)


def shown(fact: Told, kind: str) -> str:
    """One demonstration."""
    prompt, answer = fact.asked[kind]
    return f"{as_text(headed(fact.prompt, fact.answer, prompt), answer)}\n\n"
