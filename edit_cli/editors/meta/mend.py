"""MEND: one gradient step, made better by networks that read the gradient in factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from edit_cli.config.schema import Count, NonNegative
from edit_cli.distributed import SINGLE, ProcessGroup
from edit_cli.editors.meta.base import GradientEditor, Logs, StepConfig, StepSizes, TrainingConfig
from edit_cli.editors.meta.episodes import EpisodeEvaluation, sample_episodes
from edit_cli.editors.meta.factored_gradients import Gradient, Shift, gradients, largest, refuse_infinite
from edit_cli.editors.meta.hypernetwork import Hypernetwork, Part
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.requests import Case, EditRequest


@dataclass(frozen=True, kw_only=True)
class MENDConfig(StepConfig):
    """The paper's ablations are settings, too."""

    rank: Count = 1920
    """Of the networks' layers."""
    spread: NonNegative = 1.0
    """Standard deviation of their input matrices at first."""
    shared: bool = True
    """One network for all matrices of a shape."""
    normalize: bool = True
    """Networks read normalized factors."""
    transformed: Part = "both"
    """What of a gradient the networks change: both factors, inputs, outputs, or the smaller one."""
    xavier: bool = False
    """Networks do not begin as the identity."""
    size: Literal["gradient", "unit", "loss"] = "gradient"
    """Of each fact's gradient at each matrix, before anything else: the gradient's own, as published; unit, the same
    for all, since it is small where a softmax or a tanh is saturated, and such facts need no smaller step; or that of
    its loss, the more there is to change."""
    learn: Literal["all", "steps", "nothing"] = "all"
    """steps: the step sizes alone; nothing: the control, an identity network with the given step size."""
    edit_weight: NonNegative = 0.1
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=50_000, edits=10, lr=1.0e-6, validate_every=500, validation_edits=500, patience=2000, save_every=500
        )
    )
    """How it is trained; published: up to 500,000 edits, 10 a step."""


class MEND(GradientEditor[MENDConfig, "MendNet"]):
    """Fast Model Editing at Scale (Mitchell et al., 2022): W ← W − α Σ δ̃ ũᵀ, with (ũ, δ̃) = g(u, δ) (section 3)."""

    Config = MENDConfig
    heads = ("causal", "seq2seq", "classifier", "image")

    def build(self) -> MendNet:
        net = MendNet(self.shapes, self.modules, self.config)
        net.hypernetwork.requires_grad_(self.config.learn == "all")
        net.steps.requires_grad_(self.config.learn != "nothing")
        return net

    def groups(self, net: MendNet) -> list[dict[str, Any]]:
        return [{"params": list(net.hypernetwork.parameters())}, {"params": [net.steps], "lr": self.config.step_lr}]

    def loss(self, net: MendNet, batch: Sequence[Case]) -> tuple[Tensor, Logs]:
        """L = c_edit · NLL + c_loc · KL (equation 4), the mean over independent edits.

        Gradients reach g through ΔW alone, never through u, δ or the model.
        """
        episodes = sample_episodes(batch, self.config.edits, self.config.draw)
        shifts = net(self._sized(self.support_gradients(episodes)), len(episodes), self.lm.process_group)
        nll, kl, logs = EpisodeEvaluation(self.cache, episodes, self.lowest).losses(shifts)
        if not net.training:
            logs["shift"] = largest(self.lm, shifts)
        return self.config.edit_weight * nll + self.config.locality_weight * kl, logs

    def edit(self, requests: Sequence[EditRequest]) -> WeightDelta:
        """One step of all requests together, as factors of as many columns as they have tokens."""
        (made,) = self._steps([requests])
        return made

    def edit_each(self, batches: Sequence[Sequence[EditRequest]]) -> list[WeightDelta] | None:
        """Of equally many facts each: one pass finds the gradients of all."""
        return self._steps(batches) if len({len(requests) for requests in batches}) == 1 else None

    @torch.no_grad()
    def _steps(self, batches: Sequence[Sequence[EditRequest]]) -> list[WeightDelta]:
        """A step of each batch by itself."""
        net, lm, each = self.trained(), self.lm, len(batches[0])
        rows = lm.head.encode([(request.text, request.target_new) for requests in batches for request in requests])
        gradient = gradients(lm, rows, self.modules)
        shifts = net(self._sized(gradient), len(batches))
        refuse_infinite(shifts.values())
        made = []
        for number in range(len(batches)):
            own = {name: shift.of([number]) for name, shift in shifts.items()}
            kept = {name: gradient[name].kept[number * each : (number + 1) * each] for name in self.modules}
            updates: dict[str, Factors | Tensor] = {
                f"{name}.weight": _factors(own[name], kept[name]) for name in self.modules
            }
            made.append(WeightDelta(updates, {"shift": largest(lm, own)}).compact(lm))
        return made

    def _sized(self, gradient: dict[str, Gradient]) -> dict[str, Gradient]:
        if self.config.size == "gradient":
            return gradient
        return {name: factors.sized(by_loss=self.config.size == "loss") for name, factors in gradient.items()}


class MendNet(StepSizes):
    """The networks g and the step sizes α, one a module."""

    def __init__(self, shapes: Sequence[tuple[int, int]], modules: Sequence[str], config: MENDConfig) -> None:
        super().__init__(len(modules), config)
        self.hypernetwork = Hypernetwork(
            shapes,
            config.rank,
            config.spread,
            config.shared,
            config.transformed,
            config.normalize,
            xavier=config.xavier,
        )
        self.modules_edited = list(modules)

    def forward(
        self, gradient: dict[str, Gradient], edits: int, process_group: ProcessGroup = SINGLE
    ) -> dict[str, Shift]:
        """−α Σ δ̃ ũᵀ of each module, for each of `edits` equally large groups of rows."""
        better = self.hypernetwork([gradient[name] for name in self.modules_edited], process_group)
        return {
            name: Shift((-size * delta).reshape(edits, -1, delta.shape[-1]), u.reshape(edits, -1, u.shape[-1]))
            for name, size, (u, delta) in zip(self.modules_edited, self.sizes, better, strict=True)
        }


def _factors(shift: Shift, kept: Tensor) -> Factors:
    """Of one edit. kept: (rows, tokens) bool."""
    kept = kept.flatten().to(shift.left.device)
    return Factors(shift.left[0][kept].T.contiguous(), shift.right[0][kept].contiguous())
