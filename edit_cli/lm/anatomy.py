"""What a person wants to know of a model before editing it, in words: where it keeps things, how its blocks are built,
how it reads text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edit_cli.errors import UsageError
from edit_cli.lm.hooks import hidden_of, on_output
from edit_cli.lm.layout import attention_out, is_transposed, widths
from edit_cli.lm.model import LM
from edit_cli.wording import many, size


def described(lm: LM) -> list[tuple[str, str]]:
    """(topic, sentence) pairs."""
    return [*_stacks(lm), ("blocks are", kind_of_blocks(lm)), *lm.head.told(), ("memory", _memory(lm))]


def kind_of_blocks(lm: LM) -> str:
    """Plain, or in what they depart from it: measured with short passes, on every layer."""
    if lm.layout.has_experts:
        layers = [str(layer) for layer in range(lm.layout.depth) if lm.layout.is_mixture(layer)]
        shared = any(mlp is not None for stack in lm.layout.stacks for mlp in stack.mixtures.values())
        beside = "beside an MLP that every token passes" if shared else "without an MLP that every token passes"
        return f"mixtures of experts {beside} (layers {', '.join(layers)}): methods that write to matrices refuse them"
    if lm.head.kind != "causal":
        return "not examined: this model is no causal one"
    found = []
    if not all(lm.writes_are_additive(layer) for layer in range(lm.layout.depth)):
        found.append("post-norm or scaled: what an MLP writes does not reach the residual stream as it is")
    if is_parallel(lm, 0):
        found.append("parallel: MLP and attention read the same state")
    return "; ".join(found) or "plain: attention, then the MLP, whose output is added as it is"


def is_parallel(lm: LM, layer: int) -> bool:
    """Whether the MLP of a layer reads what it would without the attention before it."""
    try:
        attention = lm.module(attention_out(lm.model, lm.layout, layer))
    except UsageError:
        return False
    keys = [_keys(lm, layer)]
    with on_output(attention, lambda hidden: hidden + 1):
        keys.append(_keys(lm, layer))
    return torch.equal(*keys)


def _keys(lm: LM, layer: int) -> Tensor:
    seen: list[Tensor] = []
    handle = lm.module(lm.layout.mlp_out(layer)).register_forward_pre_hook(
        lambda _, args: seen.append(hidden_of(args[0]).clone())
    )
    ids = torch.arange(1, 5, device=lm.device)[None]
    try:
        with torch.no_grad():
            lm.head.run(ids, torch.ones_like(ids))
    finally:
        handle.remove()
    return seen[0]


def _stacks(lm: LM) -> list[tuple[str, str]]:
    found = []
    for stack in lm.layout.stacks:
        what = "blocks" if len(lm.layout.stacks) == 1 else f"{stack.name} blocks"
        layer = next((layer for layer in stack.layers if stack.mlp_of(layer) is not None), None)
        width = lm.layout.width if layer is None else widths(lm.module(lm.layout.mlp_out(layer)))[0]
        told = f"{stack.blocks}, {many(stack.depth, 'layer')} of width {width:,}; final norm {stack.final_norm}"
        found.append((what, told))
        if layer is None:
            continue
        mlp, out = lm.layout.mlp(layer), lm.module(lm.layout.mlp_out(layer))
        d_out, d_in = widths(out)
        stored = "(in, out)" if is_transposed(out) else "(out, in)"
        ins = " and ".join(mlp.ins) or "(none found)"
        found.append(("MLP", f"{ins}, then {mlp.out} ({d_in:,} to {d_out:,}, stored {stored})"))
        try:
            mixes = attention_out(lm.model, lm.layout, stack.first).removeprefix(f"{lm.layout.block(stack.first)}.")
        except UsageError:
            mixes = "none found"
        found.append(("attention", f"writes through {mixes}"))
    return found


def _memory(lm: LM) -> str:
    total = sum(parameter.numel() for parameter in lm.model.parameters())
    taken = sum(parameter.nbytes for parameter in lm.model.parameters())
    return f"{total:,} parameters in {str(lm.dtype).removeprefix('torch.')}, {size(taken)} on {lm.device}"
