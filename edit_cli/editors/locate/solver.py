"""One objective, one solver (locate-then-edit, section 5): keep W K0, make W K = V, R = V − W K.

    Δ = R Kᵀ (λC + K Kᵀ)⁻¹  =  R (Kᵀ C⁻¹ K + λ I)⁻¹ Kᵀ C⁻¹

λ > 0 is MEMIT, λ = 0 with many keys EMMET, λ = 0 with one key ROME. Keys of earlier edits that must keep their values
are columns of K whose residual is zero. All in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import torch
from torch import Tensor

from edit_cli.config.schema import Form, NonNegative, SettingError
from edit_cli.edits.edit import Factors
from edit_cli.errors import UsageError

RELATIVE = "relative:"  # begins a weight in units of the keys'
AUTO_SHARE = 0.25  # of `auto`; chosen in docs/methods/memit.md


class Covariance:
    """The second moment C (m, m) of a layer's keys, mean over tokens, float64, with its Cholesky factor made once."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = ((matrix + matrix.T) / 2).double()

    @cached_property
    def cholesky(self) -> Tensor:
        return safe_cholesky(self.matrix)

    def whiten(self, keys: Tensor) -> Tensor:
        """L⁻¹ K for C = L Lᵀ; (m, n)."""
        return torch.linalg.solve_triangular(self.cholesky, keys, upper=False)

    def inverse_times(self, keys: Tensor) -> Tensor:
        """C⁻¹ K; (m, n)."""
        return torch.cholesky_solve(keys, self.cholesky)


class ScaledIdentity(Covariance):
    """C = scale · I, for those who keep no statistics or keep old values by other means."""

    def __init__(self, width: int, device: torch.device, scale: float = 1.0) -> None:
        self.width, self.device, self.scale = width, device, scale

    @cached_property
    def matrix(self) -> Tensor:  # type: ignore[override]  # made only where it is asked for
        return self.scale * torch.eye(self.width, dtype=torch.float64, device=self.device)

    def whiten(self, keys: Tensor) -> Tensor:
        return keys / self.scale**0.5

    def inverse_times(self, keys: Tensor) -> Tensor:
        return keys / self.scale


@dataclass(frozen=True)
class Relative:
    """λ = share · mean of kᵀ C⁻¹ k over the keys that are written.

    A single fact is written to kᵀ C⁻¹ k / (kᵀ C⁻¹ k + λ) = 1 / (1 + share), whatever the model, the layer and the scale
    of its activations; facts whose keys have something in common, to more.
    """

    share: float

    def of(self, keys: Tensor, covariance: Covariance) -> float:
        return self.share * float(covariance.whiten(keys.double()).square().sum(dim=0).mean())


Weight = float | Relative


WeightSetting = NonNegative | Annotated[str, Form(f"auto, or {RELATIVE}X with X above 0, such as {RELATIVE}0.5")]


def weight_of(setting: float | str, place: str, name: str) -> Weight:
    """The weight that a setting gives: a number as it is, `relative:x`, or `auto`.

    Raises:
        SettingError: it is something else.
    """
    if not isinstance(setting, str):
        return setting
    if setting == "auto":
        return Relative(AUTO_SHARE)
    try:
        share = float(setting.removeprefix(RELATIVE))
    except ValueError:
        share = math.nan
    if not setting.startswith(RELATIVE) or not 0 < share < math.inf:
        raise SettingError(
            place,
            name,
            f"={setting}: give a number from 0 up, auto, or {RELATIVE}X with X above 0, such as {RELATIVE}0.5",
        )
    return Relative(share)


def solve(
    residual: Tensor,
    keys: Tensor,
    covariance: Covariance,
    weight: Weight,
    form: str = "auto",
    past: Tensor | None = None,
) -> Factors:
    """The update Δ (d, m) as factors `residual @ right`.

    residual: (d, n). keys: (m, n). weight: λ, how strongly old keys are kept against new ones; 0 demands Δ K = R
    exactly; one that is relative, to `keys` and C.
    past: (m, t) keys whose values must stay, as strongly as the new ones are written: Δ = R Kᵀ (λC + K_p K_pᵀ + K
    Kᵀ)⁻¹.
    form: "dual" solves (n + t) × (n + t), "primal" m × m, "auto" the cheaper one.

    Raises:
        UsageError: λ = 0 with keys that are not independent (two facts about one subject), or more keys than
            dimensions.
    """
    keys = keys.double()
    if isinstance(weight, Relative):
        weight = weight.of(keys, covariance)
    every = keys if past is None else torch.cat([keys, past.double()], dim=1)
    (width, count), total = keys.shape, every.shape[1]
    if form == "auto":
        form = "primal" if weight > 0 and total >= width / 3 else "dual"
    if form == "primal":
        factor = safe_cholesky(weight * covariance.matrix + every @ every.T)
        weighted = torch.cholesky_solve(keys, factor)
    else:
        white = covariance.whiten(every)
        gram = white.T @ white
        if weight == 0:
            _refuse_dependent(gram, width)
        unit = torch.eye(total, dtype=gram.dtype, device=gram.device)
        factor = safe_cholesky(gram + weight * unit)
        weighted = covariance.inverse_times(every) @ torch.cholesky_solve(unit[:, :count], factor)
    exact = residual.dtype if residual.dtype == torch.float64 else torch.float32
    return Factors(residual.to(exact), weighted.T.to(exact).contiguous())


def safe_cholesky(matrix: Tensor) -> Tensor:
    """Lower factor of a symmetric positive (semi-)definite matrix; a ridge of 1e-10 … 1e-4 of the mean diagonal if
    needed.

    Raises:
        UsageError: not even the largest ridge helps: the statistics are unusable.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    ridge = 1e-10
    while failed and ridge <= 1e-4:
        padded = matrix + ridge * matrix.diagonal().mean() * torch.eye(
            len(matrix), dtype=matrix.dtype, device=matrix.device
        )
        factor, failed = torch.linalg.cholesky_ex(padded)
        ridge *= 10
    if failed:
        raise UsageError("the second moment is not positive definite: take more text (stats.tokens or stats.documents)")
    return factor


def _refuse_dependent(gram: Tensor, width: int) -> None:
    remedy = "edit fewer at once (protocol.batch_size) or give a soft constraint (method.epsilon > 0, or method=memit)"
    if len(gram) > width:
        raise UsageError(
            f"{len(gram):,} facts cannot all be met exactly where keys have {width:,} dimensions; {remedy}"
        )
    scale = gram.diagonal().rsqrt()
    smallest = torch.linalg.eigvalsh(gram * scale[:, None] * scale[None, :])[0]
    if smallest < 1e-10:
        raise UsageError(
            "these facts have linearly dependent keys (several about one subject?), so they cannot all be met exactly; "
            + remedy
        )


def similar_keys(keys: Tensor, threshold: float = 0.999) -> list[tuple[int, int]]:
    """Pairs of edits whose keys point the same way (cosine above `threshold`): one of each pair cannot be written."""
    unit = torch.nn.functional.normalize(keys.double(), dim=0)
    pairs: list[tuple[int, int]] = []
    for first in range(0, unit.shape[1], 1024):  # 10,000 facts have 10⁸ cosines
        alike = torch.triu(unit[:, first : first + 1024].T @ unit, diagonal=first + 1) > threshold
        pairs += [(first + i, j) for i, j in torch.nonzero(alike).tolist()]
    return pairs
