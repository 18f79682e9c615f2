"""Gradients of weight matrices in factors, and shifts of weight matrices in factors, of many independent edits in one
pass.

The gradient of a loss by a projection's weight (y = W x) is Σ δ uᵀ over the tokens that went through it: u what entered
it, δ the gradient by what left it. A shift Σ a bᵀ of the weight adds Σ a (b·x) to what leaves it. So neither is ever
made dense, and the rows of one batch can each meet a weight of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from edit_cli.editors.passes import row_losses
from edit_cli.edits.edit import Factors
from edit_cli.errors import RejectedRequest
from edit_cli.lm.fast.token_pruning import prune_tokens
from edit_cli.lm.heads.answers import Answers
from edit_cli.lm.hooks import exact
from edit_cli.lm.matrices import matrix_of
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import Row


@dataclass(frozen=True)
class Gradient:
    """Of one module's weight, in factors.

    inputs: u (rows, tokens, d_in); outputs: δ (rows, tokens, d_out); at least float32.

    losses: (rows,) of which it is the gradient.
    """

    inputs: Tensor
    outputs: Tensor
    losses: Tensor

    def dense(self) -> Tensor:
        """(d_out, d_in): the gradient of the sum over all rows."""
        return self.outputs.flatten(0, 1).T @ self.inputs.flatten(0, 1)

    def sized(self, by_loss: bool) -> Gradient:
        """With δ of every row brought to a Frobenius norm of 1 over its tokens, or of the row's loss."""
        factor = 1 / self.outputs.norm(dim=(1, 2)).clamp_min(torch.finfo(self.outputs.dtype).tiny)
        factor = factor * self.losses.to(factor) if by_loss else factor
        return Gradient(self.inputs, self.outputs * factor[:, None, None], self.losses)

    @property
    def kept(self) -> Tensor:
        """(rows, tokens) bool: tokens that have a part in it; padding and what comes after the answer have none."""
        return self.inputs.ne(0).any(-1) & self.outputs.ne(0).any(-1)


@dataclass(frozen=True)
class Shift:
    """Changes of one weight, one an edit. left: a (edits, n, d_out); right: b (edits, n, d_in)."""

    left: Tensor
    right: Tensor

    @classmethod
    def dense(cls, change: Tensor) -> Shift:
        """The shift of whole matrices (edits, d_out, d_in)."""
        edits, d_out, d_in = change.shape
        one = torch.eye(min(d_out, d_in)).to(change).expand(edits, -1, -1)
        return cls(one, change) if d_out <= d_in else cls(change.mT, one)

    def of(self, edits: Sequence[int]) -> Shift:
        """Those of some edits."""
        return Shift(self.left[list(edits)], self.right[list(edits)])

    def then(self, other: Shift) -> Shift:
        """Both together."""
        return Shift(torch.cat([self.left, other.left], 1), torch.cat([self.right, other.right], 1))

    def factors(self) -> Factors:
        """All edits together, as one low-rank update without the columns that add nothing."""
        left, right = self.left.flatten(0, 1), self.right.flatten(0, 1)
        kept = left.ne(0).any(-1) & right.ne(0).any(-1)
        return Factors(left[kept].T.contiguous(), right[kept].contiguous())

    def norms(self) -> Tensor:
        """(edits,) Frobenius norms."""
        squares = ((self.left @ self.left.mT) * (self.right @ self.right.mT)).sum((1, 2))
        return squares.clamp_min(0).sqrt()

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """What leaves the module (y) with each edit's rows meeting its weight; rows come edit by edit, equally many
        of each.
        """
        edits, n, d_out = self.left.shape
        states = x.reshape(edits, -1, x.shape[-1]).to(self.right)
        if n > min(self.right.shape[-1], d_out):
            factors = states, self.right.mT @ self.left
        else:
            factors = states @ self.right.mT, self.left
        moved = torch.baddbmm(y.reshape(edits, -1, d_out).to(self.left), *factors)
        return moved.reshape(y.shape).to(y)


@dataclass(frozen=True)
class DenseShift:
    """A change of one weight for all rows alike. change: (d_out, d_in)."""

    change: Tensor

    def norms(self) -> Tensor:
        return self.change.norm()[None]

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """What leaves the module (y) with the change."""
        return y + linear(x.to(self.change), self.change).to(y)


@torch.no_grad()
def largest(lm: LM, shifts: Mapping[str, Shift | DenseShift]) -> float:
    """The largest ‖ΔW‖/‖W‖ of any edit and module."""
    return max(float(shift.norms().max()) / float(lm.weight(name).float().norm()) for name, shift in shifts.items())


def refuse_infinite(shifts: Iterable[Shift]) -> None:
    """Refuse an edit that would put numbers that are none into the weights.

    Raises:
        RejectedRequest: a shift holds infinite values or NaN.
    """
    if not all(bool(part.isfinite().all()) for shift in shifts for part in (shift.left, shift.right)):
        raise RejectedRequest(
            "the gradient of these facts is infinite or no number: in float16 it overflows, where"
            " model.dtype=bfloat16 or float32 does not"
        )


def gradients(
    lm: LM,
    rows: Sequence[Row],
    modules: Sequence[str],
    graph: bool = False,
    losses: Callable[[Answers, int], Tensor] = row_losses,
) -> dict[str, Gradient]:
    """{module: gradient} of the sum over rows of the mean NLL per target token. graph: keep them differentiable.

    losses: another loss, (rows,) of the answers to so many rows. Nothing below the lowest module is differentiated.
    Modules that run twice in a pass are seen the last time only.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        probe = torch.zeros_like(output, requires_grad=True)  # the gradient by it is that by the output
        seen[name] = args[0], probe
        return output + probe

    with torch.enable_grad(), ExitStack() as stack:
        for name in modules:
            stack.callback(lm.module(name).register_forward_hook(partial(hook, name)).remove)
        loss = losses(lm.head.answers(rows, end=True), len(rows))
        found = torch.autograd.grad(loss.sum(), [seen[name][1] for name in modules], create_graph=graph)
    whole = {}
    for name, delta in zip(modules, found, strict=True):
        inputs = seen[name][0] if graph else seen[name][0].detach()
        matrix = matrix_of(lm.module(name))
        parts = matrix.entering(inputs), matrix.leaving(delta)
        entering, leaving = (exact(part.reshape(len(rows), -1, part.shape[-1])) for part in parts)
        whole[name] = Gradient(entering, leaving, loss.detach())
    return whole


@contextmanager
def shifted(lm: LM, shifts: Mapping[str, Shift | DenseShift]) -> Iterator[None]:
    """Let every batch inside the block, whose rows come edit by edit, meet shifted weights."""

    def hook(shift: Shift | DenseShift, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        matrix = matrix_of(module)
        return matrix.returned(shift.add(matrix.entering(args[0]), matrix.leaving(output)), output)

    with ExitStack() as stack:
        for name, shift in shifts.items():
            stack.callback(lm.module(name).register_forward_hook(partial(hook, shift)).remove)
        yield


@contextmanager
def sparing(lm: LM, rows: Sequence[Row], layers: Iterable[int], groups: int = 1) -> Iterator[None]:
    """Let what works token by token in blocks `layers` see no padding, and in the model's last block only tokens that
    predict an answer.

    To be entered before anything that changes what blocks do. Of each of `groups` equally large groups of rows equally
    many tokens are seen, as `shifted` wants them. Nothing happens where a model does not take it.
    """
    with ExitStack() as stack:
        if lm.takes_shortcuts:
            columns = torch.arange(max(len(row.ids) for row in rows) - 1, device=lm.device)
            ends, starts = (
                torch.tensor(which, device=lm.device)[:, None]
                for which in zip(*((len(row.ids), row.start) for row in rows), strict=True)
            )
            real = columns < ends - 1
            read = real & (columns >= starts - 1)
            every, last = _evenly(real, groups), _evenly(read, groups)
            for layer in layers:
                prune_tokens(stack, lm, layer, last if layer == lm.layout.depth - 1 else every, real.numel())
        yield


def _evenly(wanted: Tensor, groups: int) -> Tensor:
    """Indices into (rows · tokens) of the wanted tokens, filled up with others so that every group has as many; in
    order of the groups.
    """
    wanted = wanted.reshape(groups, -1)
    number = int(wanted.sum(1).max())
    places = wanted.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :number]
    return (places + wanted.shape[1] * torch.arange(groups, device=wanted.device)[:, None]).flatten()
