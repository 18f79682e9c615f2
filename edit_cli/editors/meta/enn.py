"""ENN: the model itself is trained until a few plain gradient steps on a fact change that fact and little else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from edit_cli.config.schema import Count, NonNegative, Positive
from edit_cli.editors.base import Context
from edit_cli.editors.finetune.base import lent
from edit_cli.editors.meta.base import GradientEditor, Logs, StepConfig, StepSizes, TrainingConfig
from edit_cli.editors.meta.episodes import EpisodeEvaluation, losses, sample_episodes
from edit_cli.editors.meta.factored_gradients import Shift, gradients, largest, refuse_infinite, shifted
from edit_cli.editors.passes import row_losses
from edit_cli.edits.edit import Edit, WeightDelta
from edit_cli.errors import UsageError
from edit_cli.lm.heads.answers import Answers
from edit_cli.lm.hooks import exact
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import Row
from edit_cli.lm.weights.access import DeviceWeight
from edit_cli.requests import Case, EditRequest

EPSILON = 1e-6  # of the rmsprop rule
Update = Literal["sgd", "rmsprop"]


@dataclass(frozen=True, kw_only=True)
class ENNConfig(StepConfig):
    """The defaults are published for language models; the paper's own are rule=rmsprop with objective=margin, ten steps
    of a step_size of 1e-3, and step_lr=0.
    """

    steps: Count = 1
    """K, all of which training goes back through."""
    rule: Update = "sgd"
    """rmsprop: g / √(v + ε) of each entry, with v ← β v + (1 − β) g²."""
    decay: Annotated[float, Ge(0), Le(1)] = 0.5
    """β at first; it is learned."""
    objective: Literal["nll", "margin"] = "nll"
    """What the steps descend: nll, or max(0, margin + max log p(others) − log p(target)), which ends steps by
    itself."""
    margin: NonNegative = 0.0
    """By which the target must be the likeliest."""
    step_size: Positive = 1.0e-2
    """α of each matrix, at first."""
    step_lr: NonNegative = 1.0e-3
    """Learning rate of the step sizes; 0: they stay."""
    trains: Literal["all", "edited", "nothing"] = "all"
    """Weights of the model that are trained: all, those that the steps change, or, as a control, nothing but step
    sizes."""
    base_weight: NonNegative = 1.0
    """Weight of staying with the original model before the edit (published: 1, and 10 for continuations)."""
    edit_weight: NonNegative = 0.1
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=50_000, edits=10, lr=1.0e-5, validate_every=500, validation_edits=500, patience=2000, save_every=500
        )
    )
    """How it is trained; published: up to 500,000 edits, 10 a step. Half precision was unstable in the literature."""


class ENN(GradientEditor[ENNConfig, "EnnNet"]):
    """Editable Neural Networks (Sinitsin et al., 2020): L = c_base L_base(θ) + c_edit l_e(θ') + c_loc L_loc(θ, θ'), θ'
    after K steps.

    L_base is KL(original ‖ θ), L_loc is KL(θ ‖ θ').
    """

    Config = ENNConfig
    heads = ("causal", "seq2seq", "classifier", "image")

    def __init__(self, config: ENNConfig, lm: LM, context: Context | None = None) -> None:
        super().__init__(config, lm, context)
        self.changed = False  # whether the model has the trained weights by an edit that is attached

    def build(self) -> EnnNet:
        """The model's own weights, to be trained, and step sizes.

        Raises:
            UsageError: weights that are quantized or lie off the device.
        """
        config, lm = self.config, self.lm
        edited = [f"{name}.weight" for name in self.modules]
        names = {"all": [name for name, _ in lm.model.named_parameters()], "edited": edited, "nothing": []}[
            config.trains
        ]
        if not all(isinstance(lm.access(name), DeviceWeight) for name in {*names, *edited}):
            raise UsageError(
                f"enn trains the model itself, and {lm.name} is quantized or not all on the device: choose another"
                " method"
            )
        with lm.pristine():
            weights = {name: lm.access(name).value() for name in names}
        net = EnnNet(weights, self.modules, config)
        net.steps.requires_grad_(config.step_lr > 0)
        net.decay.requires_grad_(config.rule == "rmsprop")
        return net

    def groups(self, net: EnnNet) -> list[dict[str, Any]]:
        return [{"params": [*net.kept.values(), net.decay]}, {"params": [net.steps], "lr": self.config.step_lr}]

    def after_step(self, net: EnnNet) -> None:
        with torch.no_grad():
            net.decay.clamp_(0, 1)

    def loss(self, net: EnnNet, batch: Sequence[Case]) -> tuple[Tensor, Logs]:
        """Equation 3, the mean over independent edits. Gradients go through all K steps.

        The numbers to log count from the original model.
        """
        config = self.config
        episodes = sample_episodes(batch, config.edits, config.draw)
        rows = self.cache.rows([pair for episode in episodes for pair in episode.support])
        evaluation = EpisodeEvaluation(self.cache, episodes, 0 if config.trains == "all" else self.lowest)
        original, query = evaluation.base, evaluation.query
        with lent(self.lm, net.weights):
            shifts, _ = self.descend(net, rows, len(episodes))
            after, now = evaluation.answers(shifts), evaluation.answers({})
        nll, _, logs = losses(after, original, query)
        _, base, _ = losses(now, original, query)
        _, local, _ = losses(after, Answers(now.logits.detach(), now.labels, now.rows), query)
        if config.objective == "margin":
            nll = self._losses(after, len(query))[query.to(after.rows.device)].mean()
        if not net.training:
            logs["shift"] = largest(self.lm, shifts)
        loss = config.base_weight * base + config.edit_weight * nll + config.locality_weight * local
        return loss, {**logs, "base": float(base.detach())}

    def descend(self, net: EnnNet, rows: Sequence[Row], edits: int) -> tuple[dict[str, Shift], int]:
        """Where K steps of so many independent edits lead from the model's present weights, and how many of them were
        taken; differentiable where gradients are wanted.
        """
        graph = torch.is_grad_enabled()
        shifts: dict[str, Shift] = {}
        steps = 0
        descents = {
            name: Descent(self.config.rule, size, net.decay) for name, size in zip(self.modules, net.sizes, strict=True)
        }
        for _ in range(self.config.steps):
            # faster kernels of attention have no second derivative
            with sdpa_kernel(SDPBackend.MATH) if graph else nullcontext(), shifted(self.lm, shifts):
                gradient = gradients(self.lm, rows, self.modules, graph, self._losses)
            missing = gradient[self.modules[0]].losses
            steps += bool(missing.any())  # where nothing is missing, no step is taken
            for name, descent in descents.items():
                delta, u = (
                    part.reshape(edits, -1, part.shape[-1]) for part in (gradient[name].outputs, gradient[name].inputs)
                )
                shifts[name] = descent.step(delta, u)
        return shifts, steps

    @torch.no_grad()
    def edit(self, requests: Sequence[EditRequest]) -> WeightDelta:
        """From the original weights to the trained ones and K steps on; in a sequence, after the first edit, the
        steps alone.
        """
        net, lm = self.trained(), self.lm
        trained = WeightDelta({}) if self.changed and lm.attached else self._to_trained(net)
        rows = lm.head.encode([(request.text, request.target_new) for request in requests])
        with lm.edited(trained):
            shifts, steps = self.descend(net, rows, 1)
        refuse_infinite(shifts.values())
        moves = WeightDelta({f"{name}.weight": shift.factors() for name, shift in shifts.items()})
        updates = dict(trained.updates) | moves.updates
        for name in moves.updates.keys() & trained.updates.keys():
            updates[name] = trained.stored(lm, name) + moves.stored(lm, name)
        edit = WeightDelta(updates, {"shift": largest(lm, shifts), "diagnosis": {"steps": steps}}).compact(lm)
        self.remember(edit)
        return edit

    def recall(self, edit: Edit) -> None:
        self.changed = True

    def _to_trained(self, net: EnnNet) -> WeightDelta:
        """From the original weights to the trained ones; computed once a model."""

        def moved() -> WeightDelta:
            with self.lm.pristine():
                return WeightDelta(
                    {name: value.detach() - exact(self.lm.access(name).value()) for name, value in net.weights.items()}
                )

        return self.context.once("trained", moved)

    def _losses(self, answers: Answers, rows: int) -> Tensor:
        """(rows,): l_e."""
        if self.config.objective == "nll":
            return row_losses(answers, rows)
        right = answers.logits.gather(1, answers.labels[:, None])[:, 0]
        best = answers.logits.scatter(1, answers.labels[:, None], -math.inf).amax(-1)
        missing = (self.config.margin + best - right).clamp_min(0)
        count = torch.bincount(answers.rows, minlength=rows).to(missing)
        return missing.new_zeros(rows).index_add(0, answers.rows, missing) / count.clamp_min(1)


class Descent:
    """The steps of one matrix so far. `step` takes a gradient's factors δ (edits, n, d_out) and u (edits, n, d_in)."""

    def __init__(self, rule: Update, size: Tensor, decay: Tensor) -> None:
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


class EnnNet(StepSizes):
    """The model's weights, by name, the step sizes α, one a module, and β."""

    def __init__(self, weights: dict[str, Tensor], modules: Sequence[str], config: ENNConfig) -> None:
        super().__init__(len(modules), config)
        self.modules_edited = list(modules)
        self.kept = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(exact(value).clone()) for name, value in weights.items()}
        )
        self.decay = nn.Parameter(torch.tensor([config.decay]))  # FSDP takes no parameter without dimensions

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): value for name, value in self.kept.items()}
