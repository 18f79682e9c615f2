"""IKE: in-context editing.

No weight changes; the new fact and demonstrations of how to use one stand before the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from edit_cli.editors.old import Editor
from edit_cli.editors.retrieval.base import Fact, FactRoute, FactsSaid, Retold, facts_of
from edit_cli.editors.retrieval.demonstrations import KINDS, Store, headed, shown
from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.files.shapes import Rule
from edit_cli.lm.embeddings import Embedder, EmbeddingOptions
from edit_cli.lm.model import LM
from edit_cli.lm.routing import Answerer, Destination
from edit_cli.lm.weights.access import Undo
from edit_cli.requests import Case, EditRequest
from edit_cli.writing import as_text

SAME = "same"


@dataclass(kw_only=True)
class IKE(Editor):
    """Can We Edit Factual Knowledge by In-Context Learning? (Zheng et al., 2023).

    store: data set whose facts become demonstrations; "same": the records of the run's own that it neither edits nor
    asks about; null for none (PROMPT: the new fact alone). demonstrations: k of them, the nearest to the edit, the most
    similar last; shares: of their kinds copy, update, retain. copy_itself: at the end the edit demonstrates itself.
    router: none — one fact, before every prompt; embedding — the fact whose prompt is most similar, if more than
    `threshold` (cosine), else the bare prompt; auto — none while there is one fact, embedding from two on.
    """

    store: Any = None
    demonstrations: int = 32
    shares: list[int] = field(default_factory=lambda: [4, 12, 16])
    copy_itself: bool = True
    router: str = "auto"
    threshold: float = 0.7
    embedding: EmbeddingOptions = field(default_factory=EmbeddingOptions)
    seed: int = 0

    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> IkeRoute:
        """What stands before prompts, fact by fact."""
        self._refuse_wrong_words()
        facts = facts_of(requests, lm.monitor)
        if self.router == "none" and len(facts) > 1:
            raise UsageError(
                f"method.router=none puts one fact before every prompt, and {len(facts)} are edited together: "
                "give method.router=embedding, or protocol.batch_size=1"
            )
        embed = self._embedder(lm)
        by_prompt = {" ".join(request.text.lower().split()): request for request in requests}
        prefixes = [self._prefix(lm, by_prompt[fact.asked], fact, embed) for fact in facts]
        keys = (
            embed([fact.prompt for fact in facts])
            if self.router != "none"
            else torch.zeros(len(facts), 1, device=lm.device)
        )
        return IkeRoute(
            facts,
            keys,
            f"{self.router} {self.threshold} {embed.name}",
            prefixes,
            self.router,
            self.threshold,
            self.embedding,
            embed,
        )

    def require(self, model: str) -> None:
        self._refuse_wrong_words()
        self.embedding.require()

    def _embedder(self, lm: LM) -> Embedder:
        memory = self.scratch(lm)
        if "embedder" not in memory:
            memory["embedder"] = self.embedding.load(lm)
        return memory["embedder"]

    def _prefix(self, lm: LM, request: EditRequest, fact: Fact, embed: Embedder) -> list[str]:
        """Demonstrations, the most similar last, and at the very end the edit itself."""
        own = f"{as_text(headed(fact.prompt, fact.answer, fact.prompt), fact.answer)}\n\n"
        chosen: list[str] = []
        if self.store is not None and self.demonstrations:
            memory = self.scratch(lm)
            if "store" not in memory:
                with lm.monitor.phase("embed demonstrations"):
                    memory["store"] = Store(self._cases(lm), embed)
            vector = embed([f"{headed(fact.prompt, fact.answer, fact.prompt)}\n\n"])[0]
            near = memory["store"].nearest(request, vector, self.demonstrations)
            kinds = self._kinds(fact)
            chosen = [shown(told, kind) for told, kind in zip(near, kinds, strict=False)][::-1]
        return [*chosen, *([own] if self.copy_itself else [])]

    def _cases(self, lm: LM) -> Sequence[Case]:
        """The facts of the store."""
        if self.store != SAME:
            return self.store.load(None).cases
        cases = self.examples.others() if self.examples else []
        if not cases:
            lm.monitor.note(
                "there are no other records of this data set to demonstrate with, so the new fact stands alone before a"
                " prompt (dataset@method.store=NAME takes those of another one)"
            )
        return cases

    def _kinds(self, fact: Fact) -> list[str]:
        """As many of each kind as `shares` say, shuffled anew for each fact."""
        total = sum(self.shares)
        counts = [round(self.demonstrations * share / total) for share in self.shares]
        counts[-1] = self.demonstrations - sum(counts[:-1])
        kinds = [kind for kind, count in zip(KINDS, counts, strict=True) for _ in range(count)]
        random.Random(f"{self.seed} {fact.asked} {fact.answer}").shuffle(kinds)
        return kinds

    def _refuse_wrong_words(self) -> None:
        if isinstance(self.store, str) and self.store != SAME:
            raise UsageError(
                f"method.store={self.store}: choose {SAME} or null, or name a data set by dataset@method.store=NAME"
            )
        if self.router not in ("auto", "none", "embedding"):
            raise UsageError(f"method.router={self.router}: choose auto, none or embedding")
        if len(self.shares) != len(KINDS) or min(self.shares) < 0 or not sum(self.shares):
            raise UsageError(f"method.shares={self.shares}: give three numbers, the parts of {', '.join(KINDS)}")
        if self.demonstrations < 0:
            raise UsageError(f"method.demonstrations={self.demonstrations}: give 0 or more")


class IkeSaid(FactsSaid):
    """embedding: the name of the model that made the keys."""

    prefixes: list[list[str]]
    router: Literal["auto", "none", "embedding"]
    threshold: float
    embedding: str


class IkeRoute(FactRoute):
    """prefixes: what stands before a prompt, a list of texts for each fact, the least similar first.

    keys: of the facts' prompts, (n, width).
    """

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
        super().__init__(facts, keys, maker)
        self.prefixes = [list(prefix) for prefix in prefixes]
        self.router, self.threshold, self.embedding, self.embed = router, threshold, embedding, embed

    def attach(self, lm: LM) -> Undo:
        undo = super().attach(lm)
        before = len(self.shelf)
        self.shelf.extend(self.prefixes)

        def take_back() -> None:
            del self.shelf[before:]
            undo()

        return take_back

    def prepare(self, lm: LM) -> None:
        self.lm, self.shelf = lm, []  # prefixes of all facts of the memory, in its order
        if self.router != "none" and self.embed is None:
            self.embed = self.embedding.load(lm)
            width = self.embed([self.facts[0].prompt]).shape[1]
            if not self.maker.endswith(self.embed.name) or self.keys.shape[1] != width:
                raise UsageError(
                    f"this edit compares prompts by other embeddings than {self.embed.name}: load the model that it was"
                    " made with"
                )

    def follow(self, front: IkeRoute) -> None:
        if self.router == "none":
            raise UsageError(
                "method.router=none puts one fact before every prompt, and another edit of its kind is attached: give"
                " method.router=embedding"
            )
        self.lm, self.embed, self.shelf = front.lm, front.embed, front.shelf

    def answers(self, below: Answerer, prompts: Sequence[str]) -> list[Destination | None]:
        found = dict(zip(prompts, self._facts(prompts), strict=True))
        retold = Retold(below, lambda prompt, room: self._told(found[prompt], prompt, room), self.lm.head)
        self._length = {}
        return [None if found[prompt] is None else Destination(retold, prompt) for prompt in prompts]

    def _facts(self, prompts: Sequence[str]) -> list[int | None]:
        """The number of the fact that goes before each prompt."""
        if self.router == "none" or (self.router == "auto" and int(self.memory.current.sum()) == 1):
            return [len(self.memory) - 1] * len(prompts)
        likeness = (self.embed(prompts) @ self.memory.keys.all.T).masked_fill(~self.memory.current, -2.0)
        best, index = likeness.max(1)
        return [i if score > self.threshold else None for score, i in zip(best.tolist(), index.tolist(), strict=True)]

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
        rest |= {"prefixes": self.prefixes, "router": self.router, "threshold": self.threshold}
        return tensors, rest | {"embedding": self.embedding.model}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> IkeRoute:
        facts = [Fact(*pair) for pair in rest["facts"]]
        embedding = EmbeddingOptions(rest["embedding"])
        return cls(
            facts, tensors["keys"], rest["maker"], rest["prefixes"], rest["router"], rest["threshold"], embedding
        )
