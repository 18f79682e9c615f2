"""From a loss to the next parameters: alone, with gradients averaged over processes (DDP), or with the network
spread over them (FSDP2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from edit_cli.training.sharding import is_spread, whole


class Descent:
    """Backward passes and optimizer steps by accelerate. step: what is to be called for a loss.

    optimizer: with `param_groups` and state.
    """

    def __init__(self, step: nn.Module, optimizer: torch.optim.Optimizer, clip: float, accelerator: Any) -> None:
        """clip: the largest norm of a gradient; 0 for any."""
        self.parameters = [parameter for parameter in step.parameters() if parameter.requires_grad]
        self.accelerator, self.clip = accelerator, clip if clip > 0 else math.inf
        self.optimizer = accelerator.prepare(optimizer)
        self.step = step if any(map(is_spread, self.parameters)) else accelerator.prepare(step)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients."""
        self.accelerator.backward(loss)

    def apply(self) -> float:
        """One step along the gradients, none if they are no numbers; their norm before clipping.

        With fp16's scaler the optimizer is always called: it leaves out such a step itself, and lowers the scale that
        made the gradients overflow.
        """
        norm = float(whole(self.accelerator.clip_grad_norm_(self.parameters, self.clip)))
        if math.isfinite(norm) or self.accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm
