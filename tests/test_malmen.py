"""MALMEN: the least squares, the two steps of its meta-gradient, chunks, and what a short training and a checkpoint
are good for.
"""

from __future__ import annotations

import random
from functools import cache, partial
from typing import Any

import pytest
import torch
from embedded import embedded_lm, linear_twin, same_bits, snapshot
from learners import changed, low_rank_layers, statements, trained

from edit_cli.editors.meta.base import TrainingConfig
from edit_cli.editors.meta.base_model_cache import BaseModelCache
from edit_cli.editors.meta.episodes import EpisodeConfig, sample_episodes
from edit_cli.editors.meta.factored_gradients import DenseShift, gradients, shifted
from edit_cli.editors.meta.malmen import MALMEN, MALMENConfig, MalmenNet, least_squares, meta_gradient
from edit_cli.edits.edit import WeightDelta
from edit_cli.errors import UsageError
from edit_cli.lm.model import LM
from edit_cli.training.loop import Training

DRAWN = EpisodeConfig(outer="any", locality=["random", "same_relation"])
MODULES = [f"transformer.h.{layer}.mlp.c_proj" for layer in (4, 5)]


def malmen(lm: LM, **changed) -> MALMEN:
    given = {
        "layers": [4, 5],
        "edits": 6,
        "rank": 8,
        "spread": 0.05,
        "step_size": 1e-2,
        "log_step": True,
        "draw": DRAWN,
        **changed,
    }
    return MALMEN(MALMENConfig(**given), lm)


@cache
def double() -> LM:
    lm = embedded_lm()
    return LM(lm.model.double(), lm.tokenizer, "tiny-gpt2-64")


def prepared(editor: MALMEN, dtype=torch.float64) -> MalmenNet:
    """A network with statistics, no longer the identity."""
    torch.manual_seed(0)
    net = editor.build().to(dtype).train()
    editor.loss(net, statements("train")[20 : 20 + editor.config.edits])
    for layer in low_rank_layers(net):
        torch.nn.init.normal_(layer.up, std=0.05)
        torch.nn.init.normal_(layer.offset, std=0.05)
        torch.nn.init.normal_(layer.scale, mean=1.0, std=0.1)
    torch.nn.init.normal_(net.log_ridges, std=0.3)
    return net


def normal_equation(keys, changes, log_ridge):
    """Sᵀ (d_in, d_out) as the paper writes it, differentiable."""
    return torch.linalg.solve(
        keys.T @ keys + log_ridge.exp() * torch.eye(keys.shape[1], dtype=keys.dtype), keys.T @ changes
    )


def plain_loss(editor: MALMEN, net: MalmenNet, cases):
    """The meta-loss in one graph, from the network's parameters to the answers of a functional copy of the model."""
    lm, episodes = editor.lm, sample_episodes(cases, 1, editor.config.draw)
    weights = {}
    rows = lm.head.encode([pair for episode in episodes for pair in episode.support])
    for number, (name, gradient) in enumerate(gradients(lm, rows, MODULES).items()):
        at = [(place, column) for place, row in enumerate(rows) for column in range(row.start - 1, len(row.ids) - 1)]
        u, delta = (
            torch.stack([part[place, column] for place, column in at]) for part in (gradient.inputs, gradient.outputs)
        )
        transform = net.hypernetwork.transform(next(iter(net.hypernetwork.members)))
        assert transform.normalizer is not None
        z = transform.normalizer(torch.cat([u, delta], -1))
        for layer in low_rank_layers(transform):
            z = (
                layer.scale[number] * (z @ layer.down.T @ layer.up.T + layer.bias).clamp(min=0)
                + layer.offset[number]
                + z
            )
        better, moved = z[:, : u.shape[1]], z[:, u.shape[1] :]
        changes = -net.steps[number].exp() * (u * better).sum(-1, keepdim=True) * moved
        weights[f"{name}.weight"] = lm.parameter(f"{name}.weight").detach() + normal_equation(
            u, changes, net.log_ridges[number]
        )

    def scores(pair, changed):
        (row,) = lm.head.encode([pair])
        found = torch.func.functional_call(
            lm.model, changed, (torch.tensor([row.ids[:-1]]),), {"use_cache": False}
        ).logits
        return found[0, row.start - 1 :].log_softmax(-1), torch.tensor(row.target)

    nll, kl = [], []
    for episode in episodes:
        for pair in episode.query:
            found, labels = scores(pair, weights)
            nll.append(-found.gather(1, labels[:, None]).mean())
        for pair in episode.locality:
            before, after = scores(pair, {})[0], scores(pair, weights)[0]
            kl.append((before.exp() * (before - after)).sum(-1).mean())
    return editor.config.edit_weight * torch.stack(nll).mean() + editor.config.locality_weight * torch.stack(kl).mean()


def test_the_two_steps_give_the_gradient_of_the_whole_graph():
    editor = malmen(double(), prompts=4, chunk=5)
    net, cases = prepared(editor), statements("train")[:6]
    net.eval()
    torch.manual_seed(1)
    stand_in, told = editor.loss(net, cases)
    found = torch.autograd.grad(stand_in, list(net.parameters()))
    torch.manual_seed(1)
    plain = plain_loss(editor, net, cases)
    expected = torch.autograd.grad(plain, list(net.parameters()))
    assert told["loss"] == pytest.approx(float(plain.detach()), rel=1e-9)
    names = [name for name, _ in net.named_parameters()]
    for name, ours, theirs in zip(names, found, expected, strict=True):
        assert theirs.abs().max() > 0, name
        torch.testing.assert_close(
            ours,
            theirs,
            rtol=1e-6,
            atol=1e-12 + 1e-7 * float(theirs.abs().max()),
            msg=partial("{}: {}".format, name),
        )


@pytest.mark.parametrize("tokens", [5, 30])
def test_least_squares_and_its_gradients_are_those_of_the_closed_form(tokens):
    """Few tokens are solved in the n × n form, many in the d × d one."""
    torch.manual_seed(0)
    keys, changes = (
        torch.randn(tokens, 18, dtype=torch.float64),
        torch.randn(tokens, 4, dtype=torch.float64, requires_grad=True),
    )
    log_ridge, towards = (
        torch.tensor(0.4, dtype=torch.float64, requires_grad=True),
        torch.randn(4, 18, dtype=torch.float64),
    )
    shift = normal_equation(keys, changes, log_ridge).T
    solved = least_squares(keys, changes, float(log_ridge.exp()))
    torch.testing.assert_close(solved.dense(), shift)
    to_changes, to_ridge = meta_gradient(solved, keys, towards)
    expected = torch.autograd.grad((shift * towards).sum(), [changes, log_ridge])
    torch.testing.assert_close(to_changes, expected[0])
    torch.testing.assert_close(to_ridge, expected[1])
    step = 1e-6  # and by differences
    moved = least_squares(keys, changes, float(log_ridge.exp()) * (1 + step)).dense()
    assert float(((moved - shift) * towards).sum() / step) == pytest.approx(float(to_ridge), rel=1e-4)


def test_chunks_change_nothing():
    lm, cases = double(), statements("train")[:6]
    found = []
    for sizes in ({"prompts": 32, "chunk": 1024}, {"prompts": 2, "chunk": 3}):
        editor = malmen(lm, tokens="all", **sizes)
        net = prepared(editor)
        torch.manual_seed(1)
        stand_in, told = editor.loss(net, cases)
        normalizer = next(iter(net.hypernetwork.transforms.values())).normalizer
        found.append((torch.autograd.grad(stand_in, list(net.parameters())), told, normalizer.mean))
    (one, told, mean), (other, again, same_mean) = found
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9 + 1e-7 * float(ours.abs().max()))
    assert told == pytest.approx(again, rel=1e-6)
    torch.testing.assert_close(mean, same_mean)


def test_the_facts_that_are_asked_stand_for_all(monkeypatch):
    """Asked one after another, they have the loss and the gradient of all of them on average; validation asks every
    one.
    """
    lm, cases = double(), statements("train")[:6]
    plain, sparing = malmen(lm), malmen(lm, asked=2)
    net = prepared(plain)
    monkeypatch.setattr(net.hypernetwork, "take_in", lambda *_: None)

    def found(editor):
        torch.manual_seed(1)
        stand_in, told = editor.loss(net, cases)
        return torch.autograd.grad(stand_in, list(net.parameters())), told["loss"]

    gradient, loss = found(plain)
    parts = []
    for first in (0, 2, 4):
        monkeypatch.setattr(
            random.Random, "sample", lambda _, episodes, number, first=first: episodes[first : first + number]
        )
        parts.append(found(sparing))
    assert sum(part for _, part in parts) / 3 == pytest.approx(loss, rel=1e-9) and parts[0][1] != pytest.approx(
        loss, rel=1e-3
    )
    for whole, *some in zip(gradient, *(part for part, _ in parts), strict=True):
        torch.testing.assert_close(sum(some) / 3, whole, rtol=1e-6, atol=1e-9 + 1e-7 * float(whole.abs().max()))
    net.eval()
    assert found(sparing)[1] == pytest.approx(loss, rel=1e-12)


def test_activations_of_the_network_live_for_one_chunk():
    net = prepared(malmen(embedded_lm()), torch.float32)
    keys, deltas = torch.randn(40, 512), torch.randn(40, 128)
    changes = net.changes(0, keys, deltas, 8)
    at_once: list[int] = []
    layer = low_rank_layers(net.hypernetwork.transform("512x128"))[0]
    handle = layer.register_forward_pre_hook(lambda _, args: at_once.append(len(args[0])))

    def kept_back(tensor):
        at_once.append(-1)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(kept_back, lambda tensor: tensor):
        net.changes(0, keys, deltas, 8)
    kept = at_once.count(-1)  # inputs of the chunks: not one tensor of an activation
    assert kept <= 3 * 5 and [size for size in at_once if size > 0] == [8] * 5
    at_once.clear()
    changes.sum().backward()
    handle.remove()
    assert at_once == [8] * 5  # each is run again on the way back


@pytest.mark.parametrize("make", [embedded_lm, linear_twin])
def test_keys_and_gradients_are_those_of_the_answers_tokens(make):
    lm = make()
    editor = malmen(lm, prompts=2)
    requests = [case.requests[0] for case in statements("train")[:5]]
    untouched = snapshot(lm)
    found = editor._tokens(requests, BaseModelCache(lm))
    rows = lm.head.encode([(request.text, request.target_new) for request in requests])
    number = sum(len(row.target) for row in rows)
    whole = gradients(lm, rows, MODULES)
    for (u, delta), name in zip(found, MODULES, strict=True):
        assert u.shape == (number, 512) and delta.shape == (number, 128)
        expected = torch.cat([whole[name].outputs[i, row.start - 1 : len(row.ids) - 1] for i, row in enumerate(rows)])
        torch.testing.assert_close(
            delta.norm(dim=1).sort().values, expected.norm(dim=1).sort().values, rtol=1e-4, atol=1e-6
        )
    (everything, _), _ = malmen(lm, tokens="all")._tokens(requests, BaseModelCache(lm))
    assert len(everything) > number
    (below, deltas), (top, _) = malmen(lm, tokens="subject", prompts=2)._tokens(requests, BaseModelCache(lm))
    # nothing that follows asks the last block about other tokens
    assert len(below) == number + len(requests) and len(top) == number
    at = [row.token_at(request.subject_span[1] - 1) for row, request in zip(rows, requests, strict=True)]
    theirs = torch.stack([whole[MODULES[0]].outputs[row, place] for row, place in enumerate(at)])
    assert all((deltas - one).norm(dim=1).min() < 1e-4 * one.norm() for one in theirs)
    assert same_bits(snapshot(lm), untouched)


def test_a_dense_shift_is_a_changed_weight():
    for lm in (embedded_lm(), linear_twin()):
        torch.manual_seed(0)
        name = MODULES[0]
        change = 0.1 * torch.randn(lm.weight(name).shape)
        rows = lm.head.encode([("The capital is", "blue")])
        with shifted(lm, {name: DenseShift(change)}):
            found = lm.head.answers(rows).logits
        stored = change if lm.module(name).weight.shape == change.shape else change.T
        with lm.edited(WeightDelta({f"{name}.weight": stored.contiguous()})):
            torch.testing.assert_close(found, lm.head.answers(rows).logits, rtol=1e-4, atol=1e-4)
        assert DenseShift(change).norms().item() == pytest.approx(float(change.norm()))


def test_a_short_training_learns(tmp_path):
    options = TrainingConfig(steps=12, lr=3e-3, clip=1.0, validate_every=12, validation_edits=2, trackers=[])
    editor = malmen(embedded_lm(), edits=20, step_size=3e-3, step_lr=5e-2, edit_weight=0.3, training=options)
    cases, held_out = statements("train")[:120], statements("validation")[:40]
    torch.manual_seed(0)
    net = editor.build().train()
    editor.loss(net, cases[:20])
    with torch.no_grad():
        _, before = editor.loss(net.eval(), held_out)
    lines: list[dict[str, Any]] = []
    done = Training(editor, cases, held_out, tmp_path, "test", lines.append).run()
    assert done.best["loss"] < 0.8 * before["loss"] and done.best["es"] > before["es"]
    assert lines[-1]["kind"] == "validation" and 0 < lines[-1]["shift"] < 2


def test_a_checkpoint_edits_all_at_once_and_comes_off_exactly(tmp_path):
    lm = embedded_lm()
    editor = trained(malmen(lm, edits=10), tmp_path, steps=2)
    requests = [case.requests[0] for case in statements("test")[:30]]
    untouched = snapshot(lm)
    edit = editor.edit(requests)
    assert same_bits(snapshot(lm), untouched)
    again = changed(editor).edit(requests)
    assert same_bits(edit.state()[0], again.state()[0])
    net = editor.trained()
    tokens = editor._tokens(requests, BaseModelCache(lm))
    for number, (name, (u, delta)) in enumerate(zip(MODULES, tokens, strict=True)):
        expected = normal_equation(
            u.double(), net.changes(number, u, delta, 7).double(), net.log_ridges[number].double()
        )
        torch.testing.assert_close(edit.stored(lm, f"{name}.weight").double(), expected, rtol=1e-3, atol=1e-6)
    pairs = [(request.text, request.target_new) for request in requests]
    before = [score.nll for score in lm.loglikelihood(pairs)]
    with lm.edited(edit):
        assert sum(score.nll for score in lm.loglikelihood(pairs)) < sum(before)
    assert same_bits(snapshot(lm), untouched) and [score.nll for score in lm.loglikelihood(pairs)] == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": "x"}, "method.tokens=x: choose answer, subject or all"),
        ({"ridge": 0.0}, "method.ridge=0.0"),
        ({"chunk": 0}, "method.chunk=0"),
        ({"asked": -1}, "method.asked=-1"),
        ({"part": "x"}, "method.part=x"),
    ],
)
def test_wrong_settings_are_refused(changed, message):
    with pytest.raises(UsageError, match=message):
        malmen(embedded_lm(), **changed)
