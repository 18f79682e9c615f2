"""Training some parameters of a model and putting them back: what the fine-tuning methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from edit_cli.config.schema import Count, Layers, Positive
from edit_cli.editors.base import Editor, EditorConfig, require_layers
from edit_cli.editors.cost import Cost
from edit_cli.editors.passes import RepeatedBatches, row_losses, rows_right
from edit_cli.edits.edit import WeightDelta
from edit_cli.lm.heads.answers import Answers
from edit_cli.lm.hooks import exact
from edit_cli.lm.model import LM
from edit_cli.lm.outline import Outline
from edit_cli.lm.weights.access import WeightAccess

Batches = Iterable[Sequence[Any]]  # of rows, as a head encodes them


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(EditorConfig):
    """Settings that FT, EWC and replay share."""

    layers: Layers
    """Layers that are tuned; conf/tuned/METHOD/MODEL.yaml has the published ones."""
    part: Literal["mlp_out", "block"] = "mlp_out"
    """What of a layer: the output projection of its MLP (mlp_out), or all of its weights (block)."""
    lr: Positive = 1e-2
    """Learning rate of Adam."""
    steps: Count = 100
    """Passes over the facts at most; it ends as soon as they are learned."""


F = TypeVar("F", bound=FinetuneConfig)


class FinetuneEditor(Editor[F]):
    """Adam on the parameters of a few layers."""

    heads: ClassVar[tuple[str, ...]] = ("causal", "seq2seq", "classifier")

    @classmethod
    def cost(cls, config: F, outline: Outline, lengths: Sequence[int]) -> Cost | None:
        """Of all passes over the facts, which end sooner if they are learned; of a tuned number its start, its value,
        the one that computes, its gradient and Adam's two.
        """
        if not config.layers:
            return None
        blocks = [outline.model.get_submodule(outline.layout.block(layer)) for layer in config.layers]
        names = [outline.layout.mlp_out(layer) for layer in config.layers]
        parts = [outline.model.get_submodule(name) for name in names] if config.part == "mlp_out" else blocks
        tuned = sum(parameter.numel() for part in parts for parameter in part.parameters())
        above = 1 - min(config.layers) / outline.depth
        passes = config.steps * sum(lengths) * (1 + 2 * above)
        graph = sum(lengths) * (8 * outline.layout.width + 4 * outline.inner) * outline.depth * above * 4
        return Cost(passes, 3 * config.steps, round(6 * 4 * tuned + graph), "gradients and Adam's states")

    @property
    def names(self) -> list[str]:
        """The tuned parameters. Raises UsageError if there are none."""
        return parameters_of(self.lm, require_layers(self.config.layers, self.lm), self.config.part)

    @property
    def lowest(self) -> str:
        """The module with the tuned parameters that runs first."""
        layout, layer = self.lm.layout, min(require_layers(self.config.layers, self.lm))
        return layout.mlp_out(layer) if self.config.part == "mlp_out" else layout.block(layer)

    def answers(self, rows: Sequence[Any]) -> Answers:
        """Scores of what the rows should be answered with."""
        return self.lm.head.answers(rows, end=True)

    def penalty(self, weights: Sequence[Tuned]) -> Tensor | float:
        """What is added to the loss of a batch."""
        return 0.0

    def project(self, weights: Sequence[Tuned]) -> None:
        """What becomes of the tuned weights after a step, in place."""

    def fit(
        self,
        weights: Sequence[Tuned],
        batches: Batches,
        until: Callable[[float, float], bool],
        weight_decay: float = 0.0,
    ) -> list[float]:
        """Train on one batch of facts after another, at most `steps` times over.

        Args:
            weights: what is trained.
            batches: the facts, encoded; gone through once a pass. Where they are a list, they are the same each time.
            weight_decay: of Adam.
            until: says of (mean loss in nats, share of facts that are answered wrong) whether this is good enough: of
                a batch, which is then not learned from, and of a pass over all, which is then the last one.

        Returns:
            The mean loss of each pass.
        """
        optimizer = torch.optim.Adam([weight.tuned for weight in weights], lr=self.config.lr, weight_decay=weight_decay)
        losses: list[float] = []
        frozen_below = min(require_layers(self.config.layers, self.lm)) > 0 and isinstance(batches, list)
        again = RepeatedBatches(self.lm, self.lowest) if frozen_below else None
        for _ in self.lm.monitor.counted("fine-tuning", self.config.steps):
            total, wrong, facts = 0.0, 0, 0
            for number, batch in enumerate(batches):
                answers = partial(self.answers, batch)
                found = answers() if again is None else again.answers(number, answers)
                loss = row_losses(found, len(batch)).mean()
                missed = len(batch) - int(rows_right(found, len(batch)).sum())
                total, wrong, facts = total + loss.item() * len(batch), wrong + missed, facts + len(batch)
                if not until(loss.item(), missed / len(batch)):
                    step(optimizer, weights, loss + self.penalty(weights), self.project)
            losses.append(total / facts)
            if until(losses[-1], wrong / facts):
                break
        return losses


def all_right(loss: float, wrong: float) -> bool:
    """Until every token of every fact is the likeliest."""
    return wrong == 0


@dataclass(frozen=True)
class Tuned:
    """A weight at work: `start` and `tuned`, at least float32, the second to be trained; `present`, by which the
    loss is differentiated.
    """

    name: str
    access: WeightAccess
    start: Tensor
    tuned: Tensor
    present: Tensor


@contextmanager
def tuning(lm: LM, names: Sequence[str]) -> Iterator[list[Tuned]]:
    """The parameters ready to be trained. Every bit is restored on leaving."""
    with ExitStack() as stack:
        weights = []
        for name in names:
            access = lm.access(name)
            start = exact(lm.masters[name] if name in lm.masters else access.value()).clone()
            stack.callback(access.snapshot())
            weights.append(
                Tuned(name, access, start, start.clone().requires_grad_(), stack.enter_context(access.tunable()))
            )
        yield weights


@contextmanager
def lent(lm: LM, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the model computes with these tensors in the places of its parameters of these names:
    gradients reach them.
    """
    given = {id(lm.parameter(name)): value for name, value in weights.items()}
    owners: list[dict[str, Any]] = [module._parameters for module in lm.model.modules()]
    # tied ones, too
    kept = [
        (owner, leaf, parameter)
        for owner in owners
        for leaf, parameter in owner.items()
        if parameter is not None and id(parameter) in given
    ]
    for owner, leaf, parameter in kept:
        owner[leaf] = given[id(parameter)].to(parameter.dtype)
    try:
        yield
    finally:
        for owner, leaf, parameter in kept:
            owner[leaf] = parameter


def parameters_of(lm: LM, layers: Sequence[int], part: str) -> list[str]:
    """Names of what is tuned: the MLP's output projections of the layers (mlp_out), or all of their weights (block)."""
    if part == "mlp_out":
        return [f"{lm.layout.mlp_out(layer)}.weight" for layer in layers]
    blocks = [lm.layout.block(layer) for layer in layers]
    return [
        f"{block}.{name.replace('.original.', '.')}"
        for block in blocks
        for name, _ in lm.module(block).named_parameters()
    ]


def step(
    optimizer: torch.optim.Optimizer,
    weights: Sequence[Tuned],
    loss: Tensor,
    project: Callable[[Sequence[Tuned]], None] | None = None,
) -> None:
    """One step down `loss`; `project` then puts the weights where they may be."""
    gradients = torch.autograd.grad(loss, [weight.present for weight in weights])
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.tuned.grad = gradient.to(weight.tuned)
    optimizer.step()
    with torch.no_grad():
        if project is not None:
            project(weights)
        for weight in weights:
            weight.access.assign(weight.tuned)


def moved(weights: Sequence[Tuned], info: dict) -> WeightDelta:
    """How far the weights have come."""
    return WeightDelta({weight.name: weight.tuned.detach() - weight.start for weight in weights}, info)
