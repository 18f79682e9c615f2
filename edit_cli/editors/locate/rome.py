"""Rank-One Model Editing (Meng et al., 2022), and the key fix of R-ROME (Gupta et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from edit_cli.editors.locate.base import LocateConfig, LocateEditor, averaged_keys, written
from edit_cli.editors.locate.context_prefixes import BARE, ContextConfig, Contexts, rows_in_contexts
from edit_cli.editors.locate.solver import Covariance
from edit_cli.editors.locate.value_batch import ValueConfig
from edit_cli.editors.locate.value_optimization import Values, optimise_values
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.lm.model import LM
from edit_cli.lm.reading import HookPoint, read
from edit_cli.requests import EditRequest


@dataclass(frozen=True, kw_only=True)
class ROMEConfig(LocateConfig):
    """Each of the layers gets its own update, in ascending order; published settings name one."""

    variant: Literal["original", "r", "p"] = "original"
    """Which key stands where: the averaged key in the direction and the bare prompt's in the denominator, as released
    (original); the averaged key everywhere (r, R-ROME); the bare prompt's everywhere (p). The asymmetry of the original
    makes rare edits that destroy a model."""
    value: ValueConfig = field(default_factory=lambda: ValueConfig(clamp_norm_factor=4.0))
    """The optimisation of the target value."""
    context: ContextConfig = field(
        default_factory=lambda: ContextConfig(starts=[""], lengths=[5, 10], per_start=10, weighting="rows")
    )
    """Texts put before the prompt, so that an edit does not hang on one wording."""


class ROME(LocateEditor[ROMEConfig]):
    """One fact, one rank-one update: Δ = (v* − W k)(C⁻¹k)ᵀ / (kᵀ C⁻¹ k).

    Several requests are written one after another.
    """

    Config = ROMEConfig

    def edit(self, requests: Sequence[EditRequest]) -> WeightDelta:
        """Rank-one updates, joined a layer. `info` has an entry of each fact and layer, in the order of writing."""
        layers, contexts = self.layers, self.contexts
        covariances = self.covariances(layers, self.config.norm_weight)
        found: dict[str, list[Factors]] = {}
        sought: list[Values] = []
        info: dict[str, list[Any]] = {"prefixes": contexts.groups[1:], "losses": [], "steps": [], "gains": []}
        with ExitStack() as attached:
            for request in requests:
                for layer in layers:
                    values = optimise_values(self.lm, [request], layer, "mlp_out", self.config.value, contexts)
                    sought.append(values)
                    update, told = self._rank_one(request, layer, contexts, covariances[layer], values)
                    for key, value in told.items():
                        info[key].append(value)
                    step = written(self.lm, layer, update)
                    for name, factors in step.updates.items():
                        found.setdefault(name, []).append(factors)
                    attached.enter_context(self.lm.edited(step))
        said = info | {"diagnosis": self.diagnosis(*sought)}
        return self.finished(WeightDelta({name: _joined(parts) for name, parts in found.items()}, said))

    def _rank_one(
        self, request: EditRequest, layer: int, contexts: Contexts, covariance: Covariance, values: Values
    ) -> tuple[Factors, dict[str, Any]]:
        with self.lm.monitor.phase("keys"):
            bare_key, bare_value = _bare(self.lm, request, layer)
            averaged = averaged_keys(self.lm, [request], layer, contexts)
        direction_key = bare_key if self.config.variant == "p" else averaged
        constrained = averaged if self.config.variant == "r" else bare_key
        with self.lm.monitor.phase("solve"):
            direction = covariance.inverse_times(direction_key)
            gain = (constrained.T @ direction).item()
            # W k by linearity: what leaves the projection at the bare prompt, moved by W (k − k_bare)
            present = bare_value + self.lm.weight(self.lm.layout.mlp_out(layer)).to(bare_key) @ (constrained - bare_key)
            update = Factors((values.target.double() - present) / gain, direction.T)
        cosine = gain / float(direction.norm() * constrained.norm())  # near 0: a disabling edit
        return update, {"losses": values.losses[0], "steps": values.steps[0], "gains": cosine}


def _bare(lm: LM, request: EditRequest, layer: int) -> tuple[Tensor, Tensor]:
    """Key (m, 1) and projection output (d, 1) at the subject's last token of the bare prompt, float64."""
    module = lm.layout.mlp_out(layer)
    rows, positions = rows_in_contexts(lm, [request], BARE, with_target=False)
    key, value = read(lm, rows, positions, [HookPoint(module, "input"), HookPoint(module, "output")])
    return key.double().T, value.double().T


def _joined(parts: list[Factors]) -> Factors:
    return Factors(torch.cat([p.left for p in parts], dim=1), torch.cat([p.right for p in parts], dim=0))
