"""The embedded model and records of its world, for the tests that need a model which knows facts."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from edit_cli.datasets.counterfact import CounterFact
from edit_cli.lm.layout import is_transposed
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.requests import Case


def embedded_lm() -> LM:
    """A fresh copy of the shipped model."""
    return ModelOptions(name="tiny-gpt2", id="embedded:tiny-gpt2", device="cpu").load()


def linear_twin() -> LM:
    """The shipped model with every Conv1D replaced by the Linear that computes the same."""
    lm = embedded_lm()
    for module in list(lm.model.modules()):
        for name, child in list(module.named_children()):
            if is_transposed(child):
                linear = nn.Linear(child.weight.shape[0], child.weight.shape[1])
                linear.weight = nn.Parameter(child.weight.T.contiguous(), requires_grad=False)
                linear.bias = child.bias
                setattr(module, name, linear)
    return LM(lm.model, lm.tokenizer, "tiny-gpt2-linear")


@cache
def world(split: str = "test") -> tuple[Case, ...]:
    """Cases of the embedded world."""
    return CounterFact(name="counterfact", records="world", split=split).load().cases


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def snapshot(lm: LM) -> dict[str, torch.Tensor]:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in lm.model.named_parameters()}
