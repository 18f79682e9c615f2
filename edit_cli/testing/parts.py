"""The embedded model, facts of its world, methods as the command line builds them, and whether bits are the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from torch import Tensor, nn

from edit_cli.cli.hydra_launch import kinds, with_defaults
from edit_cli.config import registry
from edit_cli.config.build import register_resolvers
from edit_cli.config.overrides import regroup
from edit_cli.datasets.counterfact import CounterFact
from edit_cli.experiment.setup import method_of
from edit_cli.lm.layout import is_transposed
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.requests import Case, EditRequest


def packaged_method(
    name: str, *settings: str, plugins: Sequence[str] = (), config_dir: str | Path | None = None
) -> Any:
    """The method that `method=NAME` and these settings describe on the embedded model, as the command line builds it.

    plugins, config_dir: as on the command line; the plug-ins stay admitted.

    Raises:
        UsageError: as the command line.
    """
    registry.admit(plugins)
    register_resolvers()
    folders = [] if config_dir is None else [Path(config_dir)]
    words = [f"method={name}", *settings]
    words = regroup([*words, *(f"--config-dir={folder}" for folder in folders)], kinds("evaluate", words, folders))
    with initialize_config_module("edit_cli.conf", version_base="1.3"):
        return method_of(compose("evaluate", with_defaults(words)).method)


def embedded_lm() -> LM:
    """A fresh copy of the shipped model, whose projections are `Conv1D`."""
    return ModelOptions(name="tiny-gpt2", id="embedded:tiny-gpt2", device="cpu").load()


def linear_twin() -> LM:
    """The shipped model with every `Conv1D` replaced by the `Linear` that computes the same."""
    lm = embedded_lm()
    for module in list(lm.model.modules()):
        for name, child in list(module.named_children()):
            if is_transposed(child):
                weight, bias = child.get_parameter("weight"), child.get_parameter("bias")
                linear = nn.Linear(*weight.shape)
                linear.weight, linear.bias = nn.Parameter(weight.T.contiguous(), requires_grad=False), bias
                setattr(module, name, linear)
    return LM(lm.model, lm.tokenizer, "tiny-gpt2-linear")


@cache
def world(split: str = "test") -> tuple[Case, ...]:
    """Cases of the embedded world."""
    return CounterFact(name="counterfact", records="world", split=split).load().cases


def facts(count: int, start: int = 0) -> list[EditRequest]:
    """New facts about the embedded world, for the embedded model to be edited with."""
    return [case.requests[0] for case in world("tune")[start : start + count]]


def likelihoods(lm: LM, wanted: Sequence[EditRequest]) -> list[float]:
    """−log P of each new answer, a token."""
    return [score.nll for score in lm.loglikelihood([(edit.text, edit.target_new) for edit in wanted])]


def snapshot(lm: LM) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in lm.model.named_parameters()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal, NaN to NaN, in every bit that counts."""
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
