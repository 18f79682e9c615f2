"""Forward passes that differ only above one block and from one token of each row on; all the rest is computed once.

By causality, a change at token t of block ℓ reaches neither tokens before t nor blocks up to ℓ. So the states that
leave block ℓ are constants, and so are the keys and values of earlier tokens in all blocks above: a cached prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from edit_cli.lm.fast.prefix_cache import Prefilled, PrefixCache, close, common_lengths, placeholder, take_columns
from edit_cli.lm.fast.token_pruning import prune_unread_tokens
from edit_cli.lm.hooks import on_output
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import pad_right


@dataclass(frozen=True)
class SuffixRow:
    """One row: its tokens, the token from which it is run anew, and the positions whose logits are wanted (all ≥
    start).
    """

    ids: tuple[int, ...]
    start: int
    wanted: tuple[int, ...]


class FrozenPrefix(Prefilled):
    """A cache layer that hands out its prefix and keeps nothing: every pass starts from the same states."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class SuffixForward:
    """Rows whose constant part has been computed. `frozen`: the last block that no change reaches, −1 for none.

    reuse_prefix: whether tokens before the start are kept as cached keys and values (where the family has such a
    cache).
    prune_from: the first block that is not changed inside, but only by what enters it at the rows' starts; null for
    none. From it on MLPs are spared the tokens that nobody reads, and rows share their beginnings. Only for callers
    without hooks of their own in those blocks, which would see a few tokens in place of (rows, tokens).

    base: float32 logits (wanted positions of all rows, vocabulary) of the unchanged model.
    """

    def __init__(
        self,
        lm: LM,
        suffixes: Sequence[SuffixRow],
        frozen: int,
        reuse_prefix: bool = True,
        prune_from: int | None = None,
    ) -> None:
        self.lm, self.frozen = lm, frozen
        self.prune_from = prune_from if prune_from is not None and lm.takes_shortcuts else None
        device = lm.device
        reuse_prefix = reuse_prefix and lm.head.caches_keys
        starts = [suffix.start if reuse_prefix else 0 for suffix in suffixes]
        start = torch.tensor(starts, device=device)
        self.rows = torch.tensor([r for r, suffix in enumerate(suffixes) for _ in suffix.wanted], device=device)
        wanted = torch.tensor([c for suffix in suffixes for c in suffix.wanted], device=device)
        self.columns = wanted - start[self.rows]
        self.at = torch.tensor([suffix.start for suffix in suffixes], device=device) - start  # where the change enters
        self.ids, self.tail = pad_right(
            [suffix.ids[s:] for suffix, s in zip(suffixes, starts, strict=True)], lm.head.pad, device
        )
        self.positions = start[:, None] + torch.arange(self.ids.shape[1], device=device)
        length = max(starts)
        self.before = (torch.arange(length, device=device) >= length - start[:, None]).long()
        self._run_whole(suffixes, starts, wanted)

    @torch.no_grad()
    def _run_whole(self, suffixes: Sequence[SuffixRow], starts: list[int], wanted: Tensor) -> None:
        """One pass over all tokens: states that leave block `frozen`, keys and values of the prefixes above it,
        logits.
        """
        lm, length, device = self.lm, self.before.shape[1], self.ids.device
        rows, every = [suffix.ids for suffix in suffixes], range(len(suffixes))
        prunes = self.prune_from is not None
        prefixes = PrefixCache(lm, rows, common_lengths(rows, starts) if prunes else [0] * len(rows))
        skipped = torch.tensor(prefixes.lengths, device=device)
        ids, mask = pad_right([row[n:] for row, n in zip(rows, prefixes.lengths, strict=True)], lm.head.pad, device)
        # without the config: no layer forgets what lies outside its window
        past: Cache | None = DynamicCache() if length else None
        positions: Tensor | None = None
        if prefixes.width:
            past, positions = (
                prefixes.cache(prefixes.run(), every),
                skipped[:, None] + torch.arange(ids.shape[1], device=device),
            )
        states: list[Tensor] = []
        with ExitStack() as stack:
            if self.frozen >= 0:
                block = lm.module(lm.layout.block(self.frozen))
                stack.enter_context(on_output(block, lambda hidden: states.append(hidden.clone())))
            columns = wanted - skipped[self.rows]
            if prunes:  # all states that leave a frozen block are kept, in the last one too
                prune_unread_tokens(
                    stack, lm, range(lm.layout.depth - (self.frozen == lm.layout.depth - 1)), mask, self.rows, columns
                )
            everything = torch.cat([prefixes.before(every), mask], dim=1)
            self.base = lm.head.logits_at(ids, everything, self.rows, columns, past=past, positions=positions)
        own = self.positions - skipped[:, None]
        self.states = _columns(states[0], own).to(device) if states else None
        index = self.positions[:, :1] - length + torch.arange(length, device=device) + prefixes.width - skipped[:, None]
        self.prefix: list[tuple[Tensor, ...]] = []
        for layer in past.layers[self.frozen + 1 :] if past is not None else []:
            assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None  # it was run
            self.prefix.append((take_columns(layer.keys, index), take_columns(layer.values, index)))

    def logits(self, change: Callable[[Tensor, Tensor, Tensor], Tensor], module: str | None = None) -> Tensor:
        """Float32 logits (wanted positions, vocabulary) after `change(states, rows, columns)` at every row's start.

        The change applies to what leaves `module`, or without one to what leaves block `frozen`; there is none where no
        block is frozen.
        """
        lm, rows = self.lm, torch.arange(len(self.ids), device=self.ids.device)
        # no block above the last: nothing to attend to
        mask = torch.cat([self.before, self.tail], dim=1) if self.prefix else self.tail
        with ExitStack() as stack:
            if self.states is not None:
                states = change(self.states, rows, self.at) if module is None else self.states
                stack.enter_context(lm.skipping(self.frozen, states))
            if module is not None:
                stack.enter_context(
                    on_output(lm.module(module), lambda hidden: change(hidden, rows, self.at), len(rows))
                )
            if self.prune_from is not None:
                prune_unread_tokens(
                    stack, lm, range(self.prune_from, lm.layout.depth), self.tail, self.rows, self.columns
                )
            past, positions = (self._cache(), self.positions) if self.prefix else (None, None)
            return lm.head.logits_at(self.ids, mask, self.rows, self.columns, past=past, positions=positions)

    def _cache(self) -> Cache:
        """Skipped blocks are never asked for their states, only for their length."""
        length = self.before.shape[1]
        skipped = [FrozenPrefix(*[placeholder(length, self.ids)] * 2) for _ in range(self.frozen + 1)]
        return Cache(layers=[*skipped, *(FrozenPrefix(keys, values) for keys, values in self.prefix)])

    def agrees(self, logits: Tensor) -> bool:
        """Whether `logits` of an empty change equal the whole model's: some families do not take a cached prefix."""
        return close(self.lm, logits, self.base)

    # --- rows come and go -------------------------------------------------------------------------------------------

    def select(self, keep: Tensor) -> SuffixForward:
        """Only the rows `keep` (ascending indices), without the padding that they no longer need."""
        part = object.__new__(SuffixForward)
        part.lm, part.frozen, part.prune_from = self.lm, self.frozen, self.prune_from
        place = torch.full((len(self.ids),), -1, device=keep.device)
        place[keep] = torch.arange(len(keep), device=keep.device)
        wanted = place[self.rows] >= 0
        part.rows, part.columns, part.base = place[self.rows[wanted]], self.columns[wanted], self.base[wanted]
        part.at = self.at[keep]
        tail = int(self.tail[keep].sum(1).max())
        cut = self.before.shape[1] - int(self.before[keep].sum(1).max()) if self.before.shape[1] else 0
        part.ids, part.tail, part.positions = (x[keep, :tail] for x in (self.ids, self.tail, self.positions))
        part.before = self.before[keep, cut:]
        part.states = None if self.states is None else self.states[keep, :tail]
        whole = part.before.shape[1] > 0
        part.prefix = [tuple(x[keep.to(x.device), :, cut:] for x in pair) for pair in self.prefix] if whole else []
        return part

    def join(self, other: SuffixForward) -> SuffixForward:
        """These rows and then the other's, padded to a common length."""
        both = object.__new__(SuffixForward)
        both.lm, both.frozen, both.prune_from = self.lm, self.frozen, self.prune_from
        both.rows = torch.cat([self.rows, other.rows + len(self.ids)])
        both.columns, both.at, both.base = (
            torch.cat([getattr(x, name) for x in (self, other)]) for name in ("columns", "at", "base")
        )
        both.ids, both.tail, both.positions = (
            _stack_rows(getattr(self, n), getattr(other, n)) for n in ("ids", "tail", "positions")
        )
        both.before = _stack_rows(self.before, other.before, left=True)
        both.states = None
        if self.states is not None:
            assert other.states is not None  # both leave the same block
            both.states = _stack_rows(self.states, other.states)
        both.prefix = [
            tuple(
                _stack_rows(a.transpose(1, 2), b.transpose(1, 2), left=True).transpose(1, 2)
                for a, b in zip(mine, its, strict=True)
            )
            for mine, its in zip(self._pairs(other), other._pairs(self), strict=True)
        ]
        return both

    def _pairs(self, other: SuffixForward) -> list[tuple[Tensor, ...]]:
        """The prefix, an empty one of the other's shape where no row here has any."""
        if self.prefix or not other.prefix:
            return self.prefix
        return [tuple(x.new_empty(len(self.ids), x.shape[1], 0, x.shape[3]) for x in pair) for pair in other.prefix]


def _stack_rows(first: Tensor, second: Tensor, left: bool = False) -> Tensor:
    """first (rows, columns, …) over second, the narrower one padded with zeros on the right, or on the left."""
    width = max(first.shape[1], second.shape[1])
    joined = first.new_zeros(len(first) + len(second), width, *first.shape[2:])
    for rows, part in ((slice(0, len(first)), first), (slice(len(first), None), second)):
        columns = slice(width - part.shape[1], width) if left else slice(0, part.shape[1])
        joined[rows, columns] = part
    return joined


def _columns(states: Tensor, positions: Tensor) -> Tensor:
    """states (rows, tokens, width) at `positions` (rows, columns), the last token standing in past the end."""
    index = positions.clamp(max=states.shape[1] - 1).to(states.device)
    return states.gather(1, index[:, :, None].expand(-1, -1, states.shape[2]))
