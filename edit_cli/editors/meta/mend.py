"""MEND: one gradient step, made better by networks that read the gradient in factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edit_cli.distributed import ALONE, Team
from edit_cli.editors.meta.base import TrainableEditor
from edit_cli.editors.meta.episodes import DrawOptions, Trial, draw
from edit_cli.editors.meta.factored_gradients import Gradient, Shift, gradients, largest, refuse_infinite
from edit_cli.editors.meta.hypernetwork import PARTS, Hypernetwork, edited_modules, shapes_of
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.errors import UsageError
from edit_cli.lm.model import LM
from edit_cli.requests import Case, EditRequest

LEARNT = ("all", "steps", "nothing")
GRADIENT, UNIT, LOSS = SIZES = ("gradient", "unit", "loss")


@dataclass(kw_only=True)
class MEND(TrainableEditor):
    """Fast Model Editing at Scale (Mitchell et al., 2022): W ← W − α Σ δ̃ ũᵀ, with (ũ, δ̃) = g(u, δ) (section 3).

    layers: none for the last `last` of every stack; part: both matrices of their MLPs, or the "out" one. second_in: of
    gated MLPs, edit the second input matrix too.
    edits: facts edited together, k; it is trained for one k.
    rank, spread: of the networks' layers. shared: one network for all matrices of a shape. normalise; transformed
    ("both" factors, "inputs", "outputs", or the "smaller"); xavier (no identity at first): the paper's ablations.
    step_size: α at first; log_step: log α is learnt, so that it keeps its sign; step_lr: its learning rate.
    edit_weight, locality_weight: c_edit and c_loc of L = c_edit · NLL + c_loc · KL (equation 4).
    size: of each fact's gradient at each matrix, before anything else: the "gradient"'s own, as published; "unit", the
    same for all, since it is small where a softmax or a tanh is saturated, and such facts need no smaller step; or that
    of its "loss", the more there is to change.
    learn: "all"; "steps", α alone; "nothing": the control, an identity network with the given step size.
    """

    heads = ("causal", "seq2seq", "classifier")
    remembers = True
    LATER: ClassVar[dict[str, Any]] = {**TrainableEditor.LATER, "size": GRADIENT}

    layers: list[int] = field(default_factory=list)
    last: int = 3
    part: str = "both"
    second_in: bool = True
    edits: int = 1
    rank: int = 1920
    spread: float = 1.0
    shared: bool = True
    normalise: bool = True
    transformed: str = "both"
    xavier: bool = False
    step_size: float = 1.0e-4
    log_step: bool = False
    step_lr: float = 1.0e-4
    edit_weight: float = 0.1
    locality_weight: float = 1.0
    learn: str = "all"
    size: str = GRADIENT
    draw: DrawOptions = field(default_factory=DrawOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transformed not in PARTS:
            raise UsageError(f"method.transformed={self.transformed}: choose {', '.join(PARTS[:-1])} or {PARTS[-1]}")
        if self.learn not in LEARNT:
            raise UsageError(f"method.learn={self.learn}: choose {', '.join(LEARNT[:-1])} or {LEARNT[-1]}")
        if self.size not in SIZES:
            raise UsageError(f"method.size={self.size}: choose {', '.join(SIZES[:-1])} or {SIZES[-1]}")
        if self.step_size <= 0 or self.edits < 1:
            raise UsageError(f"method.step_size={self.step_size} and method.edits={self.edits} must be above 0")

    @property
    def cases_per_edit(self) -> int:
        return self.edits

    def build(self, lm: LM) -> MendNet:
        modules, _ = self._modules(lm)
        net = MendNet(
            Hypernetwork(shapes_of(lm, modules), self.rank, self.spread, self.shared, self.transformed, self.normalise,
            xavier=self.xavier),
            modules, self.step_size, self.log_step,
        )  # fmt: skip
        net.hypernetwork.requires_grad_(self.learn == "all")
        net.steps.requires_grad_(self.learn != "nothing")
        return net

    def groups(self, net: MendNet) -> list[dict[str, Any]]:
        return [{"params": list(net.hypernetwork.parameters())}, {"params": [net.steps], "lr": self.step_lr}]

    def loss(self, net: MendNet, lm: LM, batch: Sequence[Case]) -> tuple[Tensor, dict[str, float]]:
        """Equation 4, the mean over independent edits.

        Gradients reach g through ΔW alone, never through u, δ or the model.
        """
        modules, lowest = self._modules(lm)
        lessons = draw(batch, self.edits, self.draw)
        memory = self.memory(lm)
        rows = memory.rows(lm, [pair for lesson in lessons for pair in lesson.inner])
        found = memory.gradients(lm, rows, modules) if memory.works(lm) else gradients(lm, rows, modules)
        shifts = net(self._sized(found), len(lessons), lm.team)
        nll, kl, told = Trial(lm, lessons, lowest, memory).losses(shifts)
        if not net.training:
            told["shift"] = largest(lm, shifts)
        return self.edit_weight * nll + self.locality_weight * kl, told

    @torch.no_grad()
    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> WeightDelta:
        """One step of all requests together, as factors of as many columns as they have tokens."""
        net = self.trained(lm)
        modules, _ = self._modules(lm)
        rows = lm.head.encode([(request.text, request.target_new) for request in requests])
        found = gradients(lm, rows, modules)
        shifts = net(self._sized(found), 1)
        refuse_infinite(shifts.values())
        updates = {f"{name}.weight": _factors(shifts[name], found[name]) for name in modules}
        return WeightDelta(updates, {"shift": largest(lm, shifts)}).compact(lm)

    def _sized(self, found: dict[str, Gradient]) -> dict[str, Gradient]:
        return (
            found
            if self.size == GRADIENT
            else {name: gradient.sized(self.size == LOSS) for name, gradient in found.items()}
        )

    def _modules(self, lm: LM) -> tuple[list[str], int]:
        return edited_modules(lm, self.layers, self.last, self.part, self.second_in)


class MendNet(nn.Module):
    """The networks g and the step sizes α, one a module."""

    def __init__(self, hypernetwork: Hypernetwork, modules: Sequence[str], step_size: float, log_step: bool) -> None:
        super().__init__()
        self.hypernetwork, self.modules_edited, self.log_step = hypernetwork, list(modules), log_step
        self.steps = nn.Parameter(torch.full((len(modules),), math.log(step_size) if log_step else step_size))

    def forward(self, gradient: dict[str, Gradient], edits: int, team: Team = ALONE) -> dict[str, Shift]:
        """−α Σ δ̃ ũᵀ of each module, for each of `edits` equally large groups of rows."""
        sizes = self.steps.exp() if self.log_step else self.steps
        found = self.hypernetwork([gradient[name] for name in self.modules_edited], team)
        return {
            name: Shift((-size * delta).reshape(edits, -1, delta.shape[-1]), u.reshape(edits, -1, u.shape[-1]))
            for name, size, (u, delta) in zip(self.modules_edited, sizes, found, strict=True)
        }


def _factors(shift: Shift, gradient: Gradient) -> Factors:
    kept = gradient.kept.flatten().to(shift.left.device)
    return Factors(shift.left[0][kept].T.contiguous(), shift.right[0][kept].contiguous())
