"""Reading what flows through a model at one token of each text: keys, values, states."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from edit_cli.errors import UsageError
from edit_cli.lm.hooks import StopForward, exact, on_input, on_output
from edit_cli.lm.tokens import Row, by_length, pad_right

if TYPE_CHECKING:
    from edit_cli.lm.model import LM


@dataclass(frozen=True)
class Tap:
    """Where to read: what enters or what leaves a module."""

    module: str
    side: Literal["input", "output"]


def read(
    lm: LM, rows: Sequence[Row], positions: Sequence[int], taps: Sequence[Tap], reduce: Literal["last", "mean"] = "last"
) -> list[Tensor]:
    """Activations (rows, width) in float32 or better, one tensor a tap, at token `positions[i]` of row i (or their mean up to there).

    Raises:
        UsageError: a module that does not keep one state a token.
    """
    return Ascent(lm, rows, positions).read(taps, reduce)


class Ascent:
    """Rows that are read at one block after another, upwards, without running again what lies below.

    Rows are cut after the token that is read (by causality nothing later matters), identical ones are run once, and a
    forward pass ends as soon as everything has been read.
    """

    def __init__(self, lm: LM, rows: Sequence[Row], positions: Sequence[int]) -> None:
        self.lm = lm
        cut = [row.ids[: position + 1] for row, position in zip(rows, positions, strict=True)]
        self.distinct = list(dict.fromkeys(cut))
        place = {ids: index for index, ids in enumerate(self.distinct)}
        self.order = [place[ids] for ids in cut]
        self.batches = by_length([len(ids) for ids in self.distinct], lm.head.batch_tokens)
        self.level = -1  # the last block that need not be run again
        self.states: list[Tensor] = []  # what leaves it, (rows, tokens, width) a batch, in host memory

    @torch.no_grad()
    def climb(self, layer: int) -> None:
        """From now on, start with what enters block `layer`. Blocks below it must not change any more."""
        if layer - 1 > self.level:
            tap = Tap(self.lm.layout.block(layer - 1), "output")
            self.states = [self._run(number, [tap])[0].cpu() for number in range(len(self.batches))]
            self.level = layer - 1

    @torch.no_grad()
    def read(self, taps: Sequence[Tap], reduce: Literal["last", "mean"] = "last") -> list[Tensor]:
        """Activations (rows, width), one tensor a tap; the taps lie above what `climb` left behind."""
        found: list[list[Tensor | None]] = [[None] * len(self.distinct) for _ in taps]
        for number, batch in enumerate(self.batches):
            for column, activations in zip(found, self._run(number, taps), strict=True):
                for index, row in zip(batch, activations, strict=True):
                    length = len(self.distinct[index])
                    column[index] = exact(row[length - 1]) if reduce == "last" else exact(row[:length]).mean(0)
        return [torch.stack([column[i].to(self.lm.device) for i in self.order]) for column in found]

    def _run(self, number: int, taps: Sequence[Tap]) -> list[Tensor]:
        lm, seen = self.lm, [None] * len(taps)
        ids, mask = pad_right([self.distinct[i] for i in self.batches[number]], lm.head.pad, lm.device)

        def keep(index: int, activations: Tensor) -> None:
            if activations.shape[:2] != ids.shape:
                shape = tuple(activations.shape)
                raise UsageError(f"{taps[index].module} of {lm.name} works on {shape}, not on one state a token: it cannot be read")
            seen[index] = activations.detach()
            if all(found is not None for found in seen):
                raise StopForward

        with ExitStack() as stack:
            if self.level >= 0:
                stack.enter_context(lm.skipping(self.level, self.states[number].to(lm.device)))
            for index, tap in enumerate(taps):
                listen = on_input if tap.side == "input" else on_output
                stack.enter_context(listen(lm.module(tap.module), lambda x, i=index: keep(i, x), len(ids)))
            try:
                lm.model(input_ids=ids, attention_mask=mask, use_cache=False)
            except StopForward:
                pass
        return seen
