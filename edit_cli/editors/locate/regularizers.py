"""What may be done to a finished update, whatever method made it: RECT keeps few of its entries, PRUNE damps its
singular values.

Both look at the weights that the update will be added to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.lm.layout import is_transposed
from edit_cli.lm.model import LM


def rect(lm: LM, delta: WeightDelta, keep: float) -> WeightDelta:
    """RECT (Gu et al., 2024): keep the share `keep` of each matrix's entries, those with the largest |Δ / W|, and
    zero the others.
    """
    kept: dict[str, Factors | Tensor] = {
        name: largest_relative(delta.stored(lm, name), _weight(lm, name), keep) for name in delta.updates
    }
    return WeightDelta(kept, delta.info)


def largest_relative(update: Tensor, weight: Tensor, keep: float) -> Tensor:
    """`update` with the entries zeroed whose |Δ| / (|W| + 1e-8) is not among the share `keep` of the largest."""
    change = update.abs() / (weight.to(update).abs() + 1e-8)
    dropped = change.numel() - math.ceil(keep * change.numel())
    if not dropped:
        return update
    return torch.where(change > change.flatten().kthvalue(dropped).values, update, 0.0)


def prune(lm: LM, delta: WeightDelta, base: float) -> WeightDelta:
    """PRUNE (Ma et al., 2025): damp each update's singular values σ above σ̄, the largest of its weight: σ → log σ −
    log σ̄ + σ̄.

    base: of the logarithm. Applied to one edit that holds all facts it is the method as published.
    """
    damped: dict[str, Factors | Tensor] = {}
    for name, update in delta.updates.items():
        largest = spectral_norm(_weight(lm, name))
        if isinstance(update, Factors):
            damped[name] = damped_factors(update, largest, base)
        else:
            transposed = is_transposed(lm.module(name.rpartition(".")[0]))
            whole = update.T if transposed else update
            damped[name] = damped_factors(Factors(whole, torch.eye(whole.shape[1]).to(whole)), largest, base)
    return WeightDelta(damped, delta.info)


def damped_factors(update: Factors, largest: float, base: float) -> Factors:
    """U F(Σ) Vᵀ of `left @ right` = U Σ Vᵀ, without ever forming the product."""
    left, upper = torch.linalg.qr(update.left.double())
    right, lower = torch.linalg.qr(update.right.double().T)
    u, sigma, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    over = (torch.log(sigma / largest) / math.log(base) + largest).where(sigma > largest, sigma)
    exact = update.left.dtype
    return Factors((left @ u * over).to(exact), (v @ right.T).to(exact))


def spectral_norm(weight: Tensor, tolerance: float = 1e-9, most: int = 1000) -> float:
    """The largest singular value, by power iteration from a fixed start."""
    matrix = weight.double()
    start = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector, found = start.to(matrix.device) / start.norm(), 0.0
    for _ in range(most):
        image = matrix.T @ (matrix @ vector)
        before, found = found, float(image.norm())
        if found - before <= tolerance * found:
            break
        vector = image / found
    return math.sqrt(found)


def _weight(lm: LM, name: str) -> Tensor:
    """A parameter as it is stored, at least in float32."""
    return lm.masters[name] if name in lm.masters else lm.access(name).value()
