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


@torch.no_grad()
def read(
    lm: LM, rows: Sequence[Row], positions: Sequence[int], taps: Sequence[Tap], reduce: Literal["last", "mean"] = "last"
) -> list[Tensor]:
    """Activations (rows, width) in float32 or better, one tensor a tap, at token `positions[i]` of row i (or their mean up to there).

    Rows are cut after that token (by causality nothing later matters), identical ones are run once, and the forward pass
    ends as soon as everything has been read.

    Raises:
        UsageError: a module that does not keep one state a token.
    """
    cut = [row.ids[: position + 1] for row, position in zip(rows, positions, strict=True)]
    distinct = list(dict.fromkeys(cut))
    found: list[list[Tensor | None]] = [[None] * len(distinct) for _ in taps]
    for batch in by_length([len(ids) for ids in distinct], lm.head.batch_tokens):
        seen = _run(lm, [distinct[i] for i in batch], taps)
        for column, activations in zip(found, seen, strict=True):
            for index, row, ids in zip(batch, activations, (distinct[i] for i in batch), strict=True):
                column[index] = exact(row[len(ids) - 1]) if reduce == "last" else exact(row[: len(ids)]).mean(0)
    place = {ids: index for index, ids in enumerate(distinct)}
    order = [place[ids] for ids in cut]
    return [torch.stack([column[i].to(lm.device) for i in order]) for column in found]


def _run(lm: LM, ids: Sequence[Sequence[int]], taps: Sequence[Tap]) -> list[Tensor]:
    seen: list[Tensor | None] = [None] * len(taps)

    def keep(index: int, activations: Tensor) -> None:
        if activations.shape[:2] != padded.shape:
            raise UsageError(f"{taps[index].module} of {lm.name} works on {tuple(activations.shape)}, not on one state a token: it cannot be read")
        seen[index] = activations.detach()
        if all(found is not None for found in seen):
            raise StopForward

    padded, mask = pad_right(ids, lm.head.pad, lm.device)
    with ExitStack() as stack:
        for index, tap in enumerate(taps):
            listen = on_input if tap.side == "input" else on_output
            stack.enter_context(listen(lm.module(tap.module), lambda x, i=index: keep(i, x), len(ids)))
        try:
            lm.model(input_ids=padded, attention_mask=mask, use_cache=False)
        except StopForward:
            pass
    return seen  # type: ignore[return-value]
