"""Reading and replacing what flows through a module.

transformers blocks return a tensor or a tuple depending on family and
version; everything that cares passes through `hidden_of` and `with_hidden`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class StopForward(Exception):
    """Raised by a hook once everything that was asked for has been read; the rest of the forward pass is not needed."""


def hidden_of(output: Any) -> Tensor:
    """The hidden states (rows, tokens, width) in a module's output."""
    return output[0] if isinstance(output, (tuple, list)) else output


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """The same output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, (tuple, list)) else hidden


class Wrapper(nn.Module):
    """Stands in a module's place.

    What it lacks is looked up in the original, so that names of modules and weights stay good.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)


def unwrapped(module: nn.Module) -> nn.Module:
    """The model's own module under all wrappers."""
    while isinstance(module, Wrapper):
        module = module.original
    return module


def exact(values: Tensor) -> Tensor:
    """At least float32, whatever the model computes in."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _by_rows(states: Tensor, rows: int | None) -> Tensor:
    """(rows, tokens, width) from states that a family has flattened to (rows · tokens, width)."""
    return states if rows is None or states.dim() != 2 else states.view(rows, -1, states.shape[-1])


@contextmanager
def on_input(module: nn.Module, see: Callable[[Tensor], None], rows: int | None = None) -> Iterator[None]:
    """Call `see` with the first positional input of `module` at each forward pass.

    rows: of the batch. With it `see` gets (rows, tokens, width) also from the families that flatten it before their
    MLP.
    """
    handle = module.register_forward_pre_hook(lambda _, args: see(_by_rows(args[0], rows)))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def on_output(module: nn.Module, change: Callable[[Tensor], Tensor | None], rows: int | None = None) -> Iterator[None]:
    """Call `change` with the hidden states that leave `module`; a tensor that it returns takes their place.

    `rows` as in `on_input`.
    """

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        present = hidden_of(output)
        hidden = change(_by_rows(present, rows))
        return None if hidden is None else with_hidden(output, hidden.reshape(present.shape))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def gather_before(module: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Let `module` (the head) see only the states at (rows, columns): its output is (1, positions, …) instead of (rows,
    tokens, …).

    The head of a large vocabulary is most of a short prompt's memory, and only a few positions are ever read. Yields a
    function that takes the model's logits to (positions, …), also where a model uses the head's weight without calling
    the module.
    """
    gathered = False

    def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal gathered
        gathered = True
        return (args[0][rows.to(args[0].device), columns.to(args[0].device)].unsqueeze(0), *args[1:])

    handle = module.register_forward_pre_hook(gather)
    try:
        yield lambda logits: logits[0] if gathered else logits[rows.to(logits.device), columns.to(logits.device)]
    finally:
        handle.remove()


@contextmanager
def skip_blocks(blocks: Sequence[nn.Module], states: Tensor, as_tuple: bool) -> Iterator[None]:
    """Let `blocks` (the lowest ones, in order) cost nothing: `states` (rows, tokens, width) are what leaves the last of
    them.

    The model's own forward still makes masks and positions, so this is right for any family. `as_tuple`: whether this
    family's blocks return tuples. Only the instances' `forward` is replaced, and put back.
    """

    def constant(*_: Any, **__: Any) -> Any:
        return (states,) if as_tuple else states

    kept = [block.__dict__.get("forward") for block in blocks]  # accelerate sets one of its own for offloaded blocks
    for block in blocks:
        block.forward = constant
    try:
        yield
    finally:
        for block, forward in zip(blocks, kept, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
