"""Weights of a model that is larger than its devices: accelerate keeps them in host memory or on disk, and a hook of
their module brings
them to the device for as long as the module computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True)
class Carrier:
    """The hook that brings a parameter, the module that it belongs to, and the parameter's name in there."""

    hook: Any
    module: nn.Module
    key: str


def carrier_of(model: nn.Module, name: str) -> Carrier | None:
    """Who brings the parameter `name`, None if it stays where it is. As a rule that is its own module's hook."""
    parts = name.split(".")
    for length in range(len(parts) - 1, -1, -1):
        module, key = model.get_submodule(".".join(parts[:length])), ".".join(parts[length:])
        hook = offloading_hook(module)
        if hook is not None and key in dict(module.named_parameters(recurse=hook.place_submodules)):
            return Carrier(hook, module, key)
    return None


def offloading_hook(module: nn.Module) -> Any | None:
    """The hook of accelerate that takes the module's weights off the device after each forward pass."""
    hook = getattr(module, "_hf_hook", None)
    return next((each for each in getattr(hook, "hooks", [hook]) if getattr(each, "offload", False)), None)


def execution_device(module: nn.Module) -> torch.device:
    """Where the module computes."""
    hook = offloading_hook(module)
    return next(module.parameters()).device if hook is None else torch.device(hook.execution_device)


def fetch_again_for_backward(model: nn.Module) -> None:
    """Let backward passes bring the weights that they need once more.

    Autograd would hold on to every weight that a forward pass has used, until all of the model is on the device after
    all.
    """
    module: Any  # accelerate keeps a module's own `forward` beside the one with its hook
    for module in model.modules():
        hook = offloading_hook(module)
        if hook is not None:
            module._old_forward = _letting_go(module._old_forward, module, hook)


def _letting_go(forward: Callable[..., Any], module: nn.Module, hook: Any) -> Callable[..., Any]:
    def forward_that_lets_go(*args: Any, **kwargs: Any) -> Any:
        if not (hook.offload and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        brought = {
            weight.untyped_storage().data_ptr(): name
            for name, weight in module.named_parameters(recurse=hook.place_submodules)
        }
        brought.pop(0, None)  # has no storage
        source = hook.weights_map  # as it is now, with the edits that are attached

        def pack(saved: Tensor) -> Tensor | Later:
            name = brought.get(saved.untyped_storage().data_ptr())
            if name is None:
                return saved
            offset = int(saved.storage_offset())
            return Later(source, name, saved.device, saved.dtype, tuple(saved.shape), saved.stride(), offset)

        with saved_tensors_hooks(pack, lambda packed: packed.fetch() if isinstance(packed, Later) else packed):
            return forward(*args, **kwargs)

    return forward_that_lets_go


@dataclass(frozen=True)
class Later:
    """A weight, or a view of one, that a backward pass will need."""

    source: Mapping[str, Tensor]
    name: str
    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def fetch(self) -> Tensor:
        weight = self.source[self.name].to(self.device, self.dtype).contiguous()
        return weight.as_strided(self.shape, self.stride, self.offset)
