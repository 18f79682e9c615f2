"""Gradients of weight matrices in factors, and shifts of weight matrices in factors, of many independent edits in one pass.

The gradient of a loss by a projection's weight (y = W x) is Σ δ uᵀ over the tokens that went through it: u what entered it, δ the
gradient by what left it. A shift Σ a bᵀ of the weight adds Σ a (b·x) to what leaves it. So neither is ever made dense, and the rows of
one batch can each meet a weight of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edit_cli.editors.passes import row_losses
from edit_cli.lm.hooks import exact
from edit_cli.lm.model import LM
from edit_cli.lm.tokens import Row


@dataclass(frozen=True)
class Gradient:
    """Of one module's weight, in factors. inputs: u (rows, tokens, d_in); outputs: δ (rows, tokens, d_out); at least float32."""

    inputs: Tensor
    outputs: Tensor

    def dense(self) -> Tensor:
        """(d_out, d_in): the gradient of the sum over all rows."""
        return self.outputs.flatten(0, 1).T @ self.inputs.flatten(0, 1)

    @property
    def kept(self) -> Tensor:
        """(rows, tokens) bool: tokens that have a part in it; padding and what comes after the answer have none."""
        return self.inputs.ne(0).any(-1) & self.outputs.ne(0).any(-1)


@dataclass(frozen=True)
class Shift:
    """Changes of one weight, one an edit. left: a (edits, n, d_out); right: b (edits, n, d_in)."""

    left: Tensor
    right: Tensor

    def norms(self) -> Tensor:
        """(edits,) Frobenius norms."""
        squares = ((self.left @ self.left.mT) * (self.right @ self.right.mT)).sum((1, 2))
        return squares.clamp_min(0).sqrt()

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """What leaves the module (y) with each edit's rows meeting its weight; rows come edit by edit, equally many of each."""
        edits, n, d_out = self.left.shape
        states = x.reshape(edits, -1, x.shape[-1]).to(self.right)
        if n > min(self.right.shape[-1], d_out):
            moved = states @ (self.right.mT @ self.left)
        else:
            moved = (states @ self.right.mT) @ self.left
        return y + moved.reshape(y.shape).to(y)


def gradients(lm: LM, rows: Sequence[Row], modules: Sequence[str], graph: bool = False) -> dict[str, Gradient]:
    """{module: gradient} of the sum over rows of the mean NLL per target token. graph: keep them differentiable.

    Nothing below the lowest module is differentiated. Modules that run twice in a pass are seen the last time only.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        probe = torch.zeros_like(output, requires_grad=True)  # the gradient by it is that by the output
        seen[name] = args[0], probe
        return output + probe

    with torch.enable_grad(), ExitStack() as stack:
        for name in modules:
            stack.callback(lm.module(name).register_forward_hook(partial(hook, name)).remove)
        loss = row_losses(lm.head.answers(rows, end=True), len(rows)).sum()
        found = torch.autograd.grad(loss, [seen[name][1] for name in modules], create_graph=graph)
    whole = {}
    for name, delta in zip(modules, found, strict=True):
        inputs = seen[name][0] if graph else seen[name][0].detach()
        whole[name] = Gradient(exact(inputs.reshape(len(rows), -1, inputs.shape[-1])), exact(delta.reshape(len(rows), -1, delta.shape[-1])))
    return whole


@contextmanager
def shifted(lm: LM, shifts: dict[str, Shift]) -> Iterator[None]:
    """Let every batch inside the block, whose rows come edit by edit, meet shifted weights."""

    def hook(shift: Shift, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return shift.add(args[0], output)

    with ExitStack() as stack:
        for name, shift in shifts.items():
            stack.callback(lm.module(name).register_forward_hook(partial(hook, shift)).remove)
        yield
