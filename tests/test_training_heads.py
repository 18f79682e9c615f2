"""Editors that are trained, on encoder-decoders and classifiers: gradients, batches of edits, and that training
makes them better.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from embedded import same_bits, snapshot
from learners import low_rank_layers

from edit_cli.datasets.world import WorldEdits
from edit_cli.editors.meta.base import TrainingConfig
from edit_cli.editors.meta.episodes import EpisodeConfig
from edit_cli.editors.meta.factored_gradients import gradients
from edit_cli.editors.meta.mend import MEND, MENDConfig
from edit_cli.editors.passes import row_losses
from edit_cli.edits import store as edit_store
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.training.loop import VALIDATION, Training

FORMS = {"tiny-t5": "questions", "tiny-bart": "questions", "tiny-bert": "claims"}
TRAINING = TrainingConfig(steps=8, edits=8, lr=1e-3, validate_every=8, validation_edits=24, save_every=8, trackers=[])
STEP = {"tiny-t5": 1e-3, "tiny-bart": 5e-4, "tiny-bert": 2e-4}  # sizes at first
models = pytest.mark.parametrize("model", FORMS)


@cache
def shipped(name: str, dtype: Any = "float32") -> LM:
    """No test here changes it."""
    return ModelOptions(name=name, id=f"embedded:{name}", device="cpu", dtype=dtype).load()


@cache
def cases(name: str, split: str):
    form: Any = FORMS[name]
    return WorldEdits("world", records=form, split=split).load(60).cases


def mend(lm: LM, **changed) -> MEND:
    given = {
        "last": 2,
        "rank": 16,
        "spread": 0.05,
        "step_size": 1e-3,
        "log_step": True,
        "step_lr": 0.1,
        "edit_weight": 1.0,
    }
    settings = {
        **given,
        "draw": EpisodeConfig(outer="any", locality=["random", "same_relation"]),
        "training": TRAINING,
        **changed,
    }
    return MEND(MENDConfig(**settings), lm)


parts = pytest.mark.parametrize("part", ["both", "block"])


@parts
@models
def test_gradients_in_factors_are_those_of_the_weights(model, part):
    """Rows of different lengths: padding has no part in them. Of every matrix of a block, attention's are there."""
    lm = shipped(model)
    rows = lm.head.encode([(case.requests[0].text, case.requests[0].target_new) for case in cases(model, "train")[:4]])
    assert len({len(row.ids) for row in rows}) > 1
    modules = mend(lm, part=part).modules
    blocks = [lm.module(lm.layout.block(layer)) for layer in lm.layout.last_layers(2)]
    matrices = sum(isinstance(inner, torch.nn.Linear) for block in blocks for inner in block.modules())
    assert len(modules) == (matrices if part == "block" else 2 * len(blocks)) and matrices > 4 * len(blocks)
    found, untouched = gradients(lm, rows, modules), snapshot(lm)
    weights = [lm.parameter(f"{name}.weight").requires_grad_(True) for name in modules]
    expected = torch.autograd.grad(row_losses(lm.head.answers(rows, end=True), 4).sum(), weights)
    for name, gradient in zip(modules, expected, strict=True):
        torch.testing.assert_close(found[name].dense(), gradient, rtol=1e-3, atol=1e-5)
    assert same_bits(snapshot(lm), untouched)


@parts
@models
def test_independent_edits_in_one_batch_are_those_one_at_a_time(model, part):
    editor, three = mend(shipped(model, "float64"), part=part), cases(model, "train")[:3]
    torch.manual_seed(0)
    net = editor.build().to(torch.float64).train()
    editor.loss(net, cases(model, "train")[10:20])
    for layer in low_rank_layers(net.eval()):
        torch.nn.init.normal_(layer.up, std=0.05)
    torch.manual_seed(1)
    together, told = editor.loss(net, three)
    alone = []
    for case in three:
        torch.manual_seed(1)
        alone.append(editor.loss(net, [case])[0])
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-6, atol=1e-9)
    assert told["nll"] > 0 and told["kl"] > 0


@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=() if model == "tiny-t5" else pytest.mark.slow) for model in FORMS]
)
def test_training_makes_it_better_and_its_edits_hold(model, tmp_path):
    """Against the control that knows the same statistics of gradients and takes the same step."""
    lm, losses = shipped(model), {}
    untouched = snapshot(lm)
    for learn in ("nothing", "all"):
        editor = mend(lm, learn=learn, step_size=STEP[model], training=replace(TRAINING, memory_mib=8))
        lines: list[dict[str, Any]] = []
        done = Training(
            editor, cases(model, "train"), cases(model, "validation"), tmp_path / learn, "test", lines.append
        ).run()
        losses[learn] = next(line["loss"] for line in lines if line["kind"] == VALIDATION)
    assert losses["all"] < 0.9 * losses["nothing"], losses
    editor.context.kept["network"] = done.net.eval().requires_grad_(False)
    requests = [case.requests[0] for case in cases(model, "validation")[:6]]
    before, better = lm.loglikelihood([(r.text, r.target_new) for r in requests]), 0
    for request, old in zip(requests, before, strict=True):
        edit = editor.edit([request])
        with lm.edited(edit):
            (new,) = lm.loglikelihood([(request.text, request.target_new)])
        better += new.nll < old.nll
    assert better == len(requests) and same_bits(snapshot(lm), untouched)
    edit_store.save(edit, tmp_path / "edit", lm, [request], {"name": "mend"})
    edit_store.attach(tmp_path / "edit", lm)
    assert lm.loglikelihood([(request.text, request.target_new)]) == [new]
    lm.detach()
    assert same_bits(snapshot(lm), untouched)
