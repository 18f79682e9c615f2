"""MEND: gradients in factors, the meta-gradient, independent edits in one batch, and what a checkpoint is good for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from embedded import embedded_lm, linear_twin, same_bits, snapshot
from learners import changed, low_rank_layers, statements, trained

from edit_cli.editors.meta import checkpoints
from edit_cli.editors.meta.base import TrainingConfig
from edit_cli.editors.meta.base_model_cache import BaseModelCache
from edit_cli.editors.meta.episodes import EpisodeConfig, EpisodeEvaluation, sample_episodes
from edit_cli.editors.meta.factored_gradients import Shift, gradients, shifted
from edit_cli.editors.meta.mend import MEND, MENDConfig
from edit_cli.editors.passes import row_losses
from edit_cli.errors import MissingError, UsageError
from edit_cli.lm.model import LM

DRAWN = EpisodeConfig(outer="any", locality=["random", "same_relation"])
MODULES = [f"transformer.h.{layer}.mlp.{name}" for layer in (4, 5) for name in ("c_fc", "c_proj")]
MODELS = {"Conv1D": embedded_lm, "Linear": linear_twin}


def mend(lm: LM, **changed) -> MEND:
    given = {"layers": [4, 5], "rank": 8, "spread": 0.05, "step_size": 1e-3, "log_step": True, "draw": DRAWN, **changed}
    return MEND(MENDConfig(**given), lm)


@cache
def double() -> LM:
    lm = embedded_lm()
    return LM(lm.model.double(), lm.tokenizer, "tiny-gpt2-64")


def rows_of(lm, count):
    return lm.head.encode(
        [(case.requests[0].text, case.requests[0].target_new) for case in statements("train")[:count]]
    )


def prepared(editor, dtype=torch.float32):
    """A network with statistics, no longer the identity."""
    torch.manual_seed(0)
    net = editor.build().to(dtype)
    net.train()
    editor.loss(net, statements("train")[20 : 20 + 4 * editor.config.edits])
    for layer in (layer for transform in net.hypernetwork.transforms.values() for layer in transform.layers):
        torch.nn.init.normal_(layer.up, std=0.05)
        torch.nn.init.normal_(layer.offset, std=0.05)
    return net.eval()


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_in_factors_are_the_gradients_of_the_weights(kind):
    lm = MODELS[kind]()
    rows = rows_of(lm, 3)
    found = gradients(lm, rows, MODULES)
    weights = [lm.parameter(f"{name}.weight").requires_grad_(True) for name in MODULES]
    expected = torch.autograd.grad(row_losses(lm.head.answers(rows, end=True), 3).sum(), weights)
    for name, gradient in zip(MODULES, expected, strict=True):
        dense = found[name].dense()
        torch.testing.assert_close(dense.T if kind == "Conv1D" else dense, gradient, rtol=1e-4, atol=1e-6)
        longest = max(len(row.ids) for row in rows) - 1
        for kept, row in zip(found[name].kept, rows, strict=True):
            assert kept.shape == (longest,) and not kept[len(row.ids) - 1 :].any() and kept[row.start - 1]
    assert same_bits(snapshot(lm), snapshot(MODELS[kind]()))


def test_a_shift_in_factors_is_the_shift_of_the_weight():
    torch.manual_seed(0)
    left, right, x = torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(6, 7, 5)
    dense = left.mT @ right  # (edits, d_out, d_in)
    expected = 1.0 + torch.einsum("erti,eoi->erto", x.view(2, 3, 7, 5), dense).reshape(6, 7, 4)
    torch.testing.assert_close(Shift(left, right).add(x, torch.ones(6, 7, 4)), expected)
    torch.testing.assert_close(Shift(left, right).norms(), dense.flatten(1).norm(dim=1))
    flat = Shift(left, right).add(x.reshape(42, 5), torch.ones(42, 4))  # families that flatten rows and tokens
    torch.testing.assert_close(flat, expected.reshape(42, 4))
    many = Shift(left.repeat(1, 5, 1), right.repeat(1, 5, 1))  # more columns than the matrix has: multiplied out
    torch.testing.assert_close(many.add(x, torch.zeros(6, 7, 4)), 5 * (expected - 1.0), rtol=1e-4, atol=1e-5)


def test_the_meta_gradient_is_that_of_a_functional_copy_of_the_model():
    lm, editor = double(), mend(double())
    net, case = prepared(editor, torch.float64), statements("train")[:1]
    torch.manual_seed(1)
    loss, _ = editor.loss(net, case)
    found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)

    torch.manual_seed(1)
    (episode,) = sample_episodes(case, 1, DRAWN)
    shifts = net(gradients(lm, lm.head.encode(list(episode.support)), MODULES), 1)
    weights = {
        f"{n}.weight": lm.parameter(f"{n}.weight").detach() + (s.left[0].mT @ s.right[0]).T for n, s in shifts.items()
    }

    def logits(pairs, changed):
        out = []
        for pair in pairs:
            (row,) = lm.head.encode([pair])
            ids = torch.tensor([row.ids[:-1]])
            scores = torch.func.functional_call(lm.model, changed, (ids,), {"use_cache": False}).logits[
                0, row.start - 1 :
            ]
            out.append((scores.log_softmax(-1), torch.tensor(row.target)))
        return out

    nll = torch.stack(
        [-scores.gather(1, labels[:, None]).mean() for scores, labels in logits(episode.query, weights)]
    ).mean()
    kls = [
        (before.exp() * (before - after)).sum(-1).mean()
        for (before, _), (after, _) in zip(logits(episode.locality, {}), logits(episode.locality, weights), strict=True)
    ]
    plain = editor.config.edit_weight * nll + editor.config.locality_weight * torch.stack(kls).mean()
    expected = torch.autograd.grad(plain, list(net.parameters()), allow_unused=True)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-9)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("edits", [1, 2])
def test_independent_edits_in_one_batch_are_those_one_at_a_time(edits):
    editor = mend(double(), edits=edits)
    net, cases = prepared(editor, torch.float64), statements("train")[: 3 * edits]
    torch.manual_seed(2)
    together, told = editor.loss(net, cases)
    gradient = torch.autograd.grad(together, net.steps)[0]
    alone = []
    for first in range(0, len(cases), edits):
        torch.manual_seed(2)
        alone.append(editor.loss(net, cases[first : first + edits])[0])
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(torch.stack(alone).mean(), net.steps)[0], rtol=1e-6, atol=1e-9
    )
    assert told["nll"] > 0 and told["kl"] > 0


def test_blocks_below_the_lowest_edited_layer_run_once():
    lm = embedded_lm()
    net = prepared(mend(lm))
    episodes = sample_episodes(statements("train")[:2], 1, DRAWN)
    shifts = net(gradients(lm, lm.head.encode([pair for episode in episodes for pair in episode.support]), MODULES), 2)
    trial = EpisodeEvaluation(BaseModelCache(lm), episodes, lowest=4)
    with shifted(lm, shifts):
        whole = lm.head.answers(trial.rows, end=True)
    calls = []
    handle = lm.module("transformer.h.3.attn").register_forward_hook(lambda *_: calls.append(1))
    found = trial.answers(shifts)
    handle.remove()
    torch.testing.assert_close(found.logits, whole.logits, rtol=1e-4, atol=1e-4)
    assert calls == []


def test_tokens_that_nobody_reads_are_spared_and_change_nothing(monkeypatch):
    lm = double()
    net, episodes = prepared(mend(lm), torch.float64), sample_episodes(statements("train")[:3], 1, DRAWN)
    shifts = net(gradients(lm, lm.head.encode([pair for episode in episodes for pair in episode.support]), MODULES), 3)
    trial = EpisodeEvaluation(BaseModelCache(lm), episodes, lowest=4)
    seen = []
    handles = [
        lm.module(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
        for name in MODULES
    ]
    lean = trial.answers(shifts).logits
    monkeypatch.setattr(LM, "takes_shortcuts", False)
    whole = trial.answers(shifts).logits
    for handle in handles:
        handle.remove()
    lengths = [[len(row.ids) - 1 for row in trial.rows[first : first + 3]] for first in range(0, 9, 3)]
    answers = [sum(len(row.target) for row in trial.rows[first : first + 3]) for first in range(0, 9, 3)]
    real, read, total = 3 * max(map(sum, lengths)), 3 * max(answers), 9 * max(map(max, lengths))
    assert seen == [real, real, read, read] + [total] * 4 and read < real < total
    torch.testing.assert_close(lean, whole)


@pytest.mark.parametrize(
    ("changed", "learned"),
    [
        ({"shared": False}, 10),
        ({"transformed": "inputs"}, 6),
        ({"transformed": "smaller"}, 6),
        ({"learn": "steps"}, 1),
        ({"learn": "nothing"}, 0),
    ],
)
def test_variants_learn_what_they_say(changed, learned):
    editor = mend(embedded_lm(), layers=[5], **changed)
    net = editor.build()
    loss, _ = editor.loss(net.train(), statements("train")[:2])
    if learned:
        loss.backward()
    grown = [name for name, parameter in net.named_parameters() if parameter.grad is not None]
    assert loss.requires_grad == bool(learned) and ("steps" in grown) == bool(learned)
    assert (len(grown) == 1) == (changed.get("learn") == "steps")
    transforms = net.hypernetwork.transforms.items()
    widths = {name: len(low_rank_layers(transform)[0].bias) for name, transform in transforms}
    if changed.get("transformed"):
        assert widths == {"128x512": 128, "512x128": 512 if changed["transformed"] == "inputs" else 128}


@pytest.mark.parametrize("size", ["unit", "loss"])
def test_gradients_are_brought_to_the_size_that_is_asked_for(size):
    """And an edit uses it as training does, whether gradients are remembered or not."""
    lm, editor = double(), mend(double(), size=size)
    found, cases = gradients(lm, rows_of(lm, 4), MODULES), statements("train")[:4]
    losses = row_losses(lm.head.answers(rows_of(lm, 4), end=True), 4)
    for name, gradient in editor._sized(found).items():
        norms = gradient.outputs.norm(dim=(1, 2))
        torch.testing.assert_close(norms, losses.detach() if size == "loss" else torch.ones_like(norms))
        same = torch.nn.functional.cosine_similarity(gradient.outputs.flatten(1), found[name].outputs.flatten(1))
        torch.testing.assert_close(same, torch.ones_like(same))
    net = prepared(editor, torch.float64)
    torch.manual_seed(3)
    remembered, _ = editor.loss(net, cases)
    editor.cache = BaseModelCache(lm)
    torch.manual_seed(3)
    torch.testing.assert_close(editor.loss(net, cases)[0], remembered, rtol=1e-6, atol=1e-9)
    assert editor.identity()["recipe"]["size"] == size
    with pytest.raises(UsageError, match="method.size=large"):
        mend(lm, size="large")


def test_a_checkpoint_edits_like_the_network_that_was_saved(tmp_path):
    lm = embedded_lm()
    editor = trained(mend(lm), tmp_path, steps=3)
    requests = [case.requests[0] for case in statements("test")[:2]]
    edit = editor.edit(requests)
    net = editor.trained()
    again = changed(editor)
    assert same_bits(again.trained().state_dict(), net.state_dict()) and again.trained() is not net
    rows = lm.head.encode([(request.text, request.target_new) for request in requests])
    shifts = net(gradients(lm, rows, MODULES), 1)
    for name in MODULES:
        torch.testing.assert_close(
            edit.stored(lm, f"{name}.weight").T, shifts[name].left[0].T @ shifts[name].right[0], rtol=1e-4, atol=1e-7
        )
    assert 0 < edit.info["shift"] < 1


@pytest.mark.parametrize("size", ["gradient", "loss"])
def test_steps_made_together_are_those_made_alone(tmp_path, size):
    lm = embedded_lm()
    editor = trained(mend(lm, size=size), tmp_path, steps=3)
    requests = [case.requests[0] for case in statements("test")[:6]]
    for batches in ([[request] for request in requests], [requests[:2], requests[2:4], requests[4:]]):
        made = editor.edit_each(batches)
        assert made is not None
        for edit, batch in zip(made, batches, strict=True):
            own = editor.edit(batch)
            assert edit.info["shift"] == pytest.approx(own.info["shift"], rel=1e-4)
            for name in own.updates:
                found, expected = edit.stored(lm, name), own.stored(lm, name)
                assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert editor.edit_each([requests[:1], requests[1:]]) is None


def test_checkpoints_of_another_model_and_damaged_ones_are_refused(tmp_path):
    lm = embedded_lm()
    editor = trained(mend(lm, layers=[4]), tmp_path, steps=2)
    (place,) = [file.parent for file in tmp_path.glob("*/editor.json")]
    other = linear_twin()
    with pytest.raises(MissingError, match="has not been trained for tiny-gpt2-linear"):
        MEND(editor.config, other).trained()
    with pytest.raises(MissingError, match="other weights than tiny-gpt2-linear has"):
        MEND(replace(editor.config, checkpoint=str(place)), other).trained()
    with pytest.raises(MissingError, match="was trained as mend, not as .*/Other"):
        type("Other", (MEND,), {})(replace(editor.config, checkpoint=str(place)), lm).trained()
    with pytest.raises(MissingError, match="holds another network"):
        changed(editor, checkpoint=str(place), rank=4).trained()
    with pytest.raises(MissingError, match="holds no trained editor"):
        changed(editor, checkpoint=str(tmp_path / "nothing")).trained()
    with pytest.raises(MissingError, match="has not been trained"):
        changed(editor, rank=4).trained()
    file = place / checkpoints.TENSORS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(MissingError, match="damaged"):
        changed(editor).trained()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learn": "x"}, "method.learn=x"),
        ({"transformed": "x"}, "method.transformed=x"),
        ({"step_size": 0.0}, "method.step_size=0.0: give a number above 0"),
        ({"part": "x"}, "method.part=x"),
    ],
)
def test_wrong_settings_are_refused(changed, message):
    with pytest.raises(UsageError, match=message):
        mend(embedded_lm(), **changed)


def test_what_a_frozen_model_says_is_remembered_and_changes_nothing():
    lm, second = double(), mend(double())
    first = changed(second, training=TrainingConfig(memory_mib=0))
    net, cases = prepared(first, torch.float64), statements("train")[:3]
    cache = second.cache
    calls = []
    for part in (cases[:2], cases[1:], cases):  # parts of batches are there already, in other paddings
        torch.manual_seed(4)
        expected, told = first.loss(net, part)
        torch.manual_seed(4)
        found, again = second.loss(net, part)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert again["es"] == told["es"] and cache.used > 0
    used = cache.used
    handle = lm.module("transformer.h.0.attn").register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(4)
    second.loss(net, cases)
    handle.remove()
    assert calls == [] and cache.used == used
