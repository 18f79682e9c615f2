"""Mass-Editing Memory in a Transformer (Meng et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from edit_cli.editors.spreading import SpreadingEditor


@dataclass(kw_only=True)
class MEMIT(SpreadingEditor):
    """Many facts at once, spread over a range of MLP layers (Algorithm 1).

    Δ = R Kᵀ (λC + K Kᵀ)⁻¹ at each layer, lowest first, with R an equal share of what is still missing (eq. 14, 20).

    covariance_weight: λ of eq. 15, how strongly old keys are kept against the new ones. It scales with the model.
    """

    covariance_weight: float

    def weight(self, columns: int) -> float:
        """λ, whatever the number of facts."""
        return self.covariance_weight
