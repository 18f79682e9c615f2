"""Where a model keeps things, found by looking at its modules and not by its name.

blocks: the ModuleList of `num_hidden_layers` modules; MLP output: a block's last projection onto the hidden width that does
not belong to what mixes tokens (attention and its kin); head: `get_output_embeddings()`; final norm: the norm beside the
blocks. `model.layout.*` overrides each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from edit_cli.errors import UsageError
from edit_cli.lm.hooks import unwrapped

MIXERS = ("attn", "attention", "mamba", "mixer", "ssm", "conv", "recurrent", "temporal")  # parts that move things between tokens


@dataclass
class LayoutOptions:
    """Overrides of what discovery finds. `mlp_out` is relative to a block; a model without a final norm takes its last block for it."""

    blocks: str | None = None
    mlp_out: str | None = None
    final_norm: str | None = None


@dataclass(frozen=True)
class Layout:
    """Module names. Layers count from 0; `mlp_out(layer)` is the projection that locate-then-edit methods write to."""

    blocks: str
    mlp_out_in_block: str
    final_norm: str
    depth: int
    width: int

    def block(self, layer: int) -> str:
        if not 0 <= layer < self.depth:
            raise UsageError(f"layer {layer} does not exist: this model has layers 0 to {self.depth - 1} (method.layers or method.layer)")
        return f"{self.blocks}.{layer}"

    def mlp_out(self, layer: int) -> str:
        return f"{self.block(layer)}.{self.mlp_out_in_block}"


def is_projection(module: nn.Module) -> bool:
    return isinstance(unwrapped(module), (nn.Linear, Conv1D))


def is_transposed(module: nn.Module) -> bool:
    """Conv1D stores (d_in, d_out), Linear (d_out, d_in). By type, never by shape: square matrices have none to tell."""
    return isinstance(unwrapped(module), Conv1D)


def widths(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a projection, also of a quantised one, whose weight has another shape."""
    module = unwrapped(module)
    return (module.nf, module.nx) if is_transposed(module) else (module.out_features, module.in_features)


def discover(model: nn.Module, options: LayoutOptions | None = None) -> Layout:
    """Find the layout of a causal language model.

    Raises:
        UsageError: a mixture-of-experts model (keys depend on the routing), or a part that cannot be found; names the override.
    """
    options = options or LayoutOptions()
    config = model.config.get_text_config()
    blocks = options.blocks or _find_blocks(model, config.num_hidden_layers, config.hidden_size)
    stack = _module(model, blocks, "model.layout.blocks")
    if not isinstance(stack, nn.ModuleList) or not len(stack):
        raise UsageError(f"model.layout.blocks={blocks} is no list of blocks")
    _refuse_experts(stack, type(model).__name__)
    mlp_out = options.mlp_out or _find_mlp_out(stack[0], config.hidden_size)
    for number, block in enumerate(stack):
        if not is_projection(_module(block, mlp_out, "model.layout.mlp_out", f"block {number}")):
            raise UsageError(f"model.layout.mlp_out={mlp_out} is no Linear or Conv1D layer of block {number}")
    final_norm = options.final_norm or _find_final_norm(model, blocks, config.hidden_size)
    _module(model, final_norm, "model.layout.final_norm", "this model")
    return Layout(blocks, mlp_out, final_norm, len(stack), config.hidden_size)


def _module(root: nn.Module, name: str, field: str, where: str = "this model") -> nn.Module:
    try:
        return root.get_submodule(name)
    except AttributeError:
        raise UsageError(f"{field}={name} names no module of {where}") from None


def _find_blocks(model: nn.Module, depth: int, width: int) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and _onto(module[0], width):
            return name
    raise UsageError(f"no list of {depth} blocks found in {type(model).__name__}: name it with model.layout.blocks")


def _refuse_experts(blocks: nn.ModuleList, model: str) -> None:
    """All blocks are looked at: in some families the first few are dense."""
    for name, module in blocks.named_modules():
        words = f"{name} {type(module).__name__}".lower()
        if "expert" in words or "moe" in words:
            raise UsageError(
                f"{model} is a mixture of experts ({type(module).__name__} in its blocks): which matrix a key reaches depends on "
                "the routing, so no editor here can be right on it; choose a dense model (model.id)"
            )


def _onto(block: nn.Module, width: int) -> list[str]:
    """Projections of a block onto the hidden width, in the order in which it names them."""
    return [name for name, module in block.named_modules() if is_projection(module) and widths(module)[0] == width]


def _find_mlp_out(block: nn.Module, width: int) -> str:
    candidates = [name for name in _onto(block, width) if not any(mixer in name for mixer in MIXERS)]
    wider = [name for name in candidates if widths(block.get_submodule(name))[1] > width]
    if not candidates:
        raise UsageError("no MLP output projection found in a block: name it with model.layout.mlp_out (state-space models may have none)")
    return (wider or candidates)[-1]


def attention_out(model: nn.Module, layout: Layout, layer: int, mixers: Sequence[str] = MIXERS[:2]) -> str:
    """The output projection of a layer's attention: its last one onto the hidden width that is not an input's (linear attention has those).

    mixers: what counts as attention; `MIXERS` takes whatever stands in its place in the other layers of hybrid families.

    Raises:
        UsageError: this layer mixes tokens by something else.
    """
    block = layout.block(layer)
    inside = [name for name in _onto(model.get_submodule(block), layout.width) if any(mixer in name for mixer in mixers)]
    found = [name for name in inside if not name.rpartition(".")[2].startswith("in_")]
    if not found:
        raise UsageError(f"no attention output projection found in layer {layer}: choose a layer with attention (method.layers)")
    return f"{block}.{found[-1]}"


def _find_final_norm(model: nn.Module, blocks: str, width: int) -> str:
    """The last norm of the hidden width beside the blocks; one of the embeddings counts only if it comes after the blocks."""
    parent, _, own = blocks.rpartition(".")
    children = list(model.get_submodule(parent).named_children())
    after = [name for name, _ in children].index(own)
    for number, (name, module) in reversed(list(enumerate(children))):
        weight = getattr(module, "weight", None)
        fits = "norm" in type(module).__name__.lower() and (weight is None or weight.shape == (width,))
        if fits and ("embed" not in name or number > after):
            return f"{parent}.{name}" if parent else name
    raise UsageError(
        f"no final norm found beside {blocks}: name it with model.layout.final_norm (the last block, {blocks}.N, if there is none)"
    )
