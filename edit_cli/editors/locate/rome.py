"""Rank-One Model Editing (Meng et al., 2022), and the key fix of R-ROME (Gupta et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from edit_cli.editors.locate.base import LocateConfig, LocateEditor, averaged_keys, written
from edit_cli.editors.locate.context_prefixes import BARE, ContextConfig, rows_in_contexts
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
    """The optimization of the target value."""
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
        found: list[Values] = []
        steps: list[WeightDelta] = []
        with ExitStack() as attached:
            for request in requests:
                for layer in self.layers:
                    ((values, step),) = self._rank_ones([request], layer)
                    found.append(values)
                    steps.append(step)
                    attached.enter_context(self.lm.edited(step))
        return self._as_one(found, steps)

    def edit_each(self, batches: Sequence[Sequence[EditRequest]]) -> list[WeightDelta] | None:
        """Of one fact each, at one layer: their values are optimized together."""
        if len(self.layers) > 1 or any(len(requests) > 1 for requests in batches):
            return None
        made = self._rank_ones([request for requests in batches for request in requests], self.layers[0])
        return [self._as_one([values], [step]) for values, step in made]

    def _rank_ones(self, requests: Sequence[EditRequest], layer: int) -> list[tuple[Values, WeightDelta]]:
        """Of each fact by itself, on the model as it is: the value that was found, and the update that writes it."""
        lm, contexts = self.lm, self.contexts
        covariance = self.covariances(self.layers, self.config.norm_weight)[layer]
        values = optimise_values(lm, requests, layer, "mlp_out", self.config.value, contexts)
        with lm.monitor.phase("keys"):
            bare_keys, bare_values = _bare(lm, requests, layer)
            averaged = averaged_keys(lm, requests, layer, contexts)
        direction_keys = bare_keys if self.config.variant == "p" else averaged
        constrained = averaged if self.config.variant == "r" else bare_keys
        with lm.monitor.phase("solve"):
            directions = covariance.inverse_times(direction_keys)
            gains = (constrained * directions).sum(dim=0)
            # W k by linearity: what leaves the projection at the bare prompt, moved by W (k − k_bare)
            moved = lm.weight(lm.layout.mlp_out(layer)).to(bare_keys) @ (constrained - bare_keys)
            left = (values.target.double() - bare_values - moved) / gains
        cosines = gains / (directions.norm(dim=0) * constrained.norm(dim=0))  # near 0: a disabling edit
        found = []
        for number, cosine in enumerate(cosines.tolist()):
            step = written(lm, layer, Factors(left[:, number : number + 1], directions[:, number : number + 1].T))
            step.info["gain"] = cosine
            found.append((values.of(number), step))
        return found

    def _as_one(self, found: Sequence[Values], steps: Sequence[WeightDelta]) -> WeightDelta:
        """One edit of updates that were written one after another."""
        updates: dict[str, list[Factors]] = {}
        for step in steps:
            for name, factors in step.updates.items():
                assert isinstance(factors, Factors)
                updates.setdefault(name, []).append(factors)
        info = {
            "prefixes": self.contexts.groups[1:],
            "losses": [values.losses[0] for values in found],
            "steps": [values.steps[0] for values in found],
            "gains": [step.info["gain"] for step in steps],
            "diagnosis": self.diagnosis(*found),
        }
        return self.finished(WeightDelta({name: _joined(parts) for name, parts in updates.items()}, info))


def _bare(lm: LM, requests: Sequence[EditRequest], layer: int) -> tuple[Tensor, Tensor]:
    """Keys (m, n) and projection outputs (d, n) at the subjects' last tokens of the bare prompts, float64."""
    module = lm.layout.mlp_out(layer)
    rows, positions = rows_in_contexts(lm, requests, BARE, with_target=False)
    keys, values = read(lm, rows, positions, [HookPoint(module, "input"), HookPoint(module, "output")])
    return keys.double().T, values.double().T


def _joined(parts: list[Factors]) -> Factors:
    return Factors(torch.cat([p.left for p in parts], dim=1), torch.cat([p.right for p in parts], dim=0))
