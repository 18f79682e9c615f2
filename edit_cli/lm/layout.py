"""Where a model keeps things, found by looking at its modules and not by its name.

blocks: the ModuleList of `num_hidden_layers` modules (encoder-decoder models: one in either); MLP output: a block's
last projection onto the hidden width that does not belong to what mixes tokens (attention and its kin); head:
`get_output_embeddings()`; final norm: the norm beside the blocks. `model.layout.*` overrides each in models of one
stack. Models of images whose width grows from stage to stage (ResNet) have a stack a stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from edit_cli.config.schema import Config
from edit_cli.errors import UsageError
from edit_cli.lm.hooks import unwrapped
from edit_cli.lm.matrices import has_matrix, matrix_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# parts that move things between tokens
MIXERS = ("attn", "attention", "mamba", "mixer", "ssm", "conv", "recurrent", "temporal")


@dataclass(frozen=True, kw_only=True)
class LayoutOptions(Config):
    """Names of modules that overrule what discovery finds; null: found."""

    place = "model.layout"

    blocks: str | None = None
    """The list of blocks, such as model.layers."""
    mlp_out: str | None = None
    """The MLP's output projection inside a block, such as mlp.down_proj."""
    final_norm: str | None = None
    """Such as model.norm; the last block where there is none."""


@dataclass(frozen=True)
class MLP:
    """Names of its projections inside a block, in the order in which they run; a gated one has two ins, unless one
    matrix holds both.
    """

    ins: tuple[str, ...]
    out: str


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after another. first: number of its first layer in the model.

    mlp: that of every block without experts. mixtures: of each block, counted within the stack, whose tokens are dealt
    out to experts, the MLP that all of them pass beside those, or None. final_norm: the last block where there is none.
    """

    name: str  # encoder, decoder or stage N
    blocks: str
    mlp: MLP | None
    final_norm: str
    first: int
    depth: int
    mixtures: Mapping[int, MLP | None] = field(default_factory=dict)

    @property
    def layers(self) -> range:
        return range(self.first, self.first + self.depth)

    def mlp_of(self, layer: int) -> MLP | None:
        """The MLP that every token of a layer passes; None where there are experts alone."""
        return self.mixtures.get(layer - self.first, self.mlp)


@dataclass(frozen=True)
class Layout:
    """Module names.

    Layers count from 0 through all stacks, an encoder's before its decoder's; `mlp_out(layer)` is the projection that
    locate-then-edit methods write to. The first stack is the one that reads the prompt.
    """

    stacks: tuple[Stack, ...]
    width: int

    @property
    def depth(self) -> int:
        """Layers of all stacks."""
        return sum(stack.depth for stack in self.stacks)

    @property
    def blocks(self) -> str:
        return self.stacks[0].blocks

    @property
    def final_norm(self) -> str:
        return self.stacks[0].final_norm

    @property
    def prompt_depth(self) -> int:
        """Layers that keep a state for each token of the prompt."""
        return self.stacks[0].depth

    def stack(self, layer: int) -> Stack:
        for stack in self.stacks:
            if layer in stack.layers:
                return stack
        parts = ", ".join(
            f"{stack.first} to {stack.layers[-1]} in the {stack.name}" for stack in self.stacks if len(self.stacks) > 1
        )
        raise UsageError(
            f"layer {layer} does not exist: this model has layers 0 to {self.depth - 1}{f' ({parts})' if parts else ''}"
            " (method.layers or method.layer)"
        )

    def block(self, layer: int) -> str:
        stack = self.stack(layer)
        return f"{stack.blocks}.{layer - stack.first}"

    @property
    def has_experts(self) -> bool:
        """Whether some blocks are mixtures of experts."""
        return any(stack.mixtures for stack in self.stacks)

    def is_mixture(self, layer: int) -> bool:
        """Whether this block's MLP is a mixture of experts."""
        stack = self.stack(layer)
        return layer - stack.first in stack.mixtures

    def refuse_experts(self, what: str, model: str) -> None:
        """Raises UsageError: the model has experts, with which `what` cannot be right."""
        if self.has_experts:
            raise UsageError(
                f"{what} cannot be right on {model}, a mixture of experts: which matrix a key reaches depends on the"
                " routing, and a written matrix changes the routing of the layers above it; choose a dense model"
                " (model.id), or a method that stands beside the model (grace, tpatcher, lookup, ike, serac)"
            )

    def mlp(self, layer: int) -> MLP:
        """The MLP of a layer; of a mixture of experts the shared one, which every token passes.

        Raises:
            UsageError: there is none.
        """
        found = self.stack(layer).mlp_of(layer)
        if found is None:
            raise UsageError(
                f"layer {layer} is a mixture of experts without an MLP that every token passes: choose another layer,"
                " another method (grace), or a dense model (model.id)"
            )
        return found

    def mlp_out(self, layer: int) -> str:
        """Raises UsageError: there is none that every token passes."""
        return f"{self.block(layer)}.{self.mlp(layer).out}"

    def mlp_weights(self, layer: int, second_in: bool = True) -> tuple[str, ...]:
        """Names of the weight matrices of a layer's MLP, ins before out. second_in: whether those of gated MLPs count.

        Raises:
            UsageError: no matrix before the MLP's output was found.
        """
        mlp = self.mlp(layer)
        if not mlp.ins:
            raise UsageError(f"no MLP input projection found in layer {layer}")
        ins = mlp.ins if second_in else mlp.ins[:1]
        return tuple(f"{self.block(layer)}.{name}.weight" for name in (*ins, mlp.out))

    def last_layers(self, count: int) -> list[int]:
        """The last `count` layers of every stack, or all of a stack that has no more."""
        return [layer for stack in self.stacks for layer in stack.layers[-count:]]


def is_projection(module: nn.Module) -> bool:
    return isinstance(unwrapped(module), (nn.Linear, Conv1D))


def projections(module: nn.Module) -> list[str]:
    """Names of the projections inside a module; convolutions are projections of patches."""
    return [name for name, part in module.named_modules() if has_matrix(part) and ".original" not in f".{name}"]


def is_transposed(module: nn.Module) -> bool:
    """Conv1D stores (d_in, d_out), Linear (d_out, d_in). By type, never by shape: square matrices have none to tell."""
    return isinstance(unwrapped(module), Conv1D)


def widths(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a projection, also of a quantized one, whose weight has another shape."""
    return matrix_of(module).widths


def entrance(model: PreTrainedModel) -> nn.Module:
    """What meets the input first: the embeddings, or the first module with weights of a model that has none."""
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:  # models of images
        found = None
    return found or next(
        module for module in model.modules() if next(module.parameters(recurse=False), None) is not None
    )


def discover(model: PreTrainedModel, options: LayoutOptions | None = None) -> Layout:
    """Find the layout of a model.

    Raises:
        UsageError: a part that cannot be found; names the override.
    """
    options, config = options or LayoutOptions(), model.config.get_text_config()
    if getattr(config, "depths", None) and not hasattr(config, "num_hidden_layers"):
        return _staged(model, config.depths, config.hidden_sizes[-1])
    if not getattr(model.config, "is_encoder_decoder", False):
        name = "encoder" if model.get_output_embeddings() is None else "decoder"
        return Layout((_stack(model, name, config.num_hidden_layers, config.hidden_size, options),), config.hidden_size)
    if options != LayoutOptions():
        raise UsageError(
            "model.layout.* names the parts of a model with one list of blocks; this one has an encoder and a decoder"
        )
    stacks: list[Stack] = []
    for name, part in (("encoder", model.get_encoder()), ("decoder", model.get_decoder())):
        inside = next(found for found, module in model.named_modules() if module is part)
        stacks.append(
            _stack(model, name, None, config.hidden_size, options, inside, sum(stack.depth for stack in stacks))
        )
    return Layout(tuple(stacks), config.hidden_size)


def _stack(
    model: PreTrainedModel,
    name: str,
    depth: int | None,
    width: int,
    options: LayoutOptions,
    inside: str = "",
    first: int = 0,
) -> Stack:
    """The stack of `depth` blocks (None: of any number) in the module `inside`."""
    blocks = options.blocks or _find_blocks(model, depth, width, inside)
    stack = _module(model, blocks, "model.layout.blocks")
    if not isinstance(stack, nn.ModuleList) or not len(stack):
        raise UsageError(f"model.layout.blocks={blocks} is no list of blocks")
    mixtures = {number: _shared_mlp(block, width) for number, block in enumerate(stack) if _has_experts(block)}
    dense = [number for number in range(len(stack)) if number not in mixtures]
    mlp = _mlp(stack, dense, width, options) if dense else None
    optional = bool(inside) or name == "encoder"  # post-norm stacks end with a block
    final_norm = options.final_norm or _find_final_norm(
        model, blocks, width, f"{blocks}.{len(stack) - 1}" if optional else None
    )
    _module(model, final_norm, "model.layout.final_norm", "this model")
    return Stack(name, blocks, mlp, final_norm, first, len(stack), mixtures)


def _staged(model: PreTrainedModel, depths: Sequence[int], width: int) -> Layout:
    """The layout of a model of images in stages: the innermost lists of blocks, of which there are so many in each."""
    found = [name for name, part in model.named_modules() if _is_stage(part)]
    if [len(model.get_submodule(name)) for name in found] != list(depths):  # type: ignore[arg-type]
        raise UsageError(f"no stages of {', '.join(map(str, depths))} blocks found in {type(model).__name__}")
    stacks: list[Stack] = []
    for number, (blocks, depth) in enumerate(zip(found, depths, strict=True), 1):
        *ins, out = _in_turn(model.get_submodule(f"{blocks}.0"))
        first = sum(stack.depth for stack in stacks)
        stacks.append(Stack(f"stage {number}", blocks, MLP(tuple(ins), out), f"{blocks}.{depth - 1}", first, depth))
    return Layout(tuple(stacks), width)


def _is_stage(part: nn.Module) -> bool:
    """Whether it is a list of blocks, of several projections each, and no block of it holds such a list."""

    def lists_blocks(module: nn.Module) -> bool:
        listed = isinstance(module, nn.ModuleList | nn.Sequential)
        return listed and all(len(_in_turn(block)) > 1 for block in module.children())

    return lists_blocks(part) and not any(lists_blocks(inner) for inner in part.modules() if inner is not part)


def _in_turn(block: nn.Module) -> list[str]:
    """A block's projections beside its shortcut, which take the place of an MLP's."""
    return [name for name in projections(block) if "shortcut" not in name and "downsample" not in name]


def _mlp(stack: nn.ModuleList, dense: Sequence[int], width: int, options: LayoutOptions) -> MLP:
    """The MLP of the blocks of these numbers, found in the first of them."""
    out = options.mlp_out or _find_mlp_out(stack[dense[0]], width)
    for number in dense:
        if not is_projection(_module(stack[number], out, "model.layout.mlp_out", f"block {number}")):
            raise UsageError(f"model.layout.mlp_out={out} is no Linear or Conv1D layer of block {number}")
    return MLP(_find_mlp_ins(stack[dense[0]], out, width), out)


def _module(root: nn.Module, name: str, field: str, where: str = "this model") -> nn.Module:
    try:
        return root.get_submodule(name)
    except AttributeError:
        raise UsageError(f"{field}={name} names no module of {where}") from None


def _find_blocks(model: PreTrainedModel, depth: int | None, width: int, inside: str) -> str:
    for name, module in model.get_submodule(inside).named_modules(prefix=inside):
        if (
            isinstance(module, nn.ModuleList)
            and depth in (None, len(module))
            and len(module)
            and _onto(module[0], width)
        ):
            return name
    wanted = "blocks" if depth is None else f"{depth} blocks"
    raise UsageError(f"no list of {wanted} found in {inside or type(model).__name__}: name it with model.layout.blocks")


def _has_experts(block: nn.Module) -> bool:
    """Whether a router deals its tokens out: of some families only some blocks do so."""
    return any("expert" in f"{name} {type(module).__name__}".lower() for name, module in block.named_modules())


def _shared_mlp(block: nn.Module, width: int) -> MLP | None:
    """The MLP that every token of a mixture passes beside its experts, if it has one."""
    dealt_out = [
        name
        for name, module in block.named_modules()
        if name
        and "expert" in f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
        and "shared" not in name.lower()
    ]
    found = [
        name
        for name in _onto(block, width)
        if not _mixes(name) and not any(f"{name}.".startswith(f"{part}.") for part in dealt_out)
    ]
    if not found:
        return None
    parent = found[-1].rpartition(".")[0]
    return MLP(tuple(name for name in _find_mlp_ins(block, found[-1], width) if name.startswith(parent)), found[-1])


def _onto(block: nn.Module, width: int) -> list[str]:
    """Projections of a block onto the hidden width, in the order in which it names them."""
    return [name for name, module in block.named_modules() if is_projection(module) and widths(module)[0] == width]


def _find_mlp_out(block: nn.Module, width: int) -> str:
    candidates = [name for name in _onto(block, width) if not _mixes(name)]
    wider = [name for name in candidates if widths(block.get_submodule(name))[1] > width]
    if not candidates:
        raise UsageError(
            "no MLP output projection found in a block: name it with model.layout.mlp_out (state-space models may have"
            " none)"
        )
    return (wider or candidates)[-1]


def _find_mlp_ins(block: nn.Module, mlp_out: str, width: int) -> tuple[str, ...]:
    """Projections from the hidden width onto the MLP's inner one (or twice as wide: a gate in the same matrix), up
    to its output.
    """
    inner, found = widths(block.get_submodule(mlp_out))[1], []
    for name, module in block.named_modules():
        if name == mlp_out:
            break
        if is_projection(module) and widths(module) in ((inner, width), (2 * inner, width)) and not _mixes(name):
            found.append(name)
    return tuple(found)


def _mixes(name: str) -> bool:
    return any(mixer in name.lower() for mixer in MIXERS)


def activation(model: PreTrainedModel) -> nn.Module:
    """The MLPs' activation function, as the configuration names it; GELU where it names none."""
    from transformers.activations import ACT2FN

    config = model.config.get_text_config()
    names = ("hidden_act", "activation_function", "hidden_activation", "dense_act_fn", "activation", "activation_type")
    found = next((getattr(config, name) for name in names if getattr(config, name, None) in ACT2FN), "gelu")
    return ACT2FN[found]


def attention_out(model: nn.Module, layout: Layout, layer: int, mixers: Sequence[str] = MIXERS[:2]) -> str:
    """The output projection of a layer's attention: its last one onto the hidden width that is not an input's (linear
    attention has those).

    mixers: what counts as attention; `MIXERS` takes whatever stands in its place in the other layers of hybrid
        families.

    Raises:
        UsageError: this layer mixes tokens by something else.
    """
    block = layout.block(layer)
    inside = [
        name
        for name in _onto(model.get_submodule(block), layout.width)
        if any(mixer in name.lower() for mixer in mixers)
    ]
    found = [name for name in inside if not name.rpartition(".")[2].startswith("in_")]
    if not found:
        raise UsageError(
            f"no attention output projection found in layer {layer}: choose a layer with attention (method.layers)"
        )
    return f"{block}.{found[-1]}"


def _find_final_norm(model: PreTrainedModel, blocks: str, width: int, otherwise: str | None) -> str:
    """The last norm of the hidden width beside the blocks; one of the embeddings counts only if it comes after the
    blocks.

    otherwise: what stands in where there is none. Such stacks may also name the norm of their embeddings after their
    blocks.
    """
    parent, _, own = blocks.rpartition(".")
    children = list(model.get_submodule(parent).named_children())
    after = [name for name, _ in children].index(own)
    for number, (name, module) in reversed(list(enumerate(children))):
        weight = getattr(module, "weight", None)
        fits = "norm" in type(module).__name__.lower() and (weight is None or weight.shape == (width,))
        if fits and ("embed" not in name or (number > after and otherwise is None)):
            return f"{parent}.{name}" if parent else name
    if otherwise is not None:
        return otherwise
    raise UsageError(
        f"no final norm found beside {blocks}: name it with model.layout.final_norm (the last block, {blocks}.N, if"
        " there is none)"
    )
