"""The right fact before every prompt: what a model makes of a fact that it is simply told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from edit_cli.config.schema import Sentence
from edit_cli.editors.base import Editor, EditorConfig
from edit_cli.editors.retrieval.base import (
    PROMPT,
    Fact,
    FactRoute,
    FactsSaid,
    check_template,
    facts_of,
    normalized,
    prompted,
    told,
)
from edit_cli.files.shapes import Rule
from edit_cli.lm.model import LM
from edit_cli.lm.routing import Answerer, Destination
from edit_cli.lm.weights.access import Undo
from edit_cli.requests import Case, EditRequest

BEYOND = ("neighborhood", "locality", "attribute")  # kinds of probes that a fact does not bear on


@dataclass(frozen=True, kw_only=True)
class OracleConfig(EditorConfig):
    """Settings of the oracle."""

    locality: Literal["fact", "bare"] = "fact"
    """What stands before prompts whose answers must stay: the fact, as before all others (published for IKE), or
    nothing, as if the fact were left out wherever it does not belong (bare)."""
    template: Sentence = PROMPT
    """What the model reads: {fact} is prompt and new answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self, "template")


class ICLOracle(Editor[OracleConfig]):
    """No retrieval: which fact belongs to which prompt is known from the records."""

    Config = OracleConfig
    heads = ("causal", "seq2seq", "classifier")
    experts = True

    def edit(self, requests: Sequence[EditRequest]) -> OracleRoute:
        """Without records, a fact belongs to its own prompt alone."""
        return self._route(requests, {request.text: {request.text: True} for request in requests})

    def edit_cases(self, cases: Sequence[Case]) -> OracleRoute:
        """A case's facts belong to all of its probes."""
        scopes: dict[str, dict[str, bool]] = {}
        for case in cases:
            asked = {probe.text: probe.kind not in BEYOND for probe in case.probes}
            if self.config.locality == "bare":
                asked = {prompt: within for prompt, within in asked.items() if within}
            for request in case.requests:
                scopes.setdefault(request.text, {}).update({**asked, request.text: True})
        return self._route([request for case in cases for request in case.requests], scopes)

    def _route(self, requests: Sequence[EditRequest], scopes: Mapping[str, Mapping[str, bool]]) -> OracleRoute:
        facts = facts_of(requests, self.lm.monitor)
        known: dict[str, dict[str, bool]] = {}
        for prompt, scope in scopes.items():
            known.setdefault(normalized(prompt), {}).update(scope)
        return OracleRoute(facts, [known[fact.asked] for fact in facts], self.config.template)


class OracleSaid(FactsSaid):
    """scopes: of each fact, the prompts that it stands before, and whether it bears on them."""

    scopes: list[dict[str, bool]]
    template: str


class OracleRoute(FactRoute):
    """scopes: of each fact, {prompt that it stands before: whether the fact bears on it}."""

    said = Annotated[OracleSaid, Rule(lambda said: len(said["scopes"]) == len(said["facts"]), "a scope for every fact")]

    def __init__(self, facts: Sequence[Fact], scopes: Sequence[Mapping[str, bool]], template: str) -> None:
        super().__init__(facts, torch.zeros(len(facts), 1), template)
        self.scopes, self.template = [dict(scope) for scope in scopes], template

    def attach(self, lm: LM) -> Undo:
        with ExitStack() as undo:
            undo.callback(super().attach(lm))
            first = len(self.memory) - len(self.facts)
            for number, scope in enumerate(self.scopes, first):
                for prompt, within in scope.items():
                    here = self.known.setdefault(normalized(prompt), [])
                    here.append((within, number))
                    undo.callback(here.pop)
            return undo.pop_all().close

    def prepare(self, lm: LM) -> None:
        self.lm = lm
        self.known: dict[str, list[tuple[bool, int]]] = {}  # of all facts of the memory

    def follow(self, front: OracleRoute) -> None:
        self.lm, self.known = front.lm, front.known

    def answers(self, below: Answerer, prompts: Sequence[str]) -> list[Destination | None]:
        found = {prompt: self._facts(prompt) or None for prompt in prompts}
        return prompted(below, self.lm.head, found, self._told)

    def _facts(self, prompt: str) -> list[Fact]:
        """Those that bear on a prompt; where none does, those of the records that ask it."""
        known = self.known.get(normalized(prompt), [])
        own = [number for within, number in known if within] or [number for _, number in known]
        latest = {self.memory.latest(self.memory.facts[number].prompt) for number in own}
        return [self.memory.facts[number] for number in sorted(number for number in latest if number is not None)]

    def _told(self, facts: Sequence[Fact], prompt: str, room: int) -> str:
        """All of the facts, a line each; of several, the latest that the context holds."""

        def count(text: str) -> int:
            return len(self.lm.tokenizer(text)["input_ids"])

        left = self.lm.head.max_length - room - count(told(self.template, "", prompt))
        kept: list[str] = []
        for text in (fact.text for fact in reversed(facts)):
            left -= count(f"{text}\n")
            if kept and left < 0:
                break
            kept.append(text)
        return told(self.template, "\n".join(reversed(kept)), prompt)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, rest = super().state()
        return tensors, {**rest, "scopes": self.scopes, "template": self.template}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> OracleRoute:
        return cls([Fact(*pair) for pair in rest["facts"]], rest["scopes"], rest["template"])
