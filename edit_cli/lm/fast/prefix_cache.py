"""Beginnings that many rows have in common (context prefixes above all) are run once: the rows go on from their keys
and values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from edit_cli.lm.fast.token_pruning import Model, prune_unread_tokens
from edit_cli.lm.hooks import StopForward
from edit_cli.lm.tokenization import pad_right

LEAST_SAVING = 0.1  # share of all tokens below which a pass more does not pay


class Prefilled(DynamicLayer):
    """A cache layer that begins with these keys and values (rows, heads, tokens, width)."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device


def placeholder(length: int, like: Tensor) -> Tensor:
    """Stands for keys or values of a block that is not run: never read, only asked for its length."""
    return torch.zeros(1, 1, 1, 1, device=like.device).expand(1, 1, length, 1)


def common_lengths(rows: Sequence[tuple[int, ...]], limits: Sequence[int]) -> list[int]:
    """How many leading tokens of each row, at most `limits`, are best run once for all rows that begin with them; 0
    for none.
    """
    count = Counter(ids[:length] for ids, limit in zip(rows, limits, strict=True) for length in range(1, limit + 1))
    lengths = [
        max(range(limit + 1), key=lambda n: (count[ids[:n]] - 1) * n) for ids, limit in zip(rows, limits, strict=True)
    ]
    prefixes = {ids[:length] for ids, length in zip(rows, lengths, strict=True)}
    saved = sum(lengths) - sum(map(len, prefixes))
    return lengths if saved > LEAST_SAVING * sum(map(len, rows)) else [0] * len(rows)


class PrefixCache:
    """Beginnings of rows.

    lengths: tokens of each row's prefix, 0 for rows that have none. width: those of the longest one.
    """

    def __init__(self, lm: Model, rows: Sequence[tuple[int, ...]], lengths: Sequence[int]) -> None:
        self.lm, self.lengths, self.width = lm, list(lengths), max(lengths, default=0)
        prefixes = [ids[:length] for ids, length in zip(rows, lengths, strict=True)]
        distinct = list(dict.fromkeys(prefix for prefix in prefixes if prefix))
        place = {prefix: number for number, prefix in enumerate(distinct)} | {(): 0}
        self.index = torch.tensor([place[prefix] for prefix in prefixes])
        if distinct:
            self.ids, self.mask = pad_right(distinct, lm.head.pad, lm.device)

    @torch.no_grad()
    def run(self) -> DynamicCache:
        """Keys and values of every block that is run (hooks and skipped blocks are the caller's)."""
        past = DynamicCache()  # without the config: no layer forgets what lies outside its window
        nowhere = self.ids.new_zeros(0)
        with suppress(StopForward):  # a hook has seen enough
            self.lm.head.logits_at(self.ids, self.mask, nowhere, nowhere, past=past)
        return past

    def before(self, rows: Sequence[int]) -> Tensor:
        """Attention mask (rows, width) of the prefixes of `rows`, which stand at the right."""
        lengths = torch.tensor([self.lengths[i] for i in rows], device=self.lm.device)
        return (torch.arange(self.width, device=self.lm.device) >= self.width - lengths[:, None]).long()

    def cache(self, past: DynamicCache, rows: Sequence[int]) -> Cache:
        """A cache of their own for `rows`, which begins with their prefixes."""
        index = self.index[list(rows)].to(self.lm.device)
        columns = torch.tensor([self.lengths[i] for i in rows], device=self.lm.device)[:, None] - self.width
        columns = columns + torch.arange(self.width, device=self.lm.device)
        layers = []
        for layer in past.layers:
            assert isinstance(layer, DynamicLayer)  # without the config there are no others
            parts = (layer.keys, layer.values) if layer.is_initialized else (None, None)
            nothing = placeholder(self.width, self.ids)
            layers.append(
                Prefilled(*(nothing if x is None else take_columns(x[index.to(x.device)], columns) for x in parts))
            )
        missing = self.lm.layout.depth - len(layers)
        rest = [Prefilled(*[placeholder(self.width, self.ids)] * 2) for _ in range(missing)]
        return Cache(layers=[*layers, *rest])


def take_columns(part: Tensor, index: Tensor) -> Tensor:
    """part (rows, heads, tokens, head width) at `index` (rows, columns); negative indices are masked, so any state
    will do.
    """
    index = index.clamp(min=0).to(part.device)
    return part.gather(2, index[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3])).contiguous()


@torch.no_grad()
def shortcuts_work(lm: Model) -> bool:
    """Whether this model gives the same logits when rows go on from shared prefixes and MLPs see only tokens that
    matter.
    """
    if not getattr(lm.head, "caches_keys", False):
        return False
    vocabulary = len(lm.head.words)
    rows = [
        tuple((7 * i + 3 * row * (i > 2) + 1) % vocabulary for i in range(length))
        for row, length in enumerate((8, 6, 7, 5))
    ]
    ends = torch.tensor([len(ids) - 1 for ids in rows], device=lm.device)
    number = torch.arange(len(rows), device=lm.device)
    ids, mask = pad_right(rows, lm.head.pad, lm.device)
    plain = lm.head.logits_at(ids, mask, number, ends)
    lengths = [3, 2, 3, 0]
    prefixes = PrefixCache(lm, rows, lengths)
    own, tail = pad_right([ids[length:] for ids, length in zip(rows, lengths, strict=True)], lm.head.pad, lm.device)
    start = torch.tensor(lengths, device=lm.device)
    with ExitStack() as stack:
        try:
            past = prefixes.cache(prefixes.run(), range(len(rows)))
            prune_unread_tokens(stack, lm, range(lm.layout.depth), tail, number, ends - start)
            positions = start[:, None] + torch.arange(own.shape[1], device=lm.device)
            pruned = lm.head.logits_at(
                own, torch.cat([prefixes.before(range(len(rows))), tail], 1), number, ends - start, past, positions
            )
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
    return close(lm, pruned, plain)


def close(lm: Model, found: Tensor, expected: Tensor) -> bool:
    """Whether logits agree within what the model's dtype allows."""
    tolerance = 5e-2 if lm.dtype in (torch.float16, torch.bfloat16) else 1e-3
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1.0))
