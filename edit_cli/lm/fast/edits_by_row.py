"""Many edits are asked about at once: every row of a batch meets an edit of its own.

A change Σ a bᵀ of a projection's weight adds a (b·x) to what leaves it. So the weights stay as they are, all rows share
one pass, and what each edit adds is added to its rows alone. Whoever runs a pass says which edit each of its rows is to
meet (`EditsByRow.met_by`); to all other passes the model is the unedited one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edit_cli.lm.edit import Added, Weights
from edit_cli.lm.fast.repeated_pass import RepeatedPasses, recorded

TRIED = 8  # tokens by which it is tried whether a repeated pass says the same

Meeting = Callable[[Sequence[int] | None], AbstractContextManager[None]]
"""Context in which the rows of a pass meet the edits of these numbers; None: no edit at all."""


class ByRow(Protocol):
    """What a head knows of the edits that its rows meet."""

    edits_by_row: EditsByRow | None


def meeting(head: ByRow, numbers: Sequence[int] | None) -> AbstractContextManager[None]:
    """Context of a pass whose rows meet the edits of these numbers; None: no edit at all."""
    return nullcontext() if numbers is None or head.edits_by_row is None else head.edits_by_row.met_by(numbers)


class EditsByRow:
    """Edits beside a model, each for the rows that meet it.

    edits: what each adds, by module (`Edit.added`).
    """

    def __init__(self, edits: Sequence[dict[str, Added]]) -> None:
        self.modules = {name: _Beside([edit.get(name) for edit in edits]) for edit in edits for name in edit}
        self.count = len(edits)
        self.numbers: Tensor | None = None  # (rows,) of the edits in the pass that is going on
        self._passes: RepeatedPasses | None = None  # of rows that meet one edit after another

    @contextmanager
    def met_by(self, numbers: Sequence[int]) -> Iterator[None]:
        """Let row i of every pass inside the block meet edit `numbers[i]`."""
        before, self.numbers = self.numbers, torch.tensor(numbers)
        try:
            yield
        finally:
            self.numbers = before

    @contextmanager
    def beside(self, lm: Weights) -> Iterator[None]:
        """The model with these edits beside it, inside the block."""
        with ExitStack() as stack:
            for name, beside in self.modules.items():
                stack.callback(lm.module(name).register_forward_hook(partial(self._add, beside)).remove)
            yield

    def again(self, model: nn.Module, run: Callable[[Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        """`run(ids, mask)`, a pass of the same rows with one edit after another: what ends before the lowest edited
        module begins is run once, and the bits are the same.
        """
        if not self.modules:  # none of them changes anything
            return run(ids, mask)
        if self._passes is None:
            lowest = next(module for name, module in model.named_modules() if name in self.modules)
            self._passes = RepeatedPasses(model, lowest)

        def holds(*_: Any) -> bool:
            return self._repeats(model, run, ids[:, :TRIED], mask[:, :TRIED])

        return self._passes.run(tuple(ids.flatten().tolist()), lambda: run(ids, mask), holds)

    def _repeats(self, model: nn.Module, run: Callable[[Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor) -> bool:
        """Whether what one edit leaves below is what there is with another."""
        assert self._passes is not None
        with self.met_by([0] * len(ids)), recorded(model, self._passes.first) as cache:
            run(ids, mask)
        with self.met_by([self.count - 1] * len(ids)):
            with cache.constant(inclusive=False):
                found = run(ids, mask)
            return torch.equal(found, run(ids, mask))

    def _add(self, beside: _Beside, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return None if self.numbers is None else beside.add(args[0], output, self.numbers)


class _Beside:
    """What edits add to the output of one module.

    Low-rank terms are stacked, filled up with zeros to the rank of the largest: one product of matrices a row. A term
    of full rank is added to all rows of its edit at once.
    """

    def __init__(self, terms: Sequence[Added | None]) -> None:
        present = [(number, term.left, term.right) for number, term in enumerate(terms) if term is not None]
        low = [(number, left.T, right) for number, left, right in present if left is not None]
        self.whole = {number: right for number, left, right in present if left is None}
        self.place = torch.full((len(terms),), -1)  # in the stack, of each edit
        if low:
            rank = max(len(right) for *_, right in low)
            self.place[[number for number, *_ in low]] = torch.arange(len(low))
            self.right = torch.stack([_filled(right, rank) for *_, right in low])  # (edits, rank, d_in)
            self.left = torch.stack([_filled(left, rank) for _, left, _ in low])  # (edits, rank, d_out)
        self._met: Tensor | None = None  # the numbers of the rows that were met last, and what they gathered
        self._gathered: tuple[Tensor, Tensor, Tensor]

    def add(self, x: Tensor, y: Tensor, numbers: Tensor) -> Tensor:
        """What leaves the module (y), with what each row's edit adds for what entered it (x).

        numbers: (rows,) of the rows' edits.
        """
        states, moved = x.reshape(len(numbers), -1, x.shape[-1]), y.reshape(len(numbers), -1, y.shape[-1])
        if bool((self.place >= 0).any()):
            rows, right, left = self._of(numbers, y)
            if len(rows) == len(numbers):
                moved = torch.baddbmm(moved, states @ right.mT, left)
            elif len(rows):
                moved = moved.index_add(0, rows, (states[rows] @ right.mT) @ left)
        for number, change in self.whole.items():
            rows = (numbers == number).nonzero()[:, 0].to(y.device)
            if len(rows):
                moved = moved.index_add(0, rows, states[rows] @ change.to(y).mT)
        return moved.reshape(y.shape)

    def _of(self, numbers: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rows with a low-rank term, its right and left parts); passes that go on with the same rows share them."""
        if self._met is not numbers:
            place = self.place[numbers]
            rows = (place >= 0).nonzero()[:, 0]
            right, left = (part[place[rows].to(part.device)].to(like) for part in (self.right, self.left))
            self._met, self._gathered = numbers, (rows.to(like.device), right, left)
        return self._gathered


def _filled(part: Tensor, rank: int) -> Tensor:
    """(rank, width) from (r, width), with rows of zeros."""
    return nn.functional.pad(part, (0, 0, 0, rank - len(part)))
