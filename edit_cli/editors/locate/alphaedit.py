"""AlphaEdit (Fang et al., 2025): updates that live in the null space of old keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edit_cli.editors.locate.base import once
from edit_cli.editors.locate.solver import ScaledIdentity, solve
from edit_cli.editors.locate.spreading import SpreadingEditor
from edit_cli.edits.edit import Factors
from edit_cli.errors import UsageError
from edit_cli.lm.model import LM


@dataclass(kw_only=True)
class AlphaEdit(SpreadingEditor):
    """MEMIT's layers and targets; each update is projected to directions in which ordinary text has next to no keys.

    With C = U diag(s) Uᵀ and U⊥ the eigenvectors of s below a threshold, P = U⊥ U⊥ᵀ and the released update is
    Δ = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + L2 · I)⁻¹. In the coordinates B = U⊥ᵀ K this is symmetric and smaller:

        Δ = R Bᵀ (L2 · I + B_p B_pᵀ + B Bᵀ)⁻¹ U⊥ᵀ

    l2: weight of ‖Δ‖². threshold: on eigenvalues of the mean second moment, so it depends on the scale of activations;
    relative: it counts in units of their mean instead. Keys of earlier edits are kept (past_keys: post, as published).
    """

    past_keys: str = "post"
    l2: float = 10.0
    threshold: float = 2.0e-2
    relative: bool = False

    def weight(self, columns: int) -> float:
        """The ridge in the null space: C is I there."""
        return self.l2 + self.norm_weight

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_covariance:
            raise UsageError("method.use_covariance=false leaves alphaedit nothing to project with: take method=memit")

    def require(self, model: str) -> None:
        self.moments.require(model, self.layers)

    def prepare(self, lm: LM, layers: Sequence[int], columns: int) -> dict[str, Any]:
        """Find all null spaces; the edit remembers their [rank, key width]."""
        if self.weight(columns) <= 0:
            raise UsageError(f"method.l2={self.l2}: give a positive weight")
        self.moments.collect(lm, layers)
        return {"nullspace": {str(layer): list(self.nullspace(lm, layer).shape[::-1]) for layer in layers}}

    def nullspace(self, lm: LM, layer: int) -> Tensor:
        """U⊥ (m, r), float64, computed once a model.

        Raises:
            UsageError: r = 0 or r = m: nothing could be written, or nothing would be protected.
        """
        key = ("nullspace", layer, self.threshold, self.relative)
        return once(self.scratch(lm), key, lambda: self._nullspace(lm, layer))

    def _nullspace(self, lm: LM, layer: int) -> Tensor:
        with lm.monitor.phase("statistics"):
            values, vectors = torch.linalg.eigh(self.moments.second_moment(lm, layer).matrix.to(lm.device))
            limit = self.threshold * (float(values.mean()) if self.relative else 1.0)
            found, width = vectors[:, values < limit], len(values)
        if found.shape[1] in (0, width):
            what = (
                "no direction is free"
                if not found.shape[1]
                else "every direction is free, so nothing would be protected"
            )
            raise UsageError(
                f"method.threshold={self.threshold}: in layer {layer} {what}: eigenvalues of its second moment go from"
                f" {float(values[0]):.2g} to {float(values[-1]):.2g} (median {float(values.median()):.2g}); choose a"
                " threshold between, or method.relative=true with one near 1"
            )
        lm.monitor.note(f"layer {layer}: {found.shape[1]:,} of {width:,} key directions are free to be written to")
        return found

    def coordinates(self, lm: LM, layer: int, keys: Tensor) -> Tensor:
        """B = U⊥ᵀ K; (r, n)."""
        return self.nullspace(lm, layer).T @ keys

    def solve(self, lm: LM, layer: int, residual: Tensor, keys: Tensor, past: Tensor | None) -> Factors:
        """The update in the null space's coordinates, and back."""
        free = self.nullspace(lm, layer)
        update = solve(
            residual, free.T @ keys, ScaledIdentity(free.shape[1], free.device), self.weight(keys.shape[1]), past=past
        )
        return Factors(update.left, update.right @ free.T)
