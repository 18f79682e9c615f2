"""What a vector of the residual stream promotes in the vocabulary: p = softmax(E v), E the output embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from edit_cli.lm.hooks import exact

if TYPE_CHECKING:
    from edit_cli.lm.model import LM

CELLS = 2**24  # logits that are held at once


@dataclass(frozen=True)
class Tops:
    """Of each of n vectors: the token that it promotes most and the one that its negative does, and the share that
    softmax gives the first.
    """

    up: Tensor
    down: Tensor
    share: Tensor


class Vocabulary:
    """The output embedding in float32. norm: whether vectors go through the model's last norm first."""

    def __init__(self, lm: LM, norm: bool = False) -> None:
        model: Any = lm.model
        head = model.get_output_embeddings()
        (name,) = (name for name, module in lm.model.named_modules() if module is head)
        self.lm = lm
        self.weight = exact(lm.access(f"{name}.weight").value()).to(lm.device)[: len(lm.tokenizer)]
        bias = getattr(head, "bias", None)
        self.bias = None if bias is None else exact(bias)[: len(lm.tokenizer)]
        last = lm.layout.final_norm
        is_norm = last != lm.layout.block(lm.layout.depth - 1)  # else the blocks end with theirs
        self.norm: nn.Module | None = lm.module(last) if norm and is_norm else None

    def logits(self, vectors: Tensor) -> Tensor:
        """(n, vocabulary) of (n, d), float32."""
        if self.norm is not None:
            vectors = exact(self.norm(vectors.to(self.lm.dtype)))
        return linear(vectors.to(self.weight), self.weight, self.bias)

    def shares(self, vectors: Tensor) -> Tensor:
        return self.logits(vectors).softmax(-1)

    @torch.no_grad()
    def best(self, vectors: Tensor) -> Tensor:
        """(n,) the token that each promotes most."""
        return torch.cat([self.logits(part).argmax(-1) for part in self._parts(vectors)])

    @torch.no_grad()
    def tops(self, vectors: Tensor) -> Tops:
        found = []
        for part in self._parts(vectors):
            logits = self.logits(part)
            down = logits if self.norm is None and self.bias is None else -self.logits(-part)
            found.append((logits.argmax(-1), down.argmin(-1), logits.softmax(-1).amax(-1)))
        return Tops(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    @torch.no_grad()
    def told(self, vector: Tensor, count: int) -> list[tuple[str, float]]:
        """The tokens that a vector promotes most, with their shares."""
        shares = self.shares(vector[None])[0]
        top = shares.topk(min(count, len(shares)))
        return [
            (self.lm.tokenizer.decode([token]), share)
            for token, share in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    @torch.no_grad()
    def ranks(self, vector: Tensor, tokens: list[int]) -> list[int]:
        """How many tokens a vector promotes more than each of these."""
        logits = self.logits(vector[None])[0]
        return [int((logits > logits[token]).sum()) for token in tokens]

    def _parts(self, vectors: Tensor) -> tuple[Tensor, ...]:
        return vectors.split(max(CELLS // len(self.weight), 1))
