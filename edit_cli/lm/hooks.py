"""Reading and replacing what flows through a module. transformers blocks return a tensor or a tuple depending on family and
version; everything that cares passes through `hidden_of` and `with_hidden`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class StopForward(Exception):
    """Raised by a hook once everything that was asked for has been read; the rest of the forward pass is not needed."""


def hidden_of(output: Any) -> Tensor:
    """The hidden states (rows, tokens, width) in a module's output."""
    return output[0] if isinstance(output, (tuple, list)) else output


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """The same output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, (tuple, list)) else hidden


@contextmanager
def on_input(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `see` with the first positional input of `module` at each forward pass."""
    handle = module.register_forward_pre_hook(lambda _, args: see(args[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def on_output(module: nn.Module, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `change` with the hidden states that leave `module`; a tensor that it returns takes their place."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = change(hidden_of(output))
        return None if hidden is None else with_hidden(output, hidden)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def gather_before(module: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Let `module` (the head) see only the states at (rows, columns): its output is (1, positions, …) instead of (rows, tokens, …).

    The head of a large vocabulary is most of a short prompt's memory, and only a few positions are ever read.
    """
    handle = module.register_forward_pre_hook(
        lambda _, args: (args[0][rows.to(args[0].device), columns.to(args[0].device)].unsqueeze(0), *args[1:])
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def skip_blocks(blocks: Sequence[nn.Module], states: Tensor, as_tuple: bool) -> Iterator[None]:
    """Let `blocks` (the lowest ones, in order) cost nothing: `states` (rows, tokens, width) are what leaves the last of them.

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
