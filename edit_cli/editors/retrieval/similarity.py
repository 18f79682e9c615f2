"""A memory whose facts are found by how like their prompts are to what is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from edit_cli.editors.retrieval.base import Fact, FactRoute, FactsSaid
from edit_cli.errors import UsageError
from edit_cli.lm.embeddings import Embedder, EmbeddingOptions
from edit_cli.lm.model import LM


class SimilarSaid(FactsSaid):
    """embedding: the name of the model that made the keys."""

    threshold: float
    embedding: str


class SimilarRoute(FactRoute):
    """Facts, and embeddings of their prompts, (n, width).

    threshold: cosine above which a fact bears on a prompt. maker: ends with the name of what embeds.
    """

    def __init__(
        self,
        facts: Sequence[Fact],
        keys: Tensor,
        maker: str,
        threshold: float,
        embedding: EmbeddingOptions,
        embed: Embedder | None = None,
    ) -> None:
        super().__init__(facts, keys, maker)
        self.threshold, self.embedding, self.embed = threshold, embedding, embed

    def prepare(self, lm: LM) -> None:
        """Raises:
        UsageError: the embeddings are others than those of the edit.
        """
        self.lm = lm
        if self.embed is None:
            self.embed = self.embedding.load(lm)
            width = self.embed([self.facts[0].prompt]).shape[1]
            if not self.maker.endswith(self.embed.name) or self.keys.shape[1] != width:
                raise UsageError(
                    f"this edit compares prompts by other embeddings than {self.embed.name}: load the model that it was"
                    " made with"
                )

    def follow(self, front: Any) -> None:
        self.lm, self.embed = front.lm, front.embed

    def most_similar(self, prompts: Sequence[str]) -> list[int | None]:
        """The number of the fact that is most like each prompt, where it is above the threshold."""
        assert self.embed is not None
        likeness = (self.embed(prompts) @ self.memory.keys.all.T).masked_fill(~self.memory.current, -2.0)
        best, index = likeness.max(1)
        return [i if score > self.threshold else None for score, i in zip(best.tolist(), index.tolist(), strict=True)]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, rest = super().state()
        return tensors, {**rest, "threshold": self.threshold, "embedding": self.embedding.model}
