"""AlphaEdit (Fang et al., 2025): updates that live in the null space of old keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from edit_cli.config.schema import NonNegative
from edit_cli.editors.base import Context
from edit_cli.editors.locate.memit import MEMIT, MassConfig, relative_alone
from edit_cli.editors.locate.solver import Relative, ScaledIdentity, Weight, WeightSetting, solve, weight_of
from edit_cli.edits.edit import Factors
from edit_cli.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class AlphaEditConfig(MassConfig):
    """Keys of earlier edits are kept as the model has them then (past_keys: post), as published."""

    past_keys: Literal["none", "write", "post"] = "post"
    """Which keys of earlier edits in a sequence keep their values (see method=memit)."""
    l2: WeightSetting = "auto"
    """Weight of ‖Δ‖²: a number (10 as released), relative:X or auto, as covariance_weight of memit."""
    threshold: NonNegative = 1.0
    """Eigenvalues of the mean second moment below it are free directions. Published thresholds (2e-2 as released, 1e-2
    in the paper) go with relative=false, since they depend on the scale of activations."""
    relative: bool = True
    """Whether the threshold counts in units of the mean eigenvalue."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_covariance:
            raise UsageError("method.use_covariance=false leaves alphaedit nothing to project with: take method=memit")
        relative_alone(self, "l2")
        if self.l2 == 0 and self.norm_weight == 0:
            raise UsageError(f"method.l2={self.l2}: give a positive weight")

    @property
    def weight(self) -> Weight:
        """The ridge in the null space: C is I there."""
        weight = weight_of(self.l2, self.place, "l2")
        return weight if isinstance(weight, Relative) else weight + self.norm_weight


class AlphaEdit(MEMIT[AlphaEditConfig]):
    """MEMIT's layers and targets; each update is projected to directions in which ordinary text has next to no keys.

    With C = U diag(s) Uᵀ and U⊥ the eigenvectors of s below a threshold, P = U⊥ U⊥ᵀ and the released update is
    Δ = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + L2 · I)⁻¹. In the coordinates B = U⊥ᵀ K this is symmetric and smaller:

        Δ = R Bᵀ (L2 · I + B_p B_pᵀ + B Bᵀ)⁻¹ U⊥ᵀ
    """

    Config = AlphaEditConfig
    softer = "raise method.threshold or lower method.l2"

    @classmethod
    def require(cls, config: AlphaEditConfig, model: str, context: Context) -> None:
        config.moments.require(model, config.layers)

    def prepare(self, layers: Sequence[int], columns: int) -> dict[str, Any]:
        """Find all null spaces; the edit remembers their [rank, key width]."""
        self.config.moments.collect(self.lm, layers)
        return {"nullspace": {str(layer): list(self.nullspace(layer).shape[::-1]) for layer in layers}}

    def nullspace(self, layer: int) -> Tensor:
        """U⊥ (m, r), float64, computed once a model.

        Raises:
            UsageError: r = 0 or r = m: nothing could be written, or nothing would be protected.
        """
        key = ("nullspace", layer, self.config.threshold, self.config.relative)
        return self.context.once(key, lambda: self._nullspace(layer))

    def _nullspace(self, layer: int) -> Tensor:
        with self.lm.monitor.phase("statistics"):
            values, vectors = torch.linalg.eigh(
                self.config.moments.second_moment(self.lm, layer).matrix.to(self.lm.device)
            )
            limit = self.config.threshold * (float(values.mean()) if self.config.relative else 1.0)
            found, width = vectors[:, values < limit], len(values)
        if found.shape[1] in (0, width):
            what = (
                "no direction is free"
                if not found.shape[1]
                else "every direction is free, so nothing would be protected"
            )
            low, middle, high = (float(value) for value in (values[0], values.median(), values[-1]))
            raise UsageError(
                f"method.threshold={self.config.threshold}: in layer {layer} {what}: eigenvalues of its second moment"
                f" go from {low:.2g} to {high:.2g} (median {middle:.2g}); choose a threshold between, or"
                " method.relative=true with one near 1"
            )
        self.lm.monitor.note(f"layer {layer}: {found.shape[1]:,} of {width:,} key directions are free to be written to")
        return found

    def coordinates(self, layer: int, keys: Tensor) -> Tensor:
        """B = U⊥ᵀ K; (r, n)."""
        return self.nullspace(layer).T @ keys

    def solve(self, layer: int, residual: Tensor, keys: Tensor, past: Tensor | None) -> Factors:
        """The update in the null space's coordinates, and back."""
        free = self.nullspace(layer)
        update = solve(
            residual, free.T @ keys, ScaledIdentity(free.shape[1], free.device), self.weight(keys.shape[1]), past=past
        )
        return Factors(update.left, update.right @ free.T)
