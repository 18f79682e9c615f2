"""Scope classifiers: does a stored fact bear on a prompt?

By the distance of two embeddings, or by reading both at once (SERAC, section 3).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from edit_cli.config.schema import Config, Count, Natural, Positive, SettingError
from edit_cli.editors.memory.base import nearest
from edit_cli.editors.retrieval.base import Fact, FactMemory
from edit_cli.errors import UsageError
from edit_cli.lm.auxiliary_model import AuxiliaryModelConfig
from edit_cli.lm.embeddings import MINILM, packaged_minilm, pooled
from edit_cli.writing import bare

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD_GAIN = 0.2  # of the linear map at first
IN_SCOPE = 0  # class of the cross-attention classifier
TINY = 1e-6  # of squared distances, below which two texts count as one; and of 1 - p


@dataclass(frozen=True, kw_only=True)
class ScopeConfig(Config):
    """The classifier g."""

    place = "method.scope"

    kind: Literal["embedding", "cross"] | None = None
    """Two texts and the distance of their embeddings, or both texts in one, read by a classifier; null: as published,
    cross for models that choose a label (fact-checking), embedding for those that write."""
    model: AuxiliaryModelConfig = field(default_factory=AuxiliaryModelConfig)
    """The encoder."""
    trained_blocks: Natural | None = None
    """Topmost blocks of the encoder that are trained; null: all of it; 0: nothing, only the head is."""
    pooling: Literal["cls", "last", "mean"] = "cls"
    """Of an embedding: state of the first token, of the last one (causal encoders), or the mean."""
    head: Count | None = None
    """Of an embedding: width of a linear map on top of the pooled state; null: none, as published."""
    describes: Literal["fact", "prompt"] = "fact"
    """What of a fact is embedded: prompt and answer (`prompt [SEP] answer [SEP]`), as published, or its prompt."""
    scale: Positive = 1.0
    """s in g = exp(-s d²)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind != "cross" and self.trained_blocks == 0 and self.head is None:
            raise SettingError(
                self.place,
                "trained_blocks",
                "=0 leaves nothing of the classifier to train: give it a method.scope.head, such as 128",
            )

    def build(self, own_tokenizer: Any, batch_tokens: int, edited: str) -> Scope:
        """edited: kind of the edited model.

        Raises:
            UsageError: more blocks are to be trained than there are.
        """
        kind = self.kind or ("cross" if edited == "classifier" else "embedding")
        model, tokenizer = self.encoder().build(
            "encoder" if kind == "embedding" else "classifier", own_tokenizer, "method.scope.model"
        )
        if self.trained_blocks is not None:
            blocks = _blocks(model)
            if self.trained_blocks > len(blocks):
                raise UsageError(
                    f"method.scope.trained_blocks={self.trained_blocks}: the encoder has {len(blocks)}; null trains all"
                    " of it"
                )
            for module in (model.base_model, *blocks[len(blocks) - self.trained_blocks :]):
                module.requires_grad_(module is not model.base_model)
        if kind == "cross":
            return CrossScope(model, tokenizer, batch_tokens)
        return EmbeddingScope(model, tokenizer, batch_tokens, self)

    def encoder(self) -> AuxiliaryModelConfig:
        """`model`, from the package that holds MiniLM where it is asked for and installed."""
        packaged = packaged_minilm() if self.model.checkpoint == MINILM else None
        return replace(self.model, checkpoint=str(packaged)) if packaged else self.model


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The encoder's blocks, from the bottom."""
    depth = model.config.num_hidden_layers
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)


class Scope(nn.Module, ABC):
    """g(fact, prompt) in [0, 1]: how likely the fact bears on the prompt."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, batch_tokens: int) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens

    def descriptor(self, fact: Fact) -> str:
        """What stands for a fact: `prompt [SEP] answer [SEP]`; tokenizers without a separator get spaces."""
        return " ".join(part for part in (fact.prompt, self.separator, bare(fact.answer), self.separator) if part)

    @property
    def separator(self) -> str:
        return self.tokenizer.sep_token or ""

    @abstractmethod
    def keys(self, facts: Sequence[Fact]) -> Tensor:
        """(facts, width) what is kept of each fact, so that no prompt needs it read again."""

    @abstractmethod
    def pairs(self, facts: Sequence[Fact], prompts: Sequence[str], which: Tensor) -> tuple[Tensor, Tensor]:
        """(log g, log(1 - g)) of the pairs `which` (n, 2) of a fact and a prompt, by their numbers. Differentiable."""

    @abstractmethod
    def best(self, memory: FactMemory, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(g, number) of the fact that is most in scope of each prompt."""


class EmbeddingScope(Scope):
    """g = exp(-s d²), d the distance of the fact's embedding from the prompt's; in scope while s d² < ln 2."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, batch_tokens: int, config: ScopeConfig) -> None:
        super().__init__(model, tokenizer, batch_tokens)
        self.pooling, self.scale, self.describes = config.pooling, config.scale, config.describes
        self.head = _head(model.config.hidden_size, config.head)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(texts, width)."""
        return self.head(pooled(self.model, self.tokenizer, texts, self.pooling, self.batch_tokens))

    def descriptor(self, fact: Fact) -> str:
        return fact.prompt if self.describes == "prompt" else super().descriptor(fact)

    @torch.no_grad()
    def keys(self, facts: Sequence[Fact]) -> Tensor:
        return self.embed([self.descriptor(fact) for fact in facts])

    def pairs(self, facts: Sequence[Fact], prompts: Sequence[str], which: Tensor) -> tuple[Tensor, Tensor]:
        states = self.embed([*map(self.descriptor, facts), *prompts])
        gaps = states[: len(facts)][which[:, 0]] - states[len(facts) :][which[:, 1]]
        distances = self.scale * gaps.square().sum(-1)
        return -distances, (-torch.expm1(-distances.clamp(min=TINY))).log()

    @torch.no_grad()
    def best(self, memory: FactMemory, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        distance, index = nearest(self.embed(prompts), memory.keys.all, memory.current)
        return (-self.scale * distance.square()).exp(), index


def _head(width: int, out: int | None) -> nn.Module:
    """A linear map of normalized states. It begins short: all distances near ln 2, neither far nor zero."""
    if out is None:
        return nn.Identity()
    linear = nn.Linear(width, out, bias=False)
    nn.init.orthogonal_(linear.weight, gain=HEAD_GAIN)
    return nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), linear)


class CrossScope(Scope):
    """g = softmax of a classifier that reads `fact [SEP] [SEP] prompt`; class 0 is in scope.

    One pass for each fact and prompt.
    """

    def keys(self, facts: Sequence[Fact]) -> Tensor:
        return torch.zeros(len(facts), 0, device=self.device)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def pairs(self, facts: Sequence[Fact], prompts: Sequence[str], which: Tensor) -> tuple[Tensor, Tensor]:
        texts = [self._joined(facts[i], prompts[j]) for i, j in which.tolist()]
        logits = self._logits(texts)
        first, second = logits.log_softmax(-1).unbind(-1)
        return (first, second) if IN_SCOPE == 0 else (second, first)

    @torch.no_grad()
    def best(self, memory: FactMemory, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        valid = memory.current.nonzero()[:, 0]
        scores = []
        for prompt in prompts:
            texts = [self._joined(memory.facts[i], prompt) for i in valid.tolist()]
            scores.append(self._logits(texts).softmax(-1)[:, IN_SCOPE])
        best, place = torch.stack(scores).max(1)
        return best, valid[place]

    def _joined(self, fact: Fact, prompt: str) -> str:
        return " ".join(part for part in (self.descriptor(fact), self.separator or "|", prompt) if part)

    def _logits(self, texts: Sequence[str]) -> Tensor:
        from edit_cli.lm.tokenization import by_length, pad_right
        from edit_cli.lm.vocabulary import Vocabulary

        vocabulary = Vocabulary.of(self.model, self.tokenizer)
        ids = [vocabulary.readable(row) for row in self.tokenizer(list(texts))["input_ids"]]
        pad = vocabulary.pad(self.tokenizer.pad_token_id)
        parts, order = [], []
        for batch in by_length([len(row) for row in ids], self.batch_tokens):
            rows, mask = pad_right([ids[i] for i in batch], pad, self.device)
            parts.append(self.model(input_ids=rows, attention_mask=mask).logits.float())
            order += batch
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        return torch.cat(parts)[back.to(self.device)]
