"""Rank-One Model Editing (Meng et al., 2022), and the key fix of R-ROME (Gupta et al., 2024)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from edit_cli.editors.base import SOLVED, Remade
from edit_cli.editors.locate.base import LocateConfig, LocateEditor, averaged_keys, written
from edit_cli.editors.locate.context_prefixes import BARE, ContextConfig, rows_in_contexts
from edit_cli.editors.locate.value_batch import ValueConfig
from edit_cli.editors.locate.value_optimization import Values, optimize_values
from edit_cli.edits.edit import Edit, Factors, WeightDelta
from edit_cli.edits.store import AGAIN, BY_FACT
from edit_cli.files.tensors import fitted, size
from edit_cli.lm.model import LM
from edit_cli.lm.reading import HookPoint, read
from edit_cli.requests import EditRequest

PER_FACT = ("losses", "steps", "gains")  # of `info`


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
        values = optimize_values(lm, requests, layer, "mlp_out", self.config.value, contexts)
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
            step.info["gain"], step.by_fact["keys"] = cosine, constrained[:, number : number + 1].cpu()
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
        delta = self.finished(WeightDelta({name: _joined(parts) for name, parts in updates.items()}, info))
        if self._additive(delta) and len(steps) > 1:
            delta.by_fact = {"keys": torch.cat([step.by_fact["keys"] for step in steps], dim=1)}
        return delta

    def without(
        self, requests: Sequence[EditRequest], revoked: Collection[int], edit: Edit, by_fact: Mapping[str, Tensor]
    ) -> Remade | None:
        """At one layer, keys do not hang on what is written there: of each value v*, what W and the updates before it
        do not give is written again. v* − W k changes by what the earlier updates give its key now and did then.
        """
        if "keys" not in by_fact or not isinstance(edit, WeightDelta) or not self._additive(edit):
            return None
        ((name, update),) = edit.updates.items()
        assert isinstance(update, Factors)
        fitted(by_fact, {"keys": size(self.lm.key_width(self.layers[0]), update.rank)}, BY_FACT, AGAIN)
        keys, kept = (
            by_fact["keys"].to(update.right.device).double(),
            [i for i in range(len(requests)) if i not in revoked],
        )
        left, right = update.left.double(), update.right.double()
        new = left.clone()
        for number in kept:
            given = right @ keys[:, number]  # how much of each update the key meets; of its own: the gain
            earlier = [i for i in kept if i < number]
            lost = left[:, :number] @ given[:number] - new[:, earlier] @ given[earlier]
            new[:, number] = left[:, number] + lost / given[number]
        factors = Factors(new[:, kept].to(update.left), update.right[kept])
        info = {**edit.info, **{key: [edit.info[key][i] for i in kept] for key in PER_FACT if key in edit.info}}
        info.pop("diagnosis", None)
        some = {"keys": by_fact["keys"][:, kept]} if len(kept) > 1 else {}
        return Remade(WeightDelta({name: factors}, info, by_fact=some).compact(self.lm), SOLVED)

    def _additive(self, edit: WeightDelta) -> bool:
        """Whether the edit is its facts' rank-one updates at one layer, as they were written."""
        whole = self.config.rect is None and self.config.prune is None
        return whole and len(self.layers) == 1 and all(isinstance(part, Factors) for part in edit.updates.values())


def _bare(lm: LM, requests: Sequence[EditRequest], layer: int) -> tuple[Tensor, Tensor]:
    """Keys (m, n) and projection outputs (d, n) at the subjects' last tokens of the bare prompts, float64."""
    module = lm.layout.mlp_out(layer)
    rows, positions = rows_in_contexts(lm, requests, BARE, with_target=False)
    keys, values = read(lm, rows, positions, [HookPoint(module, "input"), HookPoint(module, "output")])
    return keys.double().T, values.double().T


def _joined(parts: list[Factors]) -> Factors:
    return Factors(torch.cat([p.left for p in parts], dim=1), torch.cat([p.right for p in parts], dim=0))
