"""Mass-Editing Memory in a Transformer (Meng et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edit_cli.edits import WeightDelta
from edit_cli.editors.keyvalue import KeyValueEditor, spread
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest


@dataclass(kw_only=True)
class MEMIT(KeyValueEditor):
    """Many facts at once, spread over a range of MLP layers (Algorithm 1).

    layers: critical layers; the last one is where target states are optimised.
    covariance_weight: λ of eq. 15, how strongly old keys are kept against the new ones. It scales with the model.
    """

    mass_editor = True

    layers: list[int]
    covariance_weight: float

    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> WeightDelta:
        """One low-rank update a layer: Δ = R Kᵀ (λC + K Kᵀ)⁻¹ with R an equal share of the remaining residual (eq. 14, 20)."""
        return spread(lm, requests, self.layers, self, self.covariance_weight)
