"""What a scope classifier is trained on: of each case a fact, prompts that it bears on, and prompts that it does
not.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from edit_cli.editors.retrieval.base import Fact
from edit_cli.requests import Case, EditRequest

WITHIN = ("rewrite", "paraphrase", "portability", "opinion")
BEYOND = ("neighborhood", "locality")
TRIES = 20


@dataclass(frozen=True)
class ScopeExample:
    """within: (prompt, answer) in scope of the fact. beyond: prompts out of its scope.

    against: (prompt, reply) that the fact rules out.
    """

    fact: Fact
    subject: str | None
    within: tuple[tuple[str, str], ...]
    beyond: tuple[str, ...]
    against: tuple[tuple[str, str], ...] = ()

    @property
    def prompts(self) -> tuple[str, ...]:
        return (*(prompt for prompt, _ in self.within), *self.beyond)


@dataclass
class ScopeExampleSampler:
    """Samples examples. vary: share of them that are about an invented subject and in another wording of the case.

    Models that begin at random learn names and wordings by heart: two hundred subjects are too few for them to learn to
    compare names.
    """

    vary: float
    rng: random.Random

    def examples(self, cases: Sequence[Case]) -> list[ScopeExample]:
        """One a request; of each group of prompts in and out of scope one is sampled."""
        subjects = [request.subject for case in cases for request in case.requests if request.subject]
        return [self._example(case, request, subjects) for case in cases for request in case.requests]

    def _example(self, case: Case, request: EditRequest, subjects: Sequence[str]) -> ScopeExample:
        asked = [
            (probe.text, probe.target or request.target_new)
            for probe in case.probes
            if probe.kind in WITHIN and probe.group != "unwanted"
        ]
        asked = asked or [(request.text, request.target_new)]
        groups: dict[str, list[str]] = {}
        for probe in case.probes:
            if probe.kind in BEYOND:
                groups.setdefault(probe.group or probe.kind, []).append(probe.text)
        beyond = [self.rng.choice(prompts) for prompts in groups.values()]
        fact = Fact(request.text, request.target_new)
        within = [self.rng.choice(asked)]
        unwanted = [
            (probe.text, probe.target or "")
            for probe in case.probes
            if probe.kind == "opinion" and probe.group == "unwanted"
        ]
        if unwanted:
            return ScopeExample(fact, request.subject, tuple(within), tuple(beyond), (self.rng.choice(unwanted),))
        if request.subject is None or self.rng.random() >= self.vary:
            return ScopeExample(fact, request.subject, tuple(within), tuple(beyond))
        return self._varied(request.subject, fact, within, beyond, asked, subjects)

    def _varied(
        self,
        subject: str,
        fact: Fact,
        within: list[tuple[str, str]],
        beyond: list[str],
        asked: list[tuple[str, str]],
        subjects: Sequence[str],
    ) -> ScopeExample:
        name = self.invented(subject, subjects)
        same = [prompt for prompt, answer in asked if answer == fact.answer and subject in prompt]
        prompt = self.rng.choice(same or [fact.prompt])
        near = self.rng.choice(same or [fact.prompt]).replace(subject, self.namesake(name, subjects))
        return ScopeExample(
            Fact(prompt.replace(subject, name), fact.answer),
            name,
            tuple((text.replace(subject, name), answer) for text, answer in within),
            (*(text.replace(subject, name) for text in beyond), near),
        )

    def invented(self, like: str, subjects: Sequence[str]) -> str:
        """A name of as many words as `like`, each made of pieces of two others' words in that place, or one of them
        whole.
        """
        words = like.split(" ")
        pools = [
            [s.split(" ")[place] for s in subjects if s.count(" ") == len(words) - 1] or [word]
            for place, word in enumerate(words)
        ]
        return " ".join(self._word(pool, whole=len(words) > 1) for pool in pools)

    def _word(self, pool: Sequence[str], whole: bool) -> str:
        first, second = self.rng.choice(pool), self.rng.choice(pool)
        if whole and self.rng.random() < 0.3:
            return first
        cuts = [max(1, round(len(word) * self.rng.choice((0.3, 0.4, 0.5, 0.6)))) for word in (first, second)]
        return first[: cuts[0]] + second[cuts[1] :]

    def namesake(self, name: str, subjects: Sequence[str]) -> str:
        """Another subject: an invented one that shares a word with `name`, or one of `subjects`."""
        if self.rng.random() < 0.3:
            other = self.rng.choice(subjects)
            return other if other != name else f"{other}s"
        words = name.split(" ")
        for _ in range(TRIES):
            near = self.invented(name, subjects).split(" ")
            if len(words) > 1:
                place = self.rng.randrange(len(words))
                near[place] = words[place]
            if near != words:
                return " ".join(near)
        return f"{name}s"
