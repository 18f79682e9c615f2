"""Mass-Editing Memory in a Transformer (Meng et al., 2023).

Algorithm 1 is here: optimize target states, then write a share of what is missing at each layer. Other members of the
family (EMMET, PMET, AlphaEdit, BLUE, MEMIT-Merge) change one step each: where targets live, how many layers write, how
a residual is shared, what is solved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from edit_cli.editors.base import SOLVED, VALUES_KEPT, Context, Remade
from edit_cli.editors.locate.base import LocateConfig, LocateEditor, Subjects, written
from edit_cli.editors.locate.solver import Relative, Weight, WeightSetting, similar_keys, solve, weight_of
from edit_cli.editors.locate.value_optimization import Site, Values, optimize_values, shifted_modules
from edit_cli.edits.edit import Edit, Factors, WeightDelta
from edit_cli.edits.store import AGAIN, BY_FACT
from edit_cli.errors import UsageError
from edit_cli.files.tensors import fitted, size
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest
from edit_cli.wording import many

Groups = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class MassConfig(LocateConfig, ABC):
    """Settings of Algorithm 1. The last of the layers is where target states are optimized."""

    past_keys: Literal["none", "write", "post"] = "none"
    """Which keys of earlier edits in a sequence keep their values: as they were when written (write, ENCORE), or as the
    model has them once all layers are written (post, AlphaEdit)."""

    @property
    @abstractmethod
    def weight(self) -> Weight:
        """λ of eq. 15, or what stands in its place."""


@dataclass(frozen=True, kw_only=True)
class MEMITConfig(MassConfig):
    """Settings of MEMIT's soft constraint."""

    covariance_weight: WeightSetting = "auto"
    """λ of eq. 15: how strongly old keys are kept against the new ones: a number, as published; relative:X, in units of
    the new keys, where a single fact is written to 1 / (1 + X); auto, a relative one (see docs/methods/memit.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        relative_alone(self, "covariance_weight")

    @property
    def weight(self) -> Weight:
        return weight_of(self.covariance_weight, self.place, "covariance_weight")


def relative_alone(config: MassConfig, name: str) -> None:
    """Refuse a weight that is none, and one that is relative beside a norm's, which is a number on the same scale.

    Raises:
        UsageError: names the setting.
    """
    setting = getattr(config, name)
    if isinstance(weight_of(setting, config.place, name), Relative) and config.norm_weight:
        raise UsageError(
            f"method.norm_weight={config.norm_weight:g} counts beside a weight of old keys that is a number, and"
            f" method.{name} is {setting}: give both"
        )


M = TypeVar("M", bound=MassConfig)


class MEMIT(LocateEditor[M]):
    """Many facts at once, spread over a range of MLP layers (Algorithm 1).

    Δ = R Kᵀ (λC + K Kᵀ)⁻¹ at each layer, lowest first, with R an equal share of what is still missing (eq. 14, 20).
    """

    Config: ClassVar[type[MassConfig]] = MEMITConfig
    mass_editor = True
    softer = "lower method.covariance_weight"
    site: ClassVar[Site] = "block"  # where target states live, unless each layer has its own (see `aims`)

    def __init__(self, config: M, lm: LM, context: Context | None = None) -> None:
        super().__init__(config, lm, context)
        self.past: dict[int, Tensor] = {}  # by layer: coordinates (m, n) of the keys of earlier edits

    # --- the steps in which methods differ --------------------------------------------------------------------------

    def weight(self, columns: int) -> Weight:
        """λ, given how many keys, past ones included, are solved for."""
        return self.config.weight

    def prepare(self, layers: Sequence[int], columns: int) -> dict[str, Any]:
        """Compute once a model what `solve` needs; what the edit should remember of it."""
        self.covariances(layers, self.ridge(columns))
        return {}

    def rounds(self, layers: list[int]) -> list[list[int]]:
        """Layers that write towards one set of targets, which live at the last of them; one list a round."""
        return [layers]

    def groups(self, requests: Sequence[EditRequest]) -> Groups:
        """Indices of requests that share one key and one target."""
        return [[i] for i in range(len(requests))]

    def share(self, residual: Tensor, left: int) -> Tensor:
        """What of the residual one layer writes while `left` layers, itself included, are to write."""
        return residual / left

    def coordinates(self, layer: int, keys: Tensor) -> Tensor:
        """Keys (m, n) as `solve` wants past ones."""
        return keys

    def solve(self, layer: int, residual: Tensor, keys: Tensor, past: Tensor | None) -> Factors:
        """The update of one layer: Δ = R Kᵀ (λC + λ_n I + K_p K_pᵀ + K Kᵀ)⁻¹."""
        columns = keys.shape[1] + (0 if past is None else past.shape[1])
        (covariance,) = self.covariances([layer], self.ridge(columns)).values()
        return solve(residual, keys, covariance, self.weight(columns), past=past)

    def ridge(self, columns: int) -> float:
        """λ_n in units of λ, which is how it is added to C; where λ = 0, C itself is the unit."""
        weight = self.weight(columns)
        return 0.0 if isinstance(weight, Relative) else self.config.norm_weight / (weight or 1.0)

    def aims(self, layers: list[int]) -> list[tuple[int, Site]]:
        """(layer, site) of the target states that each of a round's layers writes towards: all those of the last one.

        Where an MLP's output is normalized or scaled before it is added, a residual of block outputs cannot be written
        to a projection. There each layer has targets of its own, at its projection's output.

        Raises:
            UsageError: a layer lacks what the site is about.
        """
        found: list[tuple[int, Site]] = [(layers[-1], self.site)] * len(layers)
        if not self.additive(layers):
            found = [(layer, "mlp_out" if self.site == "block" else self.site) for layer in layers]
        for aim in found:
            shifted_modules(self.lm, *aim)
        return found

    # --- the algorithm ----------------------------------------------------------------------------------------------

    def edit(self, requests: Sequence[EditRequest]) -> WeightDelta:
        """One low-rank update a layer."""
        return self._written(requests, {})

    def _written(self, requests: Sequence[EditRequest], known: Mapping[int, Values]) -> WeightDelta:
        """known: values of groups that need not be looked for, as they are on the model before anything is written."""
        lm, layers = self.lm, self.layers
        rounds = [(chosen, self.aims(chosen)) for chosen in self.rounds(layers)]
        groups, contexts = self.groups(requests), self.contexts
        info: dict[str, Any] = {
            "prefixes": contexts.groups[1:],
            "groups": len(groups),
            "losses": [],
            "steps": [],
            "residual_norms": {},
        }
        info |= self.prepare(layers, len(groups) + max((past.shape[1] for past in self.past.values()), default=0))
        delta, subjects, keys_of = WeightDelta(info=info), Subjects(lm, requests, contexts, groups), {}
        by_fact: dict[str, Tensor] = {}
        found: list[Values] = []  # in all rounds
        shares: list[float] = []
        with ExitStack() as attached:
            for chosen, aims in rounds:
                present = None
                for (left, layer), aim in zip(countdown(chosen), aims, strict=True):
                    if aim != present:
                        present, values = aim, self._targets(requests, aim, groups, {} if by_fact else known)
                        by_fact = by_fact or values.tensors()
                        found.append(values)
                        info["losses"] += values.losses  # of all targets one after another, group by group
                        info["steps"] += values.steps
                    with lm.monitor.phase("keys"):
                        keys = keys_of[layer] = subjects.keys(layer)
                        residual = values.target - subjects.states(layer, *aim)
                    if layer == layers[0]:
                        note_similar(lm, [requests[group[0]] for group in groups], keys)
                    with lm.monitor.phase("solve"):
                        update = self.solve(layer, self.share(residual.double(), left), keys, self.past.get(layer))
                    with lm.monitor.phase("apply"):
                        step = written(lm, layer, update)
                        delta.updates.update(step.updates)
                        attached.enter_context(lm.edited(step))
                    info["residual_norms"][str(layer)] = float(residual.norm(dim=0).mean())
                with lm.monitor.phase("keys"):
                    missing = values.target - subjects.states(chosen[-1], *aims[-1])
                shares.append(share_written(values, missing))
        info["diagnosis"] = self.diagnosis(*found, written=fmean(shares))
        delta = self.finished(delta)
        if self.config.past_keys == "post":
            with lm.monitor.phase("keys"), lm.edited(delta):
                after = Subjects(lm, requests, contexts, groups)
                keys_of = {layer: after.keys(layer) for layer in keys_of}
        if self.config.past_keys != "none":
            delta.memory = {f"keys.{layer}": keys.float() for layer, keys in keys_of.items()}
        if len(layers) == 1 and all(isinstance(update, Factors) for update in delta.updates.values()):
            by_fact |= {"keys": keys.cpu(), "residual": residual.cpu()}  # a dense update is smaller than these
        delta.by_fact = by_fact
        self.remember(delta)
        return delta

    def _targets(
        self, requests: Sequence[EditRequest], aim: tuple[int, Site], groups: Groups, known: Mapping[int, Values]
    ) -> Values:
        """Targets of all groups: those that are known, and those that are looked for."""
        missing = [number for number in range(len(groups)) if number not in known]
        sought = [groups[number] for number in missing]
        if not sought:
            return Values.joined([known[number] for number in range(len(groups))])
        found = optimize_values(self.lm, requests, *aim, self.config.value, self.contexts, sought)
        if not known:
            return found
        every = {**known, **{number: found.of(column) for column, number in enumerate(missing)}}
        return Values.joined([every[number] for number in range(len(groups))])

    def warm_up(self) -> None:
        """Second moments, once it is known that all layers can be aimed at."""
        for chosen in self.rounds(self.layers):
            self.aims(chosen)
        super().warm_up()

    # --- some facts less ------------------------------------------------------------------------------------------

    def without(
        self, requests: Sequence[EditRequest], revoked: Collection[int], edit: Edit, by_fact: Mapping[str, Tensor]
    ) -> Remade | None:
        """At a single layer, keys and residuals do not hang on each other: what is left is solved anew, without a pass.
        At several, all but the lowest read what those below them have written: only the values are those that were
        found. A group that has lost a fact is looked for again.
        """
        if not by_fact:
            return None
        columns = {tuple(group): column for column, group in enumerate(self.groups(requests))}
        self._fit(by_fact, len(columns))
        left = [number for number in range(len(requests)) if number not in revoked]
        rest = [requests[number] for number in left]
        kept = [columns.get(tuple(left[i] for i in group)) for group in self.groups(rest)]
        found = Values.of_tensors(by_fact, self.lm.device)
        known = {number: found.of(column) for number, column in enumerate(kept) if column is not None}
        if len(known) < len(kept) or "keys" not in by_fact:
            return Remade(self._written(rest, known), VALUES_KEPT) if known else None
        some = {name: tensor[..., kept] for name, tensor in by_fact.items()}
        return Remade(self._solved(some, Values.joined(list(known.values())), getattr(edit, "info", {})), SOLVED)

    def _solved(self, by_fact: dict[str, Tensor], values: Values, info: Mapping[str, Any]) -> WeightDelta:
        """The one layer's update, from keys and residuals."""
        (layer,) = self.layers
        keys, residual = (by_fact[name].to(self.lm.device) for name in ("keys", "residual"))
        about = {"prefixes": info.get("prefixes", []), "groups": keys.shape[1]}
        about |= {"losses": values.losses, "steps": values.steps}
        about |= self.prepare([layer], keys.shape[1] + (self.past[layer].shape[1] if layer in self.past else 0))
        with self.lm.monitor.phase("solve"):
            update = self.solve(layer, self.share(residual.double(), 1), keys, self.past.get(layer))
        about["residual_norms"] = {str(layer): float(residual.norm(dim=0).mean())}
        about["diagnosis"] = self.diagnosis(values)
        delta = self.finished(WeightDelta(written(self.lm, layer, update).updates, about))
        if self.config.past_keys != "none":  # what enters the one layer, before and after it is written
            delta.memory = {f"keys.{layer}": keys.float()}
        delta.by_fact = by_fact
        self.remember(delta)
        return delta

    def _fit(self, by_fact: Mapping[str, Tensor], count: int) -> None:
        """Raises MissingError: it is not what this method keeps of so many groups on this model."""
        width = self.lm.layout.width
        known = Values.sizes(width, count)
        if "keys" in by_fact:
            (layer,) = self.layers if len(self.layers) == 1 else (0,)
            known |= {"keys": size(self.lm.key_width(layer), count), "residual": size(width, count)}
        fitted(by_fact, known, BY_FACT, AGAIN)

    # --- sequences --------------------------------------------------------------------------------------------------

    def recall(self, edit: Edit) -> None:
        """Take up the keys that `edit` was made with."""
        memory, lm = getattr(edit, "memory", {}), self.lm
        known = {f"keys.{layer}": size(lm.key_width(layer), f"facts {layer}") for layer in range(lm.layout.depth)}
        fitted(memory, {name: known[name] for name in memory.keys() & known.keys()}, "an earlier edit", "make it again")
        for name, keys in memory.items():
            layer = int(name.removeprefix("keys."))
            new = self.coordinates(layer, keys.double())
            self.past[layer] = torch.cat([self.past[layer], new], dim=1) if layer in self.past else new


def countdown(layers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(how many layers are left, this one included; layer), lowest layer first."""
    return zip(range(len(layers), 0, -1), layers, strict=True)


def share_written(values: Values, missing: Tensor) -> float:
    """The part of the wanted change (target − initial) that is no longer missing, over all facts; 1 where none was
    wanted.
    """
    wanted = (values.target - values.initial).double()
    total = float(wanted.square().sum())
    return 1.0 - float((missing.double() * wanted).sum()) / total if total else 1.0


def note_similar(lm: LM, requests: Sequence[EditRequest], keys: Tensor) -> None:
    """Say which facts share a key: only their average can be written."""
    pairs = similar_keys(keys)
    if pairs:
        first, second = (requests[i] for i in pairs[0])
        lm.monitor.note(
            f"{many(len(pairs), 'pair of facts has', 'pairs of facts have')} the same key, so only a mean of their"
            f" values can be written, such as {first.text!r} and {second.text!r} (method=memit-merge optimizes one for"
            " both)"
        )
