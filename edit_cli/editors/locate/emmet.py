"""Equality-constrained Mass Model Editing (Gupta et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from edit_cli.config.schema import NonNegative
from edit_cli.editors.locate.memit import MEMIT, MassConfig


@dataclass(frozen=True, kw_only=True)
class EMMETConfig(MassConfig):
    """The released code scales C by the first weight and adds the second to Kᵀ C⁻¹ K; together they are MEMIT's
    λ = covariance_weight · epsilon. One layer as published, or several.
    """

    covariance_weight: NonNegative = 1.0
    """Scale of C."""
    epsilon: NonNegative = 0.1
    """What is added to Kᵀ C⁻¹ K; 0: the equality proper."""

    @property
    def weight(self) -> float:
        return self.covariance_weight * self.epsilon


class EMMET(MEMIT[EMMETConfig]):
    """ROME's equality constraint for a whole batch: Δ K = R exactly, at the least change of old values.

    Δ = R (Kᵀ C⁻¹ K + λI)⁻¹ Kᵀ C⁻¹ (eq. 12), at one layer as published, or spread over several. A single fact is always
    solved exactly (as ROME).
    """

    Config = EMMETConfig
    softer = "lower method.epsilon"

    def weight(self, columns: int) -> float:
        """λ, and 0 for a single fact."""
        return self.config.weight if columns > 1 else 0.0
