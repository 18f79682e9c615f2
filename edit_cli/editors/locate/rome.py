"""Rank-One Model Editing (Meng et al., 2022), and the key fix of R-ROME (Gupta et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edit_cli.editors.base import require_layers
from edit_cli.editors.locate.base import KeyValueEditor, averaged_keys, written
from edit_cli.editors.locate.context_prefixes import BARE, Contexts, rows_in_contexts
from edit_cli.editors.locate.solver import Covariance
from edit_cli.editors.locate.value_optimization import optimise_values
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.errors import UsageError
from edit_cli.lm.model import LM
from edit_cli.lm.reading import Tap, read
from edit_cli.requests import EditRequest

VARIANTS = ("original", "r", "p")


@dataclass(kw_only=True)
class ROME(KeyValueEditor):
    """One fact, one rank-one update: Δ = (v* − W k)(C⁻¹k)ᵀ / (kᵀ C⁻¹ k).

    Several requests are written one after another.

    layers: each gets its own update, in ascending order; published settings name one.
    variant: which key stands where. "original": the averaged key in the direction, the bare prompt's in the
    denominator, as released; "r" (R-ROME): the averaged key everywhere; "p": the bare prompt's everywhere. The
    asymmetry of the original makes rare edits that destroy a model.
    """

    layers: list[int]
    variant: str = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise UsageError(f"method.variant={self.variant}: choose one of {', '.join(VARIANTS)}")

    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> WeightDelta:
        """Rank-one updates, joined a layer. `info` has an entry of each fact and layer, in the order of writing."""
        layers = require_layers(self.layers, lm)
        contexts, covariances = self.contexts(lm), self.covariances(lm, layers, self.norm_weight)
        found: dict[str, list[Factors]] = {}
        info: dict[str, list[Any]] = {"prefixes": contexts.groups[1:], "losses": [], "steps": [], "gains": []}
        with ExitStack() as attached:
            for request in requests:
                for layer in layers:
                    update, told = self._rank_one(lm, request, layer, contexts, covariances[layer])
                    for key, value in told.items():
                        info[key].append(value)
                    step = written(lm, layer, update)
                    for name, factors in step.updates.items():
                        found.setdefault(name, []).append(factors)
                    attached.enter_context(lm.edited(step))
        return self.finished(lm, WeightDelta({name: _joined(parts) for name, parts in found.items()}, info))

    def _rank_one(
        self, lm: LM, request: EditRequest, layer: int, contexts: Contexts, covariance: Covariance
    ) -> tuple[Factors, dict[str, Any]]:
        values = optimise_values(lm, [request], layer, "mlp_out", self.value, contexts)
        with lm.monitor.phase("keys"):
            bare_key, bare_value = _bare(lm, request, layer)
            averaged = averaged_keys(lm, [request], layer, contexts)
        direction_key = bare_key if self.variant == "p" else averaged
        constrained = averaged if self.variant == "r" else bare_key
        with lm.monitor.phase("solve"):
            direction = covariance.inverse_times(direction_key)
            gain = (constrained.T @ direction).item()
            # W k by linearity: what leaves the projection at the bare prompt, moved by W (k − k_bare)
            present = bare_value + lm.weight(lm.layout.mlp_out(layer)).to(bare_key) @ (constrained - bare_key)
            update = Factors((values.target.double() - present) / gain, direction.T)
        cosine = gain / float(direction.norm() * constrained.norm())  # near 0: a disabling edit
        return update, {"losses": values.losses[0], "steps": values.steps[0], "gains": cosine}


def _bare(lm: LM, request: EditRequest, layer: int) -> tuple[Tensor, Tensor]:
    """Key (m, 1) and projection output (d, 1) at the subject's last token of the bare prompt, float64."""
    module = lm.layout.mlp_out(layer)
    rows, positions = rows_in_contexts(lm, [request], BARE, with_target=False)
    key, value = read(lm, rows, positions, [Tap(module, "input"), Tap(module, "output")])
    return key.double().T, value.double().T


def _joined(parts: list[Factors]) -> Factors:
    return Factors(torch.cat([p.left for p in parts], dim=1), torch.cat([p.right for p in parts], dim=0))
