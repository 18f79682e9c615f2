"""Forward passes that differ only above one block and from one token of each row on; all the rest is computed once.

By causality, a change at token t of block ℓ reaches neither tokens before t nor blocks up to ℓ. So the states that leave
block ℓ are constants, and so are the keys and values of earlier tokens in all blocks above: a cached prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from edit_cli.lm.hooks import on_output
from edit_cli.lm.model import LM
from edit_cli.lm.tokens import pad_right


@dataclass(frozen=True)
class Span:
    """One row: its tokens, the token from which it is run anew, and the positions whose logits are wanted (all ≥ start)."""

    ids: tuple[int, ...]
    start: int
    wanted: tuple[int, ...]


class FrozenPrefix(DynamicLayer):
    """A cache layer that hands out its prefix and keeps nothing: every pass starts from the same states."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class Resumption:
    """Rows whose constant part has been computed. `frozen`: the last block that no change reaches, −1 for none.

    base: float32 logits (wanted positions of all rows, vocabulary) of the unchanged model.
    """

    def __init__(self, lm: LM, spans: Sequence[Span], frozen: int, reuse_prefix: bool = True) -> None:
        self.lm, self.frozen = lm, frozen
        device = lm.device
        ids, mask = pad_right([span.ids for span in spans], lm.head.pad, device)
        starts = [span.start if reuse_prefix else 0 for span in spans]
        self.rows = torch.tensor([r for r, span in enumerate(spans) for _ in span.wanted], device=device)
        wanted = torch.tensor([c for span in spans for c in span.wanted], device=device)
        start = torch.tensor(starts, device=device)
        states: list[Tensor] = []
        with torch.no_grad(), ExitStack() as stack:
            if frozen >= 0:
                block = lm.module(lm.layout.block(frozen))
                stack.enter_context(on_output(block, lambda hidden: states.append(hidden.clone())))
            past = DynamicCache() if any(starts) else None  # without the config: no layer forgets what its window would
            self.base = lm.head.logits_at(ids, mask, self.rows, wanted, past=past)
        self.columns = wanted - start[self.rows]
        self.at = torch.tensor([span.start for span in spans], device=device) - start  # where the change enters
        self.ids, tail_mask = pad_right([span.ids[s:] for span, s in zip(spans, starts, strict=True)], lm.head.pad, device)
        self.positions = start[:, None] + torch.arange(self.ids.shape[1], device=device)
        self.states = _columns(states[0], self.positions) if states else None
        self.prefix = self._prefix(past, start, max(starts)) if any(starts) else []
        length = max(starts)
        before = torch.arange(length, device=device) >= length - start[:, None]
        self.mask = torch.cat([before.long(), tail_mask], dim=1)

    def _prefix(self, past: Cache, start: Tensor, length: int) -> list[FrozenPrefix]:
        """Keys and values of the tokens before `start`, right-aligned: (rows, heads, length, head width) a block."""
        index = start[:, None] - length + torch.arange(length, device=start.device)
        layers = []
        for number, layer in enumerate(past.layers):
            if number <= self.frozen:  # never asked for its states, only for its length
                nothing = layer.keys.new_empty(1, 1, 1, 1).expand(1, 1, length, 1)
                layers.append(FrozenPrefix(nothing, nothing))
            else:
                layers.append(FrozenPrefix(*(_prefix_columns(part, index) for part in (layer.keys, layer.values))))
        return layers

    def logits(self, change: Callable[[Tensor, Tensor, Tensor], Tensor], module: str | None = None) -> Tensor:
        """Float32 logits (wanted positions, vocabulary) after `change(states, rows, columns)` at every row's start.

        The change applies to what leaves `module`, or without one to what leaves block `frozen`.
        """
        lm, rows = self.lm, torch.arange(len(self.ids), device=self.ids.device)
        with ExitStack() as stack:
            if module is None:
                stack.enter_context(lm.skipping(self.frozen, change(self.states, rows, self.at)))
            else:
                if self.states is not None:
                    stack.enter_context(lm.skipping(self.frozen, self.states))
                stack.enter_context(on_output(lm.module(module), lambda hidden: change(hidden, rows, self.at)))
            past = Cache(layers=self.prefix) if self.prefix else None
            positions = self.positions if self.prefix else None
            logits = lm.head.logits_at(self.ids, self.mask, self.rows, self.columns, past=past, positions=positions)
        return logits

    def agrees(self, logits: Tensor, tolerance: float = 1e-3) -> bool:
        """Whether `logits` of an empty change equal the whole model's: some families do not take a cached prefix."""
        scale = self.base.abs().max().clamp_min(1.0)
        coarse = 1.0 if self.lm.dtype == torch.float32 else 50.0
        return bool((logits - self.base).abs().max() <= coarse * tolerance * scale)


def _columns(states: Tensor, positions: Tensor) -> Tensor:
    """states (rows, tokens, width) at `positions` (rows, columns), the last token standing in past the end."""
    index = positions.clamp(max=states.shape[1] - 1).to(states.device)
    return states.gather(1, index[:, :, None].expand(-1, -1, states.shape[2]))


def _prefix_columns(part: Tensor, index: Tensor) -> Tensor:
    """part (rows, heads, tokens, head width) at `index` (rows, columns); negative indices are masked, so any state will do."""
    index = index.clamp(min=0).to(part.device)
    return part.gather(2, index[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3])).contiguous()

