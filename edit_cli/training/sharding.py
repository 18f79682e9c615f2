"""Trained parameters that are spread over processes (FSDP2): whole where they are read or kept, spread where they are
trained.

The frozen model is no part of it: each process holds all of it. Functions do nothing to parameters that are not spread;
all processes must call them together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from edit_cli.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# what accelerate's launcher sets in the environment
FSDP, MEGATRON = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"


def wanted_by_launcher() -> bool:
    """Whether accelerate's launcher was told to use FSDP; it is told no more, so that nobody spreads the frozen model.

    Raises:
        UsageError: it was told to use Megatron-LM, which brings models of its own.
    """
    if _is_set(MEGATRON):
        raise UsageError(
            "train-editor does not work with megatron-lm: launch with conf/accelerate/fsdp.yaml, which spreads network,"
            " gradients and optimizer states"
        )
    wanted = _is_set(FSDP)
    os.environ.pop(FSDP, None)
    return wanted


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def spread_out(step: nn.Module, device: torch.device) -> None:
    """Spread all parameters of a module over all processes, in place; its `forward` puts them together for the time
    of a step.
    """
    from torch.distributed import get_world_size, init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(step, mesh=init_device_mesh(device.type, (get_world_size(),)))


def is_spread(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether each process holds a part of it alone."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def spread_like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, spread as `other` is if it has its shape (a step count of an optimizer has not)."""
    if not is_spread(other) or value.shape != other.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)


def whole_state(net: nn.Module) -> dict[str, Tensor]:
    """`state_dict`, whole."""
    return {name: whole(value) for name, value in net.state_dict().items()}


def load_whole(net: nn.Module, values: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of whole values."""
    own = net.state_dict()
    net.load_state_dict(
        {name: spread_like(value, own[name]) if name in own else value for name, value in values.items()}
    )


@contextmanager
def gathered(step: nn.Module) -> Iterator[None]:
    """Whole parameters inside the block, in which processes may do different numbers of passes."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(step, FSDPModule):
        yield
        return
    step.unshard()
    try:
        yield
    finally:
        step.reshard()
