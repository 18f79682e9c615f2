"""Passes that differ from one module on: what ends before it is run once, in every family, and the answers are those
of whole passes.
"""

from __future__ import annotations

import pytest
import torch
from families import CLASSIFIERS, DENSE, LABELS, SEQ2SEQ, tiny_lm
from torch import nn

from edit_cli.editors.finetune.ft import FT
from edit_cli.editors.passes import passes
from edit_cli.lm.fast.repeated_pass import recorded
from edit_cli.lm.hooks import on_output
from edit_cli.lm.layout import attention_out
from edit_cli.requests import EditRequest

pytestmark = pytest.mark.thin(8)

PAIRS = [("Ada Lund lives in", "Oslo, and"), ("The capital of", "France")]


def change(states: torch.Tensor) -> torch.Tensor:
    return states + torch.linspace(-1, 1, states.shape[-1]).to(states)


@pytest.mark.parametrize("family", [*DENSE, *SEQ2SEQ, *CLASSIFIERS])
def test_answers_are_those_of_whole_passes(family):
    lm = tiny_lm(family)
    rows = lm.head.encode([(prompt, LABELS[0]) for prompt, _ in PAIRS] if family in CLASSIFIERS else PAIRS)
    layer = lm.layout.depth - 1
    name, ran = lm.layout.mlp_out(layer), []
    untouched = [module.__dict__.get("forward") for module in lm.model.modules()]
    with torch.no_grad(), on_output(lm.module(name), change, len(rows)):
        expected = lm.head.answers(rows, end=True).logits
    with passes(lm, rows, name, layer, end=True) as run, torch.no_grad():
        torch.testing.assert_close(run.answers(change).logits, expected)
        with run.from_cache():
            inner = [module for module in lm.module(lm.layout.block(0)).modules() if not list(module.children())]
            handles = [module.register_forward_hook(lambda *_: ran.append(1)) for module in inner]
            torch.testing.assert_close(run.answers(change).logits, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(run.answers(lambda states: states).logits, run.base.logits, rtol=1e-5, atol=1e-5)
            for handle in handles:
                handle.remove()
    assert not ran
    assert [module.__dict__.get("forward") for module in lm.model.modules()] == untouched


def test_attention_before_the_module_is_not_run_again():
    lm = tiny_lm("llama")
    rows, layer, ran = lm.head.encode(PAIRS), lm.layout.depth - 1, []
    lm.module(attention_out(lm.model, lm.layout, layer)).register_forward_pre_hook(lambda *_: ran.append(1))
    with passes(lm, rows, lm.layout.mlp_out(layer), layer) as run, torch.no_grad():
        run.answers(change)
        assert len(ran) == 2
        with run.from_cache():
            run.answers(change)
    assert len(ran) == 3  # once to record it


@pytest.mark.parametrize(
    ("family", "part"),
    [*((family, "mlp_out") for family in (*DENSE, *SEQ2SEQ, *CLASSIFIERS)), ("llama", "block"), ("t5", "block")],
)
def test_fine_tuning_runs_what_lies_below_once_and_learns_the_same(family, part, monkeypatch):
    lm, ran = tiny_lm(family), []
    facts = [EditRequest(prompt, None, LABELS[0] if family in CLASSIFIERS else target) for prompt, target in PAIRS]
    config = FT.Config(layers=[lm.layout.depth - 1], part=part, steps=3, stop_loss=0.0, batch_size=1)
    with monkeypatch.context() as patch:
        patch.setattr("edit_cli.lm.fast.repeated_pass.KEPT", 0)
        whole = FT(config, lm).edit(facts)
    handle = lm.module(lm.layout.mlp_out(0)).register_forward_hook(lambda *_: ran.append(1))
    kept = FT(config, lm).edit(facts)
    handle.remove()
    assert len(ran) == len(facts)  # the first time round
    assert kept.info["losses"] == whole.info["losses"]
    for name, update in whole.updates.items():
        torch.testing.assert_close(kept.updates[name], update, rtol=0, atol=0)


class Twice(nn.Module):
    """Calls one part twice, writes to what another returned, and has a hook that adds."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.written, self.shifted, self.last, self.after = (nn.Linear(2, 2) for _ in range(5))
        self.shifted.register_forward_hook(lambda _, __, output: output + 1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = self.shared(self.shared(states))
        written = self.written(states)
        written += 1
        return self.after(self.last(self.shifted(written)))


@torch.no_grad()
def test_what_cannot_be_kept_is_run_again():
    model, states = Twice().eval(), torch.ones(1, 2)
    with recorded(model, model.last) as replay:
        expected = model(states)
    assert [module for module, _ in replay.lasting] == [model.shifted, model.last]
    with replay.constant():
        for _ in range(2):  # hooks of others act once
            torch.testing.assert_close(model(states), expected)
