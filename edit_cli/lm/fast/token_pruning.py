"""What works on each token by itself need not see the tokens that nobody reads: padding, and in the last block
nearly all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edit_cli.errors import UsageError
from edit_cli.lm.heads.base import Head
from edit_cli.lm.hooks import hidden_of, with_hidden
from edit_cli.lm.layout import Layout, attention_out


class Model(Protocol):
    """What is known here of a model (`LM`)."""

    layout: Layout
    head: Head[Any]

    @property
    def model(self) -> nn.Module: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def module(self, name: str) -> nn.Module: ...


def token_modules(lm: Model, layer: int) -> list[nn.Module]:
    """Parts of a block that work token by token and whose output joins the residual stream: its MLP (the output
    projection alone,
    where the MLP is no module of its own) and the output projection of its attention.
    """
    found = []
    if not lm.layout.is_mixture(layer):  # a router may look at all tokens of a pass
        projection = lm.layout.mlp_out(layer)
        parent = projection.rpartition(".")[0]
        found.append(projection if parent == lm.layout.block(layer) else parent)
    with suppress(UsageError):  # a block without attention
        found.append(attention_out(lm.model, lm.layout, layer))
    return [lm.module(name) for name in found]


def prune_tokens(stack: ExitStack, lm: Model, layer: int, chosen: Tensor, total: int) -> None:
    """While `stack` is open, those parts of block `layer` work on the `chosen` ones of `total` = rows · tokens
    tokens only.
    """
    for module in token_modules(lm, layer):
        stack.enter_context(pruned_to(module, chosen, total))


def prune_unread_tokens(
    stack: ExitStack, lm: Model, layers: Sequence[int], tail: Tensor, rows: Tensor, columns: Tensor
) -> None:
    """Spare `layers` the padding, and the model's last block all but the tokens (rows, columns), which the head reads.

    tail: attention mask (rows, tokens) of the tokens that are run.
    """
    real, read = tail.flatten().nonzero()[:, 0], rows * tail.shape[1] + columns
    for layer in layers:
        prune_tokens(stack, lm, layer, read if layer == lm.layout.depth - 1 else real, tail.numel())


@contextmanager
def pruned_to(module: nn.Module, chosen: Tensor, total: int) -> Iterator[None]:
    """Let `module` work on the `chosen` tokens only, indices into rows · tokens = `total`; zeros leave it for all the
    rest.
    """
    shape: torch.Size | None = None

    def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal shape
        shape = None
        if not args or args[0].shape[:-1].numel() != total:
            return args
        shape = args[0].shape[:-1]
        return tuple(_pick(x, chosen, total) if isinstance(x, Tensor) and x.shape[:-1] == shape else x for x in args)

    def scatter(_: nn.Module, __: Any, output: Any) -> Any:
        if shape is None:
            return output
        hidden = hidden_of(output)
        found = hidden.reshape(-1, hidden.shape[-1])
        everywhere = found.new_zeros(total, found.shape[1]).index_copy(0, chosen.to(found.device), found)
        return with_hidden(output, everywhere.view(*shape, -1))

    handles = (module.register_forward_pre_hook(gather), module.register_forward_hook(scatter))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pick(states: Tensor, chosen: Tensor, total: int) -> Tensor:
    """(1, chosen, width) of states (rows, tokens, width), or (chosen, width) where a family has flattened them."""
    picked = states.reshape(total, -1).index_select(0, chosen.to(states.device))
    return picked[None] if states.dim() == 3 else picked
