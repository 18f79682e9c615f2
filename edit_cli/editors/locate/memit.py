"""Mass-Editing Memory in a Transformer (Meng et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from edit_cli.editors.locate.spreading import SoftSpreadingEditor


@dataclass(kw_only=True)
class MEMIT(SoftSpreadingEditor):
    """Many facts at once, spread over a range of MLP layers (Algorithm 1).

    Δ = R Kᵀ (λC + K Kᵀ)⁻¹ at each layer, lowest first, with R an equal share of what is still missing (eq. 14, 20).
    """
