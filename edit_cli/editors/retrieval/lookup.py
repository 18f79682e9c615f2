"""LU: a manual cache.

Nothing is trained; prompts near a stored one get the stored answer, all others the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge
from torch import Tensor

from edit_cli.config.schema import Mark, NonNegative
from edit_cli.editors.base import Editor, EditorConfig
from edit_cli.editors.memory.base import nearest
from edit_cli.editors.retrieval.base import Fact, FactRoute, FactsSaid, facts_of
from edit_cli.files.tensors import Size, size
from edit_cli.lm.heads.answers import Likelihood
from edit_cli.lm.heads.base import Head
from edit_cli.lm.model import LM
from edit_cli.lm.reading import HookPoint, read
from edit_cli.lm.routing import Answerer, Destination
from edit_cli.lm.tokenization import Row
from edit_cli.requests import EditRequest
from edit_cli.writing import as_text


@dataclass(frozen=True, kw_only=True)
class LookupConfig(EditorConfig):
    """Settings of the cache."""

    mode: Literal["nearest", "exact"] = "nearest"
    """How a prompt is found: by the mean over its tokens of the final hidden state (nearest), or by its words alone,
    apart from case and spacing (exact)."""
    radius: Annotated[float, Ge(0), Mark.INFINITE] = 1.0
    """Euclidean distance within which the nearest fact answers; must be tuned for each model: too small loses
    rephrasings, too large answers for everything."""
    confidence: NonNegative = 30.0
    """Logit of a stored token, all others 0 (MEND's suite uses 1, which ranks the token first but leaves its
    probability near uniform)."""


class Lookup(Editor[LookupConfig]):
    """Manual cache (the LU baseline of Mitchell et al., 2022)."""

    Config = LookupConfig
    mass_editor = True
    heads = ("causal", "seq2seq", "classifier")
    experts = True

    def edit(self, requests: Sequence[EditRequest]) -> CacheRoute:
        """A route in front of the model; no weight changes."""
        config, facts = self.config, facts_of(requests, self.lm.monitor)
        keys = mean_states(self.lm, [fact.prompt for fact in facts])
        return CacheRoute(facts, keys, config.radius if config.mode == "nearest" else None, config.confidence)


class CacheSaid(FactsSaid):
    """What a saved cache says beside its keys."""

    radius: float | None
    confidence: float


class CacheRoute(FactRoute):
    """Stored prompts, their keys (n, width) and their answers; edits of one radius and confidence are one cache.

    radius: None for exact matches only.
    """

    said = CacheSaid

    def __init__(self, facts: Sequence[Fact], keys: Tensor, radius: float | None, confidence: float) -> None:
        super().__init__(facts, keys, f"{radius} {confidence}")
        self.radius, self.confidence = radius, confidence

    def prepare(self, lm: LM) -> None:
        self.lm = lm

    def follow(self, front: CacheRoute) -> None:
        self.lm = front.lm

    def answers(self, below: Answerer, prompts: Sequence[str]) -> list[Destination | None]:
        hits = [self.memory.latest(prompt) for prompt in prompts]
        if self.radius is not None:
            unknown = [i for i, hit in enumerate(hits) if hit is None]
            for index, hit in zip(unknown, self._nearest([prompts[i] for i in unknown]), strict=True):
                hits[index] = hit
        stored = {
            hit: StoredAnswer(self.lm.head, self.memory.facts[hit].answer, self.confidence)
            for hit in hits
            if hit is not None
        }
        return [
            None if hit is None else Destination(stored[hit], prompt) for hit, prompt in zip(hits, prompts, strict=True)
        ]

    def _nearest(self, prompts: Sequence[str]) -> list[int | None]:
        """Numbers of the nearest facts, where they lie within the radius."""
        if not prompts:
            return []
        found = nearest(mean_states(self.lm, prompts), self.memory.keys.all, self.memory.current)
        distances, numbers = (part.tolist() for part in found)
        return [n if d < self.radius else None for d, n in zip(distances, numbers, strict=True)]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, rest = super().state()
        return tensors, {**rest, "radius": self.radius, "confidence": self.confidence}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> CacheRoute:
        facts = [Fact(*pair) for pair in rest["facts"]]
        return cls(facts, tensors["keys"], rest["radius"], rest["confidence"])

    @classmethod
    def sizes(cls, lm: LM, names: Collection[str], rest: dict[str, Any]) -> dict[str, Size]:
        return {"keys": size(len(rest["facts"]), lm.layout.width)}

    def touches(self, lm: LM) -> list[str]:
        return lm.weight_names


@dataclass(frozen=True)
class StoredAnswer:
    """Answers every prompt with one text: at position j the logit of its j-th token is `confidence`, all others are
    0.
    """

    head: Head[Any]
    text: str
    confidence: float

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        classes = self.head.classes
        stored = self.head.encode([(prompt, self.text) for prompt, _ in pairs])
        return [
            self._score(row, mine.target, classes)
            for row, mine in zip(self.head.encode(list(pairs)), stored, strict=True)
        ]

    def target_logprobs(self, pairs: Sequence[tuple[str, str]]) -> list[Tensor | None]:
        """None: what it says of all other tokens is nothing that a model believes."""
        return [None] * len(pairs)

    def _score(self, row: Row, mine: tuple[int, ...], classes: int) -> Likelihood:
        hits = tuple(j < len(mine) and token == mine[j] for j, token in enumerate(row.target))
        likely = -math.log1p((classes - 1) * math.exp(-self.confidence))
        unlikely = likely - self.confidence
        after = -math.log(classes)  # past its end the stored answer says nothing
        scores = [after if j >= len(mine) else likely if hit else unlikely for j, hit in enumerate(hits)]
        predicted = tuple(mine[j] if j < len(mine) else -1 for j in range(len(row.target)))
        return Likelihood(-math.fsum(scores) / len(scores), hits, predicted)

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        return [self.head.written(prompt, self.text) for prompt in prompts]

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], max_tokens: int, top_k: int) -> list[str]:
        return [as_text(prompt, self.text) for prompt in prompts]


def mean_states(lm: LM, prompts: Sequence[str]) -> Tensor:
    """Mean over a prompt's tokens of the final hidden state (an encoder's, where there is one), (n, width) float32."""
    rows = lm.head.encode([(prompt, None) for prompt in prompts])
    return read(
        lm, rows, [len(row.ids) - 1 for row in rows], [HookPoint(lm.layout.final_norm, "output")], reduce="mean"
    )[0]
