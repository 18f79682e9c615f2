"""The keys of some documents: one forward pass a batch, and Σ k kᵀ of every layer that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edit_cli.errors import OutOfMemory, UsageError
from edit_cli.lm.hooks import StopForward, on_input
from edit_cli.lm.tokenization import by_length, pad_right

if TYPE_CHECKING:
    from edit_cli.lm.model import LM


@dataclass(frozen=True)
class Document:
    """A text and its tokens. `skip`: how many leading ones the model reads without their keys being counted (a BOS)."""

    text: str
    ids: list[int]
    skip: int = 0

    @property
    def tokens(self) -> int:
        return len(self.ids) - self.skip


class Chunk:
    """What some documents add to the sums: in float32 (or the model's dtype, if wider), on the devices where the
    layers are.
    """

    def __init__(self, lm: LM, layers: Sequence[int], batch_tokens: int) -> None:
        self.lm, self.layers, self.batch_tokens = lm, sorted(layers), batch_tokens
        self.total: dict[int, Tensor] = {}  # (m, m) by layer
        self.first: dict[int, Tensor] = {}  # Σ ‖k‖² at position 0, by layer
        self.tokens = 0

    def read(self, documents: Sequence[Document], advance: Callable[[int, int], None]) -> None:
        """Add all documents; `advance` is told the tokens counted and the documents read, batch by batch.

        Raises:
            UsageError: keys are not finite in the model's dtype. OutOfMemory: a batch does not fit the device.
        """
        documents = [document for document in documents if document.tokens > 0]
        try:
            for batch in by_length([len(document.ids) for document in documents], self.batch_tokens):
                tokens = self._add([documents[i] for i in batch])
                self.tokens += tokens
                advance(tokens, len(batch))
        except torch.OutOfMemoryError:
            raise OutOfMemory(
                f"stats.batch_tokens={self.batch_tokens} does not fit {self.lm.device}: lower it"
            ) from None
        for layer, total in self.total.items():
            total.copy_(total.triu() + total.triu(1).T)
            if not total.diagonal().isfinite().all():
                dtype = str(self.lm.dtype).removeprefix("torch.")
                raise UsageError(
                    f"keys of layer {layer} are not finite in model.dtype={dtype}; load the model in float32 or"
                    " bfloat16"
                )

    def _add(self, rows: Sequence[Document]) -> int:
        """Run the model up to the deepest layer's projection: nothing behind it is computed, the head least of all."""
        ids, mask = pad_right([row.ids for row in rows], self.lm.head.pad, self.lm.device)
        counts = mask.bool()
        counts[:, 0] = torch.tensor([not row.skip for row in rows])
        with ExitStack() as stack:
            for layer in self.layers:
                module = self.lm.module(self.lm.layout.mlp_out(layer))
                stack.enter_context(on_input(module, partial(self._see, layer, counts), rows=len(rows)))
            with suppress(StopForward):
                self.lm.model(input_ids=ids, attention_mask=mask, use_cache=False)
        return sum(row.tokens for row in rows)

    def _see(self, layer: int, counts: Tensor, keys: Tensor) -> None:
        """keys: (rows, tokens, m); counts: (rows, tokens), false where padded or skipped."""
        counts = counts.to(keys.device)
        exact = torch.promote_types(keys.dtype, torch.float32)
        kept, first = keys[counts].to(exact), keys[:, 0][counts[:, 0]].to(exact)
        if layer not in self.total:
            self.total[layer], self.first[layer] = kept.new_zeros(kept.shape[1], kept.shape[1]), kept.new_zeros(())
        add_outer_products(self.total[layer], kept)
        self.first[layer] += first.square().sum()
        if layer == self.layers[-1]:
            raise StopForward


def add_outer_products(total: Tensor, keys: Tensor) -> None:
    """Add Kᵀ K for keys (tokens, m) to the upper triangle of `total` (m, m), by bands of rows; what lies below it is no
    use.

    The product is symmetric: bands of an eighth of the width take 9/16 of the multiplications.
    """
    width = len(total)
    band = max(width // 8, 128)
    for top in range(0, width, band):
        total[top : top + band, top:].addmm_(keys[:, top : top + band].T, keys[:, top:])
