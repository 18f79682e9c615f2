"""Retrieval-augmented editing: the fact that is most like a prompt is put before it, and the model itself answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

from annotated_types import Ge, Le
from torch import Tensor

from edit_cli.config.schema import Sentence
from edit_cli.editors.base import Context, Editor, EditorConfig
from edit_cli.editors.retrieval.base import PROMPT, Fact, check_template, facts_of, prompted, told
from edit_cli.editors.retrieval.similarity import SimilarRoute, SimilarSaid
from edit_cli.lm.embeddings import HIDDEN, Embedder, EmbeddingOptions
from edit_cli.lm.routing import Answerer, Destination
from edit_cli.requests import EditRequest


@dataclass(frozen=True, kw_only=True)
class RAGConfig(EditorConfig):
    """Settings of retrieval without training."""

    threshold: Annotated[float, Ge(-1), Le(1)] = 0.9
    """Cosine of fact and prompt above which the fact goes before the prompt. Each encoder has its own scale."""
    template: Sentence = PROMPT
    """What the model reads: {fact} is prompt and new answer."""
    embedding: EmbeddingOptions = field(default_factory=lambda: EmbeddingOptions(HIDDEN))
    """What compares sentences."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self, "template")


class RAG(Editor[RAGConfig]):
    """Facts are found by an encoder that was not trained for it, and told to the unchanged model."""

    Config = RAGConfig
    mass_editor = True
    heads = ("causal", "seq2seq", "classifier")

    @classmethod
    def require(cls, config: RAGConfig, model: str, context: Context) -> None:
        config.embedding.require()

    def edit(self, requests: Sequence[EditRequest]) -> RagRoute:
        """The facts and the embeddings of their prompts."""
        config, embed = self.config, self.embed
        facts = facts_of(requests, self.lm.monitor)
        keys = embed([fact.prompt for fact in facts])
        return RagRoute(facts, keys, config.template, config.threshold, config.embedding, embed)

    @cached_property
    def embed(self) -> Embedder:
        """What compares sentences."""
        return self.context.once(("embedder", self.config.embedding), lambda: self.config.embedding.load(self.lm))


class RagSaid(SimilarSaid):
    """What a saved edit says beside the keys of its facts."""

    template: str


class RagRoute(SimilarRoute):
    """Facts in front of a model that is told them. template: of what it reads."""

    said = RagSaid

    def __init__(
        self,
        facts: Sequence[Fact],
        keys: Tensor,
        template: str,
        threshold: float,
        embedding: EmbeddingOptions,
        embed: Embedder | None = None,
        maker: str | None = None,
    ) -> None:
        name = f"{threshold} {template!r} {embed.name}" if embed is not None else maker or ""
        super().__init__(facts, keys, name, threshold, embedding, embed)
        self.template = template

    def answers(self, below: Answerer, prompts: Sequence[str]) -> list[Destination | None]:
        found = dict(zip(prompts, self.most_similar(prompts), strict=True))
        return prompted(below, self.lm.head, found, self._told)

    def _told(self, number: int, prompt: str, room: int) -> str:
        return told(self.template, self.memory.facts[number].text, prompt)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, rest = super().state()
        return tensors, {**rest, "template": self.template}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> RagRoute:
        facts, embedding = [Fact(*pair) for pair in rest["facts"]], EmbeddingOptions(rest["embedding"])
        return cls(facts, tensors["keys"], rest["template"], rest["threshold"], embedding, maker=rest["maker"])
