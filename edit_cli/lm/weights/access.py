"""Where a weight is kept, and how another value takes its place there and comes off again, bit for bit.

Most weights lie in their module. Those of a model that is larger than its devices lie in host memory or on disk.
Quantized ones cannot take in an edit: it stays beside them, in more digits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edit_cli.errors import UsageError
from edit_cli.lm.hooks import exact, unwrapped
from edit_cli.lm.layout import is_projection, widths
from edit_cli.lm.weights.offload import Carrier, carrier_of

Undo = Callable[[], None]


def access_to(model: nn.Module, name: str, dtype: torch.dtype) -> WeightAccess:
    """The place of one parameter. dtype: of what is added beside a quantized one.

    Raises:
        AttributeError: the model has no such parameter.
    """
    owner, _, leaf = name.rpartition(".")
    parameter, module = model.get_parameter(name), unwrapped(model.get_submodule(owner))
    carrier = carrier_of(model, name)
    if parameter.is_floating_point():
        return DeviceWeight(module, leaf) if carrier is None else OffloadedWeight(module, leaf, carrier)
    if carrier is not None or not is_projection(module):
        where = "kept off the device" if carrier is not None else f"of a {type(module).__name__}"
        raise UsageError(
            f"{name} is quantized and {where}, where nothing can be added beside it: use a device that holds it"
        )
    return QuantizedWeight(module, leaf, dtype)


class WeightAccess(ABC):
    """One parameter, wherever it is. Values are oriented as its module stores them."""

    def __init__(self, module: nn.Module, leaf: str) -> None:
        self.module, self.leaf = module, leaf

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.leaf)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    @property
    def rounds(self) -> bool:
        """Whether it has fewer digits than float32, so that small updates would be lost one by one."""
        return torch.finfo(self.parameter.dtype).bits < 32

    def bits(self) -> list[Tensor]:
        """All that its value depends on."""
        return [self.value()]

    @abstractmethod
    def value(self) -> Tensor:
        """What the module computes with."""

    @abstractmethod
    def assign(self, value: Tensor) -> None:
        """Let the module compute with `value`, rounded to what it can take."""

    @abstractmethod
    def snapshot(self) -> Undo:
        """What puts the present value back, bit for bit."""

    @abstractmethod
    def tunable(self) -> AbstractContextManager[Tensor]:
        """Context with the tensor by which to differentiate; `assign` works in it as ever.

        What it changes is undone by `snapshot`.
        """


class DeviceWeight(WeightAccess):
    """A weight that lies in its module."""

    def value(self) -> Tensor:
        return self.parameter.detach()

    def assign(self, value: Tensor) -> None:
        self.parameter.data.copy_(value)

    def snapshot(self) -> Undo:
        original = self.parameter.detach().clone()
        return lambda: self.assign(original)

    @contextmanager
    def tunable(self) -> Iterator[Tensor]:
        self.parameter.requires_grad_(True)
        try:
            yield self.parameter
        finally:
            self.parameter.requires_grad_(False)


class OffloadedWeight(WeightAccess):
    """A weight that a hook takes from its `weights_map` for every forward pass.

    An assigned value stands in front of the map, in host
    memory; the map itself and the files behind it stay as they are.
    """

    def __init__(self, module: nn.Module, leaf: str, carrier: Carrier) -> None:
        super().__init__(module, leaf)
        self.hook, self.holder, self.key = carrier.hook, carrier.module, carrier.key

    def value(self) -> Tensor:
        return self.hook.weights_map[self.key].detach()

    def assign(self, value: Tensor) -> None:
        if not self.hook.offload:  # being tuned
            self.parameter.data.copy_(value)
            return
        present = self.hook.weights_map
        assigned, below = present.maps if isinstance(present, ChainMap) else ({}, present)
        value = value.to("cpu", self.parameter.dtype, copy=True)
        self.hook.weights_map = ChainMap({**assigned, self.key: value}, below)

    def snapshot(self) -> Undo:
        present = self.hook.weights_map

        def undo() -> None:
            self.hook.weights_map = present

        return undo

    @contextmanager
    def tunable(self) -> Iterator[Tensor]:
        """The weight stays on the device inside the block."""
        self.hook.pre_forward(self.holder)
        self.hook.offload = False
        self.parameter.data = self.parameter.data.clone()  # where the device is the host, it is the map's own tensor
        self.parameter.requires_grad_(True)
        try:
            yield self.parameter
        finally:
            self.parameter.requires_grad_(False)
            self.hook.offload = True
            self.hook.post_forward(self.holder, None)


class QuantizedWeight(WeightAccess):
    """A projection's weight in few bits.

    An assigned value is met by adding x Δᵀ to what leaves the projection, Δ being what the
    quantized weight lacks of it, in `dtype`.
    """

    def __init__(self, module: nn.Module, leaf: str, dtype: torch.dtype) -> None:
        super().__init__(module, leaf)
        self.dtype = dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return widths(self.module)

    @property
    def rounds(self) -> bool:
        return True

    @property
    def _added(self) -> QuantizedDelta | None:
        return next((hook for hook in self.module._forward_hooks.values() if isinstance(hook, QuantizedDelta)), None)

    def bits(self) -> list[Tensor]:
        """The packed weight, its scales, and what stands beside it."""
        stored = self.module.state_dict()
        parts = [stored[key] for key in sorted(stored) if key != "bias" and isinstance(stored[key], Tensor)]
        return parts + ([self._added.delta] if self._added else [])

    def value(self) -> Tensor:
        """In float32."""
        plain = self._plain()
        return plain + self._added.delta.to(plain) if self._added else plain

    def _plain(self) -> Tensor:
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        return exact(dequantize_bnb_weight(self.parameter, getattr(self.module, "state", None)).detach())

    def assign(self, value: Tensor) -> None:
        delta = (value - self._plain().to(value)).to(self.parameter.device, self.dtype)
        if self._added and self._added.delta.requires_grad:  # being tuned
            self._added.delta.data.copy_(delta)
        else:
            self._put(delta)

    def _put(self, delta: Tensor | None) -> None:
        if self._added:
            self._added.handle.remove()
        if delta is not None:
            QuantizedDelta(self.module, delta)

    def snapshot(self) -> Undo:
        present = self._added.delta if self._added else None
        return lambda: self._put(present)

    @contextmanager
    def tunable(self) -> Iterator[Tensor]:
        """Δ itself: the gradient by it is that by the weight."""
        before = (
            self._added.delta.clone()
            if self._added
            else torch.zeros(self.shape, dtype=self.dtype, device=self.parameter.device)
        )
        self._put(before.requires_grad_(True))
        try:
            yield before
        finally:
            self._put(before.detach())


class QuantizedDelta:
    """Forward hook of a projection that adds x Δᵀ to its output. delta: Δ (d_out, d_in)."""

    def __init__(self, module: nn.Module, delta: Tensor) -> None:
        self.delta = delta
        # whoever reads or changes the output comes after it
        self.handle = module.register_forward_hook(self, prepend=True)

    def __call__(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + nn.functional.linear(args[0].to(self.delta), self.delta).to(output)
