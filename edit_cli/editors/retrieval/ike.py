"""IKE: in-context editing.

No weight changes; the new fact and demonstrations of how to use one stand before the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from edit_cli.config.schema import Linked, Natural, Seed
from edit_cli.editors.base import Context, Editor, EditorConfig
from edit_cli.editors.retrieval.base import Fact, facts_of, normalized, prompted
from edit_cli.editors.retrieval.demonstrations import KINDS, Store, headed, shown
from edit_cli.editors.retrieval.similarity import SimilarRoute, SimilarSaid
from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.files.shapes import Rule
from edit_cli.lm.embeddings import Embedder, EmbeddingOptions
from edit_cli.lm.model import LM
from edit_cli.lm.routing import Answerer, Destination
from edit_cli.lm.weights.access import Undo
from edit_cli.requests import Case, EditRequest
from edit_cli.writing import as_text

SAME = "same"


@dataclass(frozen=True, kw_only=True)
class IKEConfig(EditorConfig):
    """Settings of in-context editing."""

    store: Any = SAME
    """Whose facts become demonstrations: the records of the run's own data set that it neither edits nor asks about
    (same), a data set (dataset@method.store=NAME), or null for none (PROMPT: the new fact alone)."""
    demonstrations: Natural = 32
    """Facts of the store that are most like the edit, the most similar last; the least similar go where the context is
    too short."""
    shares: list[Natural] = field(default_factory=lambda: [4, 12, 16])
    """Parts of them that are shown as copy (the edited prompt), update (a paraphrase) and retain (an answer that
    stays)."""
    copy_itself: bool = True
    """Whether the edit demonstrates itself at the end."""
    router: Literal["auto", "none", "embedding"] = "auto"
    """Which fact goes before a prompt: the only one, before every prompt (none); the one that is most similar, or none
    (embedding); auto: embedding from two facts on."""
    threshold: float = 0.7
    """Cosine of fact and prompt above which the router puts the fact before the prompt."""
    embedding: EmbeddingOptions = field(default_factory=EmbeddingOptions)
    """What compares sentences."""
    seed: Annotated[Seed, Linked("${seed}")] = 0
    """Of the order of the kinds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.store, str) and self.store != SAME:
            raise UsageError(
                f"method.store={self.store}: choose {SAME} or null, or name a data set by dataset@method.store=NAME"
            )
        if len(self.shares) != len(KINDS) or not sum(self.shares):
            raise UsageError(f"method.shares={self.shares}: give three numbers, the parts of {', '.join(KINDS)}")


class IKE(Editor[IKEConfig]):
    """Can We Edit Factual Knowledge by In-Context Learning? (Zheng et al., 2023)."""

    Config = IKEConfig
    experts = True

    @classmethod
    def require(cls, config: IKEConfig, model: str, context: Context) -> None:
        config.embedding.require()

    def edit(self, requests: Sequence[EditRequest]) -> IkeRoute:
        """What stands before prompts, fact by fact."""
        lm, config = self.lm, self.config
        facts = facts_of(requests, lm.monitor)
        if config.router == "none" and len(facts) > 1:
            raise UsageError(
                f"method.router=none puts one fact before every prompt, and {len(facts)} are edited together: "
                "give method.router=embedding, or protocol.batch_size=1"
            )
        by_prompt = {normalized(request.text): request for request in requests}
        prefixes = [self._prefix(by_prompt[fact.asked], fact) for fact in facts]
        keys = (
            self.embed([fact.prompt for fact in facts])
            if config.router != "none"
            else torch.zeros(len(facts), 1, device=lm.device)
        )
        maker = f"{config.router} {config.threshold} {self.embed.name}"
        return IkeRoute(facts, keys, maker, prefixes, config.router, config.threshold, config.embedding, self.embed)

    @cached_property
    def embed(self) -> Embedder:
        """What compares sentences."""
        return self.context.once(("embedder", self.config.embedding), lambda: self.config.embedding.load(self.lm))

    @cached_property
    def store(self) -> Store:
        """The facts to demonstrate with."""
        with self.lm.monitor.phase("embed demonstrations"):
            return Store(self._cases(), self.embed)

    def _prefix(self, request: EditRequest, fact: Fact) -> list[str]:
        """Demonstrations, the most similar last, and at the very end the edit itself."""
        own = f"{as_text(headed(fact.prompt, fact.answer, fact.prompt), fact.answer)}\n\n"
        chosen: list[str] = []
        if self.config.store is not None and self.config.demonstrations:
            vector = self.embed([f"{headed(fact.prompt, fact.answer, fact.prompt)}\n\n"])[0]
            near = self.store.nearest(request, vector, self.config.demonstrations)
            chosen = [shown(told, kind) for told, kind in zip(near, self._kinds(fact), strict=False)][::-1]
        return [*chosen, *([own] if self.config.copy_itself else [])]

    def _cases(self) -> Sequence[Case]:
        """The facts of the store."""
        if self.config.store != SAME:
            return self.config.store.load(None).cases
        cases = self.context.examples.others() if self.context.examples else []
        if not cases:
            self.lm.monitor.note(
                "there are no other records of this data set to demonstrate with, so the new fact stands alone before a"
                " prompt (dataset@method.store=NAME takes those of another one)"
            )
        return cases

    def _kinds(self, fact: Fact) -> list[str]:
        """As many of each kind as `shares` say, shuffled anew for each fact."""
        total, shares = self.config.demonstrations, self.config.shares
        counts = [round(total * share / sum(shares)) for share in shares]
        counts[-1] = total - sum(counts[:-1])
        kinds = [kind for kind, count in zip(KINDS, counts, strict=True) for _ in range(count)]
        random.Random(f"{self.config.seed} {fact.asked} {fact.answer}").shuffle(kinds)
        return kinds


class IkeSaid(SimilarSaid):
    """What a saved edit says beside the keys of its facts."""

    prefixes: list[list[str]]
    router: Literal["auto", "none", "embedding"]


class IkeRoute(SimilarRoute):
    """prefixes: what stands before a prompt, a list of texts for each fact, the least similar first."""

    said = Annotated[
        IkeSaid, Rule(lambda said: len(said["prefixes"]) == len(said["facts"]), "as many prefixes as facts")
    ]

    def __init__(
        self,
        facts: Sequence[Fact],
        keys: Tensor,
        maker: str,
        prefixes: Sequence[Sequence[str]],
        router: str,
        threshold: float,
        embedding: EmbeddingOptions,
        embed: Embedder | None = None,
    ) -> None:
        super().__init__(facts, keys, maker, threshold, embedding, embed)
        self.prefixes, self.router = [list(prefix) for prefix in prefixes], router

    def attach(self, lm: LM) -> Undo:
        undo = super().attach(lm)
        before = len(self.shelf)
        self.shelf.extend(self.prefixes)

        def take_back() -> None:
            del self.shelf[before:]
            undo()

        return take_back

    def prepare(self, lm: LM) -> None:
        self.lm = lm
        self.shelf: list[Any] = []  # prefixes of all facts of the memory, in its order
        if self.router != "none":
            super().prepare(lm)

    def follow(self, front: IkeRoute) -> None:
        if self.router == "none":
            raise UsageError(
                "method.router=none puts one fact before every prompt, and another edit of its kind is attached: give"
                " method.router=embedding"
            )
        super().follow(front)
        self.shelf = front.shelf

    def answers(self, below: Answerer, prompts: Sequence[str]) -> list[Destination | None]:
        self._length: dict[str, int] = {}
        return prompted(below, self.lm.head, dict(zip(prompts, self._facts(prompts), strict=True)), self._told)

    def _facts(self, prompts: Sequence[str]) -> list[int | None]:
        """The number of the fact that goes before each prompt."""
        if self.router == "none" or (self.router == "auto" and int(self.memory.current.sum()) == 1):
            return [len(self.memory) - 1] * len(prompts)
        return self.most_similar(prompts)

    def _told(self, number: int, prompt: str, room: int) -> str:
        """Prompt and all that stands before it; demonstrations that the context does not hold are left out, the least
        similar first.

        Raises:
            RejectedRequest: the new fact and the prompt alone are too long.
        """
        fact = self.memory.facts[number]
        head, end = self.lm.head, headed(fact.prompt, fact.answer, prompt)
        left = head.max_length - room - self._tokens(end)
        if left < 0:
            raise RejectedRequest(
                f"the new fact and the prompt are more than the model's {head.max_length} tokens: {prompt[:60]!r}…"
            )
        kept: list[str] = []
        for text in reversed(self.shelf[number]):
            left -= self._tokens(text)
            if left < 0:
                break
            kept.append(text)
        return "".join(reversed(kept)) + end

    def _tokens(self, text: str) -> int:
        if text not in self._length:
            self._length[text] = len(self.lm.tokenizer(text)["input_ids"])
        return self._length[text]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, rest = super().state()
        return tensors, rest | {"prefixes": self.prefixes, "router": self.router}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> IkeRoute:
        facts = [Fact(*pair) for pair in rest["facts"]]
        embedding = EmbeddingOptions(rest["embedding"])
        return cls(
            facts, tensors["keys"], rest["maker"], rest["prefixes"], rest["router"], rest["threshold"], embedding
        )
