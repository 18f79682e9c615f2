"""Reading what flows through a model at one token of each text: keys, values, states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from edit_cli.errors import UsageError
from edit_cli.lm.fast.prefix_cache import PrefixCache, common_lengths
from edit_cli.lm.fast.token_pruning import prune_tokens
from edit_cli.lm.hooks import StopForward, exact, on_input, on_output
from edit_cli.lm.tokenization import Row, by_length, pad_right

if TYPE_CHECKING:
    from edit_cli.lm.model import LM


@dataclass(frozen=True)
class HookPoint:
    """Where to read: what enters or what leaves a module."""

    module: str
    side: Literal["input", "output"]


def read(
    lm: LM,
    rows: Sequence[Row],
    positions: Sequence[int],
    points: Sequence[HookPoint],
    reduce: Literal["last", "mean"] = "last",
) -> list[Tensor]:
    """Activations (rows, width) in float32 or better, one tensor a point, at token `positions[i]` of row i (or their
    mean up to there).

    Raises:
        UsageError: a module that does not keep one state a token.
    """
    return LayerwiseReader(lm, rows, positions, reduce).read(points)


class LayerwiseReader:
    """Rows that are read at one block after another, upwards, without running again what lies below.

    Rows are cut after the token that is read (by causality nothing later matters), identical ones are run once,
    beginnings that rows share are run once, and a forward pass ends as soon as everything has been read.
    """

    def __init__(
        self, lm: LM, rows: Sequence[Row], positions: Sequence[int], reduce: Literal["last", "mean"] = "last"
    ) -> None:
        self.lm, self.reduce = lm, reduce
        cut = [row.ids[: position + 1] for row, position in zip(rows, positions, strict=True)]
        self.distinct = list(dict.fromkeys(cut))
        place = {ids: index for index, ids in enumerate(self.distinct)}
        self.order = [place[ids] for ids in cut]
        self.prunes = reduce == "last" and lm.takes_shortcuts  # a mean needs every token of every row
        lengths = (
            common_lengths(self.distinct, [len(ids) - 1 for ids in self.distinct])
            if self.prunes
            else [0] * len(self.distinct)
        )
        self.prefixes = PrefixCache(lm, self.distinct, lengths)
        self.own = [ids[length:] for ids, length in zip(self.distinct, lengths, strict=True)]
        self.batches = by_length([len(ids) for ids in self.own], lm.head.batch_tokens)
        self.level = -1  # the last block that need not be run again
        # what leaves it, (rows, tokens, width) a batch and at last of the prefixes, in host memory
        self.states: list[Tensor] = []

    @torch.no_grad()
    def start_at(self, layer: int) -> None:
        """From now on, start with what enters block `layer`. Blocks below it must not change any more."""
        if layer - 1 > self.level:
            below: list[Tensor] = []
            top = HookPoint(self.lm.layout.block(layer - 1), "output")
            past = self._run_prefixes([top], below)
            self.states = [self._run(number, [top], past)[0].cpu() for number in range(len(self.batches))] + below
            self.level = layer - 1

    @torch.no_grad()
    def read(self, points: Sequence[HookPoint]) -> list[Tensor]:
        """Activations (rows, width), one tensor a point; the points lie above what `start_at` left behind."""
        found: list[dict[int, Tensor]] = [{} for _ in points]
        past = self._run_prefixes(points)
        for number, batch in enumerate(self.batches):
            for column, activations in zip(found, self._run(number, points, past, only_last=self.prunes), strict=True):
                for index, row in zip(batch, activations, strict=True):
                    length = min(len(self.own[index]), len(row))  # one token alone where the others were spared
                    column[index] = exact(row[length - 1]) if self.reduce == "last" else exact(row[:length]).mean(0)
        return [torch.stack([column[i].to(self.lm.device) for i in self.order]) for column in found]

    def _run_prefixes(self, points: Sequence[HookPoint], states: list[Tensor] | None = None) -> DynamicCache | None:
        """Keys and values of the prefixes up to the points; what the first point sees is added to `states`."""
        if not self.prefixes.width:
            return None
        with self._listening(points, self.prefixes.ids, self.states[-1] if self.states else None) as seen:
            past = self.prefixes.run()
        if states is not None:
            states.append(seen[0].cpu())
        return past

    def _run(
        self, number: int, points: Sequence[HookPoint], past: DynamicCache | None, only_last: bool = False
    ) -> list[Tensor]:
        lm, batch = self.lm, self.batches[number]
        ids, mask = pad_right([self.own[i] for i in batch], lm.head.pad, lm.device)
        with (
            self._listening(points, ids, self.states[number] if self.states else None, only_last) as seen,
            ExitStack() as stack,
        ):
            if only_last:
                ends = torch.arange(len(ids), device=lm.device) * ids.shape[1] + mask.sum(1) - 1
                prune_tokens(stack, lm, self._top(points), ends, ids.numel())
            if past is None:
                lm.head.run(ids, mask)
            else:
                starts = torch.tensor([self.prefixes.lengths[i] for i in batch], device=lm.device)
                positions = starts[:, None] + torch.arange(ids.shape[1], device=lm.device)
                everything, nowhere = torch.cat([self.prefixes.before(batch), mask], dim=1), ids.new_zeros(0)
                lm.head.logits_at(ids, everything, nowhere, nowhere, self.prefixes.cache(past, batch), positions)
        return [seen[index] for index in range(len(points))]

    def _top(self, points: Sequence[HookPoint]) -> int:
        """The highest block in which a point lies; the last one, if it lies in none."""
        blocks = [self.lm.layout.block(layer) + "." for layer in range(self.lm.layout.depth)]
        return max(
            next((n for n, block in enumerate(blocks) if f"{point.module}.".startswith(block)), len(blocks) - 1)
            for point in points
        )

    @contextmanager
    def _listening(
        self, points: Sequence[HookPoint], ids: Tensor, states: Tensor | None, only_last: bool = False
    ) -> Iterator[dict[int, Tensor]]:
        """Fills what it yields, one tensor a point by its number, and ends the forward pass once all are there.

        states: what enters block level + 1. only_last: parts of the top block may see one token a row.
        """
        lm, rows = self.lm, len(ids)
        seen: dict[int, Tensor] = {}

        def keep(index: int, activations: Tensor) -> None:
            if only_last and activations.shape[:2] == (1, rows):  # others were spared
                activations = activations[0][:, None]
            elif activations.shape[:2] != ids.shape and not (only_last and activations.shape[:2] == (rows, 1)):
                shape = tuple(activations.shape)
                raise UsageError(
                    f"{points[index].module} of {lm.name} works on {shape}, not on one state a token: it cannot be read"
                )
            seen[index] = activations.detach()
            if len(seen) == len(points):
                raise StopForward

        with ExitStack() as stack:
            if states is not None:
                stack.enter_context(lm.skipping(self.level, states.to(lm.device)))
            for index, point in enumerate(points):
                listen = on_input if point.side == "input" else on_output
                stack.enter_context(listen(lm.module(point.module), partial(keep, index), rows))
            with suppress(StopForward):
                yield seen
