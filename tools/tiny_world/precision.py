"""The arithmetic that the small models are trained in: bfloat16 where the processor computes in it, float32 elsewhere.

A processor without instructions for bfloat16 emulates it, at about a twentieth of the speed of float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, as published with Muon
STEPS = 5


def working_dtype() -> torch.dtype:
    """What products of matrices are computed in on this machine."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def autocast() -> AbstractContextManager[None]:
    """Forward passes in `working_dtype()`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=working_dtype() is torch.bfloat16)


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"`, but orthogonalizing in `working_dtype()`: torch's always
    does so in bfloat16.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step along the orthogonalized, momentum-smoothed gradients of the matrices."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                mean = self.state[matrix].setdefault("mean", torch.zeros_like(matrix))
                mean.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalized(matrix.grad.lerp(mean, group["momentum"]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


def orthogonalized(gradient: Tensor) -> Tensor:
    """gradient (m, n) with all its singular values brought near 1, by Newton–Schulz iteration."""
    a, b, c = COEFFICIENTS
    tall = len(gradient) > gradient.shape[1]
    x = (gradient.mT if tall else gradient).to(working_dtype(), copy=True)
    x.div_(x.norm().clamp(min=1e-7))
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
