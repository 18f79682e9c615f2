"""Equality-constrained Mass Model Editing (Gupta et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edit_cli.edits import WeightDelta
from edit_cli.editors.keyvalue import KeyValueEditor, spread
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest


@dataclass(kw_only=True)
class EMMET(KeyValueEditor):
    """ROME's equality constraint for a whole batch: Δ K = R exactly, at the least change of old values.

    layers: one as published, or several. covariance_weight, epsilon: the released code scales C by the first and adds the
    second to Kᵀ C⁻¹ K; together they are MEMIT's λ = covariance_weight · epsilon. epsilon = 0 is the equality proper; a
    single request is always solved exactly (as ROME).
    """

    mass_editor = True

    layers: list[int]
    covariance_weight: float = 1.0
    epsilon: float = 0.1

    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> WeightDelta:
        """Δ = R (Kᵀ C⁻¹ K + λI)⁻¹ Kᵀ C⁻¹ (eq. 12)."""
        weight = self.covariance_weight * self.epsilon if len(requests) > 1 else 0.0
        return spread(lm, requests, self.layers, self, weight)
