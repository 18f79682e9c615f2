"""ENN: the model itself is trained until a few plain gradient steps on a fact change that fact and little else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from edit_cli.editors.finetune.base import lent
from edit_cli.editors.meta.base import TrainableEditor
from edit_cli.editors.meta.episodes import DrawOptions, Trial, draw, judged
from edit_cli.editors.meta.factored_gradients import Shift, gradients, largest, refuse_infinite, shifted
from edit_cli.editors.meta.hypernetwork import edited_modules
from edit_cli.editors.passes import row_losses
from edit_cli.edits.edit import Edit, WeightDelta
from edit_cli.errors import UsageError
from edit_cli.lm.answers import Answers
from edit_cli.lm.hooks import exact
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import Row
from edit_cli.lm.weights.access import Resident
from edit_cli.requests import Case, EditRequest

RULES, OBJECTIVES, TRAINED = ("sgd", "rmsprop"), ("nll", "margin"), ("all", "edited", "nothing")
EPSILON = 1e-6  # of the rmsprop rule


@dataclass(kw_only=True)
class ENN(TrainableEditor):
    """Editable Neural Networks (Sinitsin et al., 2020): L = c_base L_base(θ) + c_edit l_e(θ') + c_loc L_loc(θ, θ'), θ'
    after K steps.

    layers: whose MLPs the steps change; none for the last `last` of every stack; part: both matrices, or the "out" one.
    second_in: of gated MLPs, change the second input matrix too.
    edits: facts edited together; it is trained for one number.
    steps: K. rule: "sgd", or "rmsprop", g / √(v + ε) of each entry. decay: β of v ← β v + (1 − β) g² at first.
    objective: what is descended: "nll", or "margin", max(0, margin + max log p(others) − log p(target)), which ends
    steps by itself.
    step_size: α at first, of each matrix; log_step: log α is learnt; step_lr: its learning rate, 0 to keep it.
    trains: "all" weights of the model, the "edited" matrices, or "nothing" but step sizes: the control.
    base_weight, edit_weight, locality_weight: c_base, c_edit and c_loc. L_base is KL(original ‖ θ), L_loc is KL(θ ‖
    θ').
    """

    heads = ("causal", "seq2seq", "classifier")
    remembers = True

    layers: list[int] = field(default_factory=list)
    last: int = 3
    part: str = "both"
    second_in: bool = True
    edits: int = 1
    steps: int = 1
    rule: str = "sgd"
    decay: float = 0.5
    objective: str = "nll"
    margin: float = 0.0
    step_size: float = 1.0e-2
    log_step: bool = False
    step_lr: float = 1.0e-3
    trains: str = "all"
    base_weight: float = 1.0
    edit_weight: float = 0.1
    locality_weight: float = 1.0
    draw: DrawOptions = field(default_factory=DrawOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("rule", RULES), ("objective", OBJECTIVES), ("trains", TRAINED)):
            if getattr(self, name) not in known:
                raise UsageError(f"method.{name}={getattr(self, name)}: choose {', '.join(known[:-1])} or {known[-1]}")
        if self.step_size <= 0 or self.edits < 1 or self.steps < 1:
            raise UsageError(
                f"method.step_size={self.step_size}, method.edits={self.edits} and method.steps={self.steps} must be"
                " above 0"
            )
        if not 0 <= self.decay <= 1:
            raise UsageError(f"method.decay={self.decay}: give a number from 0 to 1")
        self._changed = False  # whether the model has the trained weights by an edit that is attached

    @property
    def cases_per_edit(self) -> int:
        return self.edits

    def build(self, lm: LM) -> EnnNet:
        """The model's own weights, to be trained, and step sizes.

        Raises:
            UsageError: weights that are quantised or lie off the device.
        """
        modules, _ = self._modules(lm)
        edited = [f"{name}.weight" for name in modules]
        names = {"all": [name for name, _ in lm.model.named_parameters()], "edited": edited, "nothing": []}[self.trains]
        if not all(isinstance(lm.place(name), Resident) for name in {*names, *edited}):
            raise UsageError(
                f"enn trains the model itself, and {lm.name} is quantised or not all on the device: choose another"
                " method"
            )
        with lm.pristine():
            weights = {name: lm.place(name).value() for name in names}
        net = EnnNet(weights, modules, self.step_size, self.log_step, self.decay)
        net.steps.requires_grad_(self.step_lr > 0)
        net.decay.requires_grad_(self.rule == "rmsprop")
        return net

    def groups(self, net: EnnNet) -> list[dict[str, Any]]:
        return [{"params": [*net.kept.values(), net.decay]}, {"params": [net.steps], "lr": self.step_lr}]

    def after_step(self, net: EnnNet) -> None:
        with torch.no_grad():
            net.decay.clamp_(0, 1)

    def loss(self, net: EnnNet, lm: LM, batch: Sequence[Case]) -> tuple[Tensor, dict[str, float]]:
        """Equation 3, the mean over independent edits. Gradients go through all K steps.

        What is told counts from the original model.
        """
        _, lowest = self._modules(lm)
        lessons = draw(batch, self.edits, self.draw)
        memory = self.memory(lm)
        rows = memory.rows(lm, [pair for lesson in lessons for pair in lesson.inner])
        trial = Trial(lm, lessons, 0 if self.trains == "all" else lowest, memory)
        with lent(lm, net.weights):
            shifts = self.descend(net, lm, rows, len(lessons))
            after, now = trial.answers(shifts), trial.answers({})
        nll, _, told = judged(after, trial.base, trial.outer)
        _, base, _ = judged(now, trial.base, trial.outer)
        _, local, _ = judged(after, Answers(now.logits.detach(), now.labels, now.rows), trial.outer)
        if self.objective == "margin":
            nll = self._losses(after, len(trial.outer))[trial.outer.to(after.rows.device)].mean()
        if not net.training:
            told["shift"] = largest(lm, shifts)
        return self.base_weight * base + self.edit_weight * nll + self.locality_weight * local, {
            **told,
            "base": float(base.detach()),
        }

    def descend(self, net: EnnNet, lm: LM, rows: Sequence[Row], edits: int) -> dict[str, Shift]:
        """Where K steps of so many independent edits lead from the model's present weights; differentiable where
        gradients are wanted.
        """
        graph = torch.is_grad_enabled()
        shifts: dict[str, Shift] = {}
        descents = {
            name: Descent(self.rule, size, net.decay)
            for name, size in zip(net.modules_edited, net.sizes(), strict=True)
        }
        for _ in range(self.steps):
            # faster kernels of attention have no second derivative
            with sdpa_kernel(SDPBackend.MATH) if graph else nullcontext(), shifted(lm, shifts):
                found = gradients(lm, rows, net.modules_edited, graph, self._losses)
            for name, descent in descents.items():
                delta, u = (
                    part.reshape(edits, -1, part.shape[-1]) for part in (found[name].outputs, found[name].inputs)
                )
                shifts[name] = descent.step(delta, u)
        return shifts

    @torch.no_grad()
    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> WeightDelta:
        """From the original weights to the trained ones and K steps on; in a sequence, after the first edit, the
        steps alone.
        """
        net = self.trained(lm)
        trained = WeightDelta({}) if self._changed and lm.attached else self._to_trained(lm, net)
        rows = lm.head.encode([(request.text, request.target_new) for request in requests])
        with lm.edited(trained):
            shifts = self.descend(net, lm, rows, 1)
        refuse_infinite(shifts.values())
        steps = WeightDelta({f"{name}.weight": shift.factors() for name, shift in shifts.items()})
        updates = dict(trained.updates) | steps.updates
        for name in steps.updates.keys() & trained.updates.keys():
            updates[name] = trained.updates[name] + steps.stored(lm, name)
        edit = WeightDelta(updates, {"shift": largest(lm, shifts)}).compact(lm)
        self.recall(lm, edit)
        return edit

    def recall(self, lm: LM, edit: Edit) -> None:
        self._changed = True

    def reset(self) -> None:
        self._changed = False

    def _to_trained(self, lm: LM, net: EnnNet) -> WeightDelta:
        """From the original weights to the trained ones; computed once a model."""
        memory = self.scratch(lm)
        if "trained" not in memory:
            with lm.pristine():
                moved = {name: weight.detach() - exact(lm.place(name).value()) for name, weight in net.weights.items()}
            memory["trained"] = WeightDelta(moved)
        return memory["trained"]

    def _modules(self, lm: LM) -> tuple[list[str], int]:
        return edited_modules(lm, self.layers, self.last, self.part, self.second_in)

    def _losses(self, found: Answers, rows: int) -> Tensor:
        """(rows,): l_e."""
        if self.objective == "nll":
            return row_losses(found, rows)
        right = found.logits.gather(1, found.labels[:, None])[:, 0]
        best = found.logits.scatter(1, found.labels[:, None], -math.inf).amax(-1)
        missing = (self.margin + best - right).clamp_min(0)
        count = torch.bincount(found.rows, minlength=rows).to(missing)
        return missing.new_zeros(rows).index_add(0, found.rows, missing) / count.clamp_min(1)


class Descent:
    """The steps of one matrix so far. `step` takes a gradient's factors δ (edits, n, d_out) and u (edits, n, d_in)."""

    def __init__(self, rule: str, size: Tensor, decay: Tensor) -> None:
        self.rule, self.size, self.decay = rule, size, decay
        self.shift: Shift | None = None
        self.total: Tensor | float = 0.0
        self.square: Tensor | None = None  # v, (edits, d_out, d_in)

    def step(self, delta: Tensor, u: Tensor) -> Shift:
        """Where this step leads: by the plain rule in factors, else dense, because each entry has a length of its
        own.
        """
        if self.rule == "sgd":
            step = Shift(-self.size * delta, u)
            self.shift = step if self.shift is None else self.shift.then(step)
            return self.shift
        gradient = delta.mT @ u
        self.square = gradient**2 if self.square is None else self.decay * self.square + (1 - self.decay) * gradient**2
        self.total = self.total - self.size * gradient / (self.square + EPSILON).sqrt()
        return Shift.dense(self.total)


class EnnNet(nn.Module):
    """The model's weights, by name, the step sizes α, one a module, and β."""

    def __init__(
        self, weights: dict[str, Tensor], modules: Sequence[str], step_size: float, log_step: bool, decay: float
    ) -> None:
        super().__init__()
        self.modules_edited, self.log_step = list(modules), log_step
        self.kept = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(exact(value).clone()) for name, value in weights.items()}
        )
        self.steps = nn.Parameter(torch.full((len(modules),), math.log(step_size) if log_step else step_size))
        self.decay = nn.Parameter(torch.tensor([decay]))  # FSDP takes no parameter without dimensions

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): value for name, value in self.kept.items()}

    def sizes(self) -> Tensor:
        return self.steps.exp() if self.log_step else self.steps
