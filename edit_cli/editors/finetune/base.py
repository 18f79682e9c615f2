"""Training some parameters of a model and putting them back: what the fine-tuning methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from edit_cli.edits.edit import WeightDelta
from edit_cli.errors import UsageError
from edit_cli.lm.hooks import exact
from edit_cli.lm.model import LM
from edit_cli.lm.weights.access import Place


@dataclass(frozen=True)
class Tuned:
    """A weight at work: `start` and `tuned`, at least float32, the second to be trained; `present`, by which the
    loss is differentiated.
    """

    name: str
    place: Place
    start: Tensor
    tuned: Tensor
    present: Tensor


@contextmanager
def tuning(lm: LM, names: Sequence[str]) -> Iterator[list[Tuned]]:
    """The parameters ready to be trained. Every bit is restored on leaving."""
    with ExitStack() as stack:
        weights = []
        for name in names:
            place = lm.place(name)
            start = exact(lm.masters[name] if name in lm.masters else place.value()).clone()
            stack.callback(place.keep())
            weights.append(
                Tuned(name, place, start, start.clone().requires_grad_(), stack.enter_context(place.tunable()))
            )
        yield weights


@contextmanager
def lent(lm: LM, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the model computes with these tensors in the places of its parameters of these names:
    gradients reach them.
    """
    given = {id(lm.parameter(name)): value for name, value in weights.items()}
    owners = [module._parameters for module in lm.model.modules()]
    # tied ones, too
    kept = [(owner, leaf, parameter) for owner in owners for leaf, parameter in owner.items() if id(parameter) in given]
    for owner, leaf, parameter in kept:
        owner[leaf] = given[id(parameter)].to(parameter.dtype)
    try:
        yield
    finally:
        for owner, leaf, parameter in kept:
            owner[leaf] = parameter


def parameters_of(lm: LM, layers: Sequence[int], part: str) -> list[str]:
    """Names of what is tuned: "mlp_out", the MLP's output projections of the layers, or "block", all of their weights.

    Raises:
        UsageError: another word.
    """
    if part == "mlp_out":
        return [f"{lm.layout.mlp_out(layer)}.weight" for layer in layers]
    if part == "block":
        blocks = [lm.layout.block(layer) for layer in layers]
        return [
            f"{block}.{name.replace('.original.', '.')}"
            for block in blocks
            for name, _ in lm.module(block).named_parameters()
        ]
    raise UsageError(f"method.part={part}: choose mlp_out or block")


def step(
    optimizer: torch.optim.Optimizer,
    weights: Sequence[Tuned],
    loss: Tensor,
    held: Callable[[Tuned], Tensor] | None = None,
) -> None:
    """One step down `loss`; `held` says what becomes of a weight after it (projections)."""
    gradients = torch.autograd.grad(loss, [weight.present for weight in weights])
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.tuned.grad = gradient.to(weight.tuned)
    optimizer.step()
    with torch.no_grad():
        for weight in weights:
            if held is not None:
                weight.tuned.copy_(held(weight))
            weight.place.assign(weight.tuned)


def moved(weights: Sequence[Tuned], info: dict) -> WeightDelta:
    """How far the weights have come."""
    return WeightDelta({weight.name: weight.tuned.detach() - weight.start for weight in weights}, info)
