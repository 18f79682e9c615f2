"""The same rows again and again while one module's output is changed: what lies below it is run once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from edit_cli.lm.fast.prefix_cache import close
from edit_cli.lm.fast.repeated_pass import ForwardCache, RepeatedPasses, recorded
from edit_cli.lm.heads.answers import Answers
from edit_cli.lm.hooks import exact, on_input, on_output
from edit_cli.lm.model import LM
from edit_cli.lm.prompt_position import PromptPosition, PromptPositionTracker
from edit_cli.lm.tokenization import Row

Part = TypeVar("Part")


@dataclass
class Passes:
    """Rows at work. inputs: (rows, tokens, d_in) what enters the module, float32 or better.

    base: the answers of the model as it is.
    """

    lm: LM
    rows: Sequence[Row]
    module: str
    end: bool
    tracker: PromptPositionTracker
    inputs: Tensor = field(init=False)
    position: PromptPosition = field(init=False)
    base: Answers = field(init=False)

    def answers(self, change: Callable[[Tensor], Tensor | None]) -> Answers:
        """After `change(output)` of the module's output (rows, tokens, d_out)."""
        with on_output(self.lm.module(self.module), change, len(self.rows)):
            return self.lm.head.answers(self.rows, self.end)

    @contextmanager
    def from_cache(self) -> Iterator[None]:
        """`answers` runs only what comes after the module.

        Not for edits that change the model elsewhere, or change while the block is open.
        """
        with torch.no_grad(), recorded(self.lm.model, self.lm.module(self.module)) as replay:
            plain = self.lm.head.answers(self.rows, self.end)
        with ExitStack() as stack:
            stack.enter_context(replay.constant())
            with torch.no_grad():
                again = self.lm.head.answers(self.rows, self.end)
            if not close(self.lm, again.logits, plain.logits):
                stack.close()
            yield

    @property
    def queries(self) -> Tensor:
        """(rows, d_in): inputs at the prompts' last tokens."""
        return at_prompt_end(self.inputs, self.position)

    @property
    def columns(self) -> Tensor:
        """(positions,): the token at which each position of `base` is predicted.

        Those of a row follow each other from its prompt's end on.
        """
        rows = self.base.rows.to(self.position.ends.device)
        first = torch.searchsorted(rows.contiguous(), rows.contiguous())  # rows are in order
        return self.position.ends[rows] + torch.arange(len(rows), device=rows.device) - first


class RepeatedBatches:
    """Batches that are answered again and again while `first` and modules above it are trained: what ends before
    `first` begins is run once a batch, and the answers stay the same.

    first: name of the lowest module that is trained.
    """

    def __init__(self, lm: LM, first: str) -> None:
        self.lm, self.passes = lm, RepeatedPasses(lm.model, lm.module(first))

    def answers(self, number: int, run: Callable[[], Answers]) -> Answers:
        """`run()`, the answers of batch `number`, which is the same batch each time."""

        @torch.no_grad()
        def holds(cache: ForwardCache, found: Answers) -> bool:
            with cache.constant(inclusive=False):
                return close(self.lm, run().logits, found.logits)

        return self.passes.run(number, run, holds)


@contextmanager
def passes(lm: LM, rows: Sequence[Row], module: str, layer: int, end: bool = False) -> Iterator[Passes]:
    """Rows whose constant part has been computed. layer: of the module; blocks below are run once.

    end: answers with their end token.
    """
    with ExitStack() as stack:
        run = Passes(lm, rows, module, end, PromptPositionTracker(lm, module))
        stack.callback(run.tracker.close)
        below: list[Tensor] = []

        def keep(states: Tensor) -> None:
            run.inputs = exact(states.detach())

        with torch.no_grad(), ExitStack() as first:
            first.enter_context(on_input(lm.module(module), keep, len(rows)))
            if layer and len(lm.layout.stacks) == 1:
                first.enter_context(
                    on_output(lm.module(lm.layout.block(layer - 1)), lambda states: below.append(states.detach()))
                )
            run.base = lm.head.answers(rows, end)
        assert run.tracker.position is not None  # a pass has gone by
        run.position = run.tracker.position
        if below:
            stack.enter_context(lm.skipping(layer - 1, below[0]))
        yield run


def at_prompt_end(states: Tensor, position: PromptPosition) -> Tensor:
    """(rows, width), at least float32: the states (rows, tokens, width) of the prompts' last tokens."""
    at = (position.ends - position.first).clamp(0, states.shape[1] - 1)
    return exact(states[torch.arange(len(states), device=states.device), at.to(states.device)])


def row_losses(found: Answers, rows: int, smoothing: float = 0.0) -> Tensor:
    """(rows,): mean negative log-likelihood of each row's target tokens, nats; `smoothing` of the labels goes to all
    classes alike.
    """
    nll = cross_entropy(found.logits, found.labels, reduction="none", label_smoothing=smoothing)
    count = torch.bincount(found.rows, minlength=rows).to(nll)
    return nll.new_zeros(rows).index_add(0, found.rows, nll) / count.clamp_min(1)


def rows_right(found: Answers, rows: int) -> Tensor:
    """(rows,) bool: whether every target token of a row is the likeliest."""
    wrong = (found.logits.argmax(-1) != found.labels).to(torch.long)
    return torch.zeros(rows, dtype=torch.long, device=wrong.device).index_add(0, found.rows, wrong) == 0


def in_batches(rows: Sequence[Any], size: int) -> Iterator[slice]:
    """Slices of `size` rows."""
    for first in range(0, len(rows), size):
        yield slice(first, first + size)


def packed(parts: Iterable[Sequence[Part]], members: int, count: int | None = None) -> Iterator[list[Sequence[Part]]]:
    """Parts in order, of so many members together, and so many of them, at most; a larger one stands alone."""
    some: list[Sequence[Part]] = []
    for part in parts:
        if some and (len(some) == count or sum(map(len, some)) + len(part) > members):
            yield some
            some = []
        some.append(part)
    if some:
        yield some
