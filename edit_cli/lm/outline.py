"""What can be told of a model from its configuration alone, before any weight is loaded: where it keeps things, and how
much memory it takes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from edit_cli.lm.layout import Layout, LayoutOptions, discover, entrance, projections, widths

# bytes of one entry of a quantized matrix: NF4 has a float32 a block of 64, LLM.int8() hardly more than its bytes
QUANTIZED = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}


@dataclass(frozen=True)
class Outline:
    """A model without its values.

    model: its modules on the meta device (one of transformers). quantize: "4bit" or "8bit", or None.
    """

    name: str
    model: Any
    options: LayoutOptions
    dtype: torch.dtype
    quantize: str | None = None

    @cached_property
    def layout(self) -> Layout:
        """Raises as `discover`."""
        return discover(self.model, self.options)

    @property
    def config(self) -> Any:
        """Of the part that reads and writes text."""
        return self.model.config.get_text_config()

    @property
    def depth(self) -> int:
        return self.layout.depth

    @property
    def vocabulary(self) -> int:
        return self.config.vocab_size

    @property
    def reads_text(self) -> bool:
        return hasattr(self.config, "vocab_size")

    @cached_property
    def parameters(self) -> int:
        """Numbers in all weights; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def active(self) -> int:
        """Numbers that one token is multiplied with: without embeddings that are only looked up, and of experts those
        that it is dealt to.
        """
        looked_up = {id(parameter) for parameter in entrance(self.model).parameters()}
        head = self.model.get_output_embeddings()
        if head is not None:
            looked_up -= {id(parameter) for parameter in head.parameters()}
        return round(
            sum(
                parameter.numel() * self._share(name)
                for name, parameter in self.model.named_parameters()
                if id(parameter) not in looked_up
            )
        )

    def _share(self, name: str) -> float:
        """Part of a parameter that one token meets."""
        if "expert" not in name or "shared" in name:
            return 1.0
        counts = ("num_local_experts", "num_experts", "n_routed_experts")
        all_of_them = next((getattr(self.config, key) for key in counts if getattr(self.config, key, None)), 1)
        chosen = getattr(self.config, "num_experts_per_tok", None) or all_of_them
        return min(chosen / all_of_them, 1.0)

    @cached_property
    def bytes(self) -> int:
        """Of all weights as they are loaded."""
        if self.quantize is None:
            return self.parameters * self.dtype.itemsize
        head, total = self.model.get_output_embeddings(), 0.0
        matrices = {
            id(module.weight) for module in self.model.modules() if isinstance(module, nn.Linear) and module is not head
        }
        for parameter in self.model.parameters():
            packed = id(parameter) in matrices
            total += parameter.numel() * (QUANTIZED[self.quantize] if packed else self.dtype.itemsize)
        return round(total)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        config = self.config
        heads = getattr(config, "num_attention_heads", 1)
        pairs = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return 2 * self.depth * pairs * width * self.dtype.itemsize

    def key_width(self, layer: int) -> int:
        """Width of what enters the layer's MLP output projection."""
        return widths(self.model.get_submodule(self.layout.mlp_out(layer)))[1]

    @property
    def inner(self) -> int:
        """The widest state inside a block."""
        block = self.model.get_submodule(self.layout.block(0))
        return max((max(widths(block.get_submodule(name))) for name in projections(block)), default=self.layout.width)


def _no_values() -> AbstractContextManager[None]:
    """Values that nobody will see need not be drawn: a few times faster."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        return nullcontext()
    return no_init_weights()


def outlined(
    loader: Any, config: Any, name: str, options: LayoutOptions, dtype: torch.dtype, quantize: str | None, **more: Any
) -> Outline:
    """The outline of the model that `loader`, a class of transformers, would make of a configuration."""
    with torch.device("meta"), _no_values():
        model = loader.from_config(config, **more)
    model.tie_weights()
    return Outline(name, model.eval().requires_grad_(False), options, dtype, quantize)
