"""Equality-constrained Mass Model Editing (Gupta et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from edit_cli.editors.locate.spreading import SpreadingEditor


@dataclass(kw_only=True)
class EMMET(SpreadingEditor):
    """ROME's equality constraint for a whole batch: Δ K = R exactly, at the least change of old values.

    Δ = R (Kᵀ C⁻¹ K + λI)⁻¹ Kᵀ C⁻¹ (eq. 12), at one layer as published, or spread over several.

    covariance_weight, epsilon: the released code scales C by the first and adds the second to Kᵀ C⁻¹ K; together they
    are MEMIT's λ = covariance_weight · epsilon. epsilon = 0 is the equality proper; a single fact is always solved
    exactly (as ROME).
    """

    covariance_weight: float = 1.0
    epsilon: float = 0.1

    def weight(self, columns: int) -> float:
        """λ, and 0 for a single fact."""
        return self.covariance_weight * self.epsilon if columns > 1 else 0.0
