"""MEND: gradients in factors, the meta-gradient, independent edits in one batch, and what a checkpoint is good for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from embedded import embedded_lm, linear_twin, same_bits, snapshot
from learners import brief, keep_trained, statements

from edit_cli import checkpoints
from edit_cli.editors.gradients import Gradient, Shift, gradients, shifted
from edit_cli.editors.hypernetwork import Hypernetwork, Normaliser
from edit_cli.editors.mend import MEND
from edit_cli.editors.meta_batch import DrawOptions, Trial, draw
from edit_cli.editors.passes import row_losses
from edit_cli.errors import MissingError, UsageError
from edit_cli.lm.model import LM
from edit_cli.parallel import ALONE

DRAWN = DrawOptions("any", ["random", "same_relation"])
MODULES = [f"transformer.h.{layer}.mlp.{name}" for layer in (4, 5) for name in ("c_fc", "c_proj")]
MODELS = {"Conv1D": embedded_lm, "Linear": linear_twin}


def mend(**changed) -> MEND:
    given = {"layers": [4, 5], "rank": 8, "spread": 0.05, "step_size": 1e-3, "log_step": True, "draw": DRAWN, **changed}
    return MEND(**given)


@cache
def double() -> LM:
    lm = embedded_lm()
    return LM(lm.model.double(), lm.tokenizer, "tiny-gpt2-64")


def rows_of(lm, count):
    return lm.head.encode([(case.requests[0].text, case.requests[0].target_new) for case in statements("train")[:count]])


def prepared(editor, lm, dtype=torch.float32, stir=True):
    """A network with statistics, no longer the identity."""
    torch.manual_seed(0)
    net = editor.build(lm).to(dtype)
    net.train()
    editor.loss(net, lm, statements("train")[20 : 20 + 4 * editor.edits])
    if stir:
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
    lm, editor = double(), mend()
    net, case = prepared(editor, lm, torch.float64), statements("train")[:1]
    torch.manual_seed(1)
    loss, _ = editor.loss(net, lm, case)
    found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)

    torch.manual_seed(1)
    (lesson,) = draw(case, 1, DRAWN)
    shifts = net(gradients(lm, lm.head.encode(list(lesson.inner)), MODULES), 1)
    weights = {f"{n}.weight": lm.parameter(f"{n}.weight").detach() + (s.left[0].mT @ s.right[0]).T for n, s in shifts.items()}

    def logits(pairs, changed):
        out = []
        for pair in pairs:
            (row,) = lm.head.encode([pair])
            ids = torch.tensor([row.ids[:-1]])
            scores = torch.func.functional_call(lm.model, changed, (ids,), {"use_cache": False}).logits[0, row.start - 1 :]
            out.append((scores.log_softmax(-1), torch.tensor(row.target)))
        return out

    nll = torch.stack([-scores.gather(1, labels[:, None]).mean() for scores, labels in logits(lesson.outer, weights)]).mean()
    kls = [
        (before.exp() * (before - after)).sum(-1).mean()
        for (before, _), (after, _) in zip(logits(lesson.local, {}), logits(lesson.local, weights), strict=True)
    ]
    plain = editor.edit_weight * nll + editor.locality_weight * torch.stack(kls).mean()
    expected = torch.autograd.grad(plain, list(net.parameters()), allow_unused=True)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-9)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("edits", [1, 2])
def test_independent_edits_in_one_batch_are_those_one_at_a_time(edits):
    lm, editor = double(), mend(edits=edits)
    net, cases = prepared(editor, lm, torch.float64), statements("train")[: 3 * edits]
    torch.manual_seed(2)
    together, told = editor.loss(net, lm, cases)
    gradient = torch.autograd.grad(together, net.steps)[0]
    alone = []
    for first in range(0, len(cases), edits):
        torch.manual_seed(2)
        alone.append(editor.loss(net, lm, cases[first : first + edits])[0])
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient, torch.autograd.grad(torch.stack(alone).mean(), net.steps)[0], rtol=1e-6, atol=1e-9)
    assert told["nll"] > 0 and told["kl"] > 0


def test_blocks_below_the_lowest_edited_layer_run_once():
    lm, editor = embedded_lm(), mend()
    net = prepared(editor, lm)
    lessons = draw(statements("train")[:2], 1, DRAWN)
    shifts = net(gradients(lm, lm.head.encode([pair for lesson in lessons for pair in lesson.inner]), MODULES), 2)
    trial = Trial(lm, lessons, lowest=4)
    with shifted(lm, shifts):
        whole = lm.head.answers(trial.rows, end=True)
    calls = []
    handle = lm.module("transformer.h.3.attn").register_forward_hook(lambda *_: calls.append(1))
    found = trial.answers(shifts)
    handle.remove()
    torch.testing.assert_close(found.logits, whole.logits, rtol=1e-4, atol=1e-4)
    assert calls == []


def test_tokens_that_nobody_reads_are_spared_and_change_nothing(monkeypatch):
    lm, editor = double(), mend()
    net, lessons = prepared(editor, lm, torch.float64), draw(statements("train")[:3], 1, DRAWN)
    shifts = net(gradients(lm, lm.head.encode([pair for lesson in lessons for pair in lesson.inner]), MODULES), 3)
    trial = Trial(lm, lessons, lowest=4)
    seen = []
    handles = [lm.module(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel())) for name in MODULES]
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


def test_a_fresh_network_gives_back_normalised_factors_and_can_learn():
    torch.manual_seed(0)
    net = Hypernetwork([(4, 3), (4, 3)], rank=5, spread=1.0)
    gradient = [Gradient(torch.randn(2, 6, 4), torch.randn(2, 6, 3)) for _ in range(2)]
    gradient[0].outputs[1, 4:] = 0  # padding
    found = net(gradient)
    rows = torch.cat([torch.cat([g.inputs[g.kept], g.outputs[g.kept]], -1) for g in gradient])
    expected = (rows - rows.mean(0)) / (rows.std(0) + 1e-7)
    torch.testing.assert_close(torch.cat([found[0][0][gradient[0].kept], found[0][1][gradient[0].kept]], -1), expected[:10], rtol=1e-4, atol=1e-5)
    assert found[0][0][1, 4:].abs().max() == 0 and found[0][1][1, 4:].abs().max() == 0
    sum(part.square().sum() for pair in found for part in pair).backward()
    assert all(layer.up.grad.abs().max() > 0 for layer in net.transforms["4x3"].layers)


def test_running_statistics_do_not_depend_on_how_rows_come():
    torch.manual_seed(0)
    rows = torch.randn(50, 6) * 3 + 1
    parts, whole = Normaliser(6), Normaliser(6)
    for part in rows.split(7):
        parts.take_in(part, ALONE)
    whole.take_in(rows, ALONE)
    torch.testing.assert_close(parts(rows), whole(rows))
    torch.testing.assert_close(whole(rows), (rows - rows.mean(0)) / rows.std(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="train it first"):
        Normaliser(6)(rows)


@pytest.mark.parametrize(
    ("changed", "learnt"),
    [({"shared": False}, 10), ({"transformed": "inputs"}, 6), ({"transformed": "smaller"}, 6), ({"learn": "steps"}, 1), ({"learn": "nothing"}, 0)],
)
def test_variants_learn_what_they_say(changed, learnt):
    lm, editor = embedded_lm(), mend(layers=[5], **changed)
    net = editor.build(lm)
    loss, _ = editor.loss(net.train(), lm, statements("train")[:2])
    if learnt:
        loss.backward()
    grown = [name for name, parameter in net.named_parameters() if parameter.grad is not None]
    assert loss.requires_grad == bool(learnt) and ("steps" in grown) == bool(learnt)
    assert (len(grown) == 1) == (changed.get("learn") == "steps")
    widths = {name: len(transform.layers[0].bias) for name, transform in net.hypernetwork.transforms.items()}
    if changed.get("transformed"):
        assert widths == {"128x512": 128, "512x128": 512 if changed["transformed"] == "inputs" else 128}


def test_lessons_are_drawn_by_seed_and_case_alone():
    cases = statements("train")[:6]
    torch.manual_seed(3)
    lessons = draw(cases, 2, DRAWN)
    torch.manual_seed(3)
    assert draw(cases[2:4], 2, DRAWN) == lessons[1:2]
    for lesson, pair in zip(lessons, (cases[:2], cases[2:4], cases[4:]), strict=True):
        assert [inner for inner in lesson.inner] == [(case.requests[0].text, case.requests[0].target_new) for case in pair]
        assert len(lesson.outer) == 2 and len(lesson.local) == 4
        for number, case in enumerate(pair):
            groups = [{p.group for p in case.probes if (p.prompt, p.target) == asked} for asked in lesson.local[2 * number : 2 * number + 2]]
            assert "random" in groups[0] and "same_relation" in groups[1]
    seen = draw(cases, 1, DrawOptions("seen", []))
    assert all(any(p.group == "seen" and p.prompt == lesson.outer[0][0] for p in case.probes) for lesson, case in zip(seen, cases, strict=True))
    with pytest.raises(UsageError, match="method.edits"):
        draw(cases, 7, DRAWN)


def test_swapped_lessons_edit_one_wording_and_ask_in_another():
    cases, inner, answers = statements("train")[:20], set(), set()
    for seed in range(5):
        torch.manual_seed(seed)
        for lesson, case in zip(draw(cases, 1, DrawOptions("swapped", [])), cases, strict=True):
            wordings = {case.requests[0].text, *(probe.prompt for probe in case.probes if probe.kind == "paraphrase")}
            ((edited, new),), ((asked, wanted),) = lesson.inner, lesson.outer
            assert {edited, asked} <= wordings and edited != asked and new == wanted != case.requests[0].target_true
            inner.add(edited == case.requests[0].text)
            answers.add(new == case.requests[0].target_new)
    assert inner == answers == {True, False}


def test_the_same_answer_is_drawn_where_there_is_one():
    cases = statements("train")[:40]
    lessons = draw(cases, 1, DrawOptions("any", ["same_answer"]))
    told = [({p.target for p in case.probes if p.group == "same_relation"}, case.requests[0].target_true) for case in cases]
    for (answers, true), lesson, case in zip(told, lessons, cases, strict=True):
        ((prompt, answer),) = lesson.local
        assert any((p.prompt, p.target, p.group) == (prompt, answer, "same_relation") for p in case.probes)
        assert (answer == true) == (true in answers)
    assert {true in answers for answers, true in told} == {True, False}


@pytest.mark.parametrize("size", ["unit", "loss"])
def test_gradients_are_brought_to_the_size_that_is_asked_for(size):
    """And an edit uses it as training does, whether gradients are remembered or not."""
    lm, editor = double(), mend(size=size)
    found, cases = gradients(lm, rows_of(lm, 4), MODULES), statements("train")[:4]
    losses = row_losses(lm.head.answers(rows_of(lm, 4), end=True), 4)
    for name, gradient in editor._sized(found).items():
        norms = gradient.outputs.norm(dim=(1, 2))
        torch.testing.assert_close(norms, losses.detach() if size == "loss" else torch.ones_like(norms))
        same = torch.nn.functional.cosine_similarity(gradient.outputs.flatten(1), found[name].outputs.flatten(1))
        torch.testing.assert_close(same, torch.ones_like(same))
    net = prepared(editor, lm, torch.float64)
    torch.manual_seed(3)
    remembered, _ = editor.loss(net, lm, cases)
    editor.training.memory_mib = 0
    editor.scratch(lm).pop("memory")
    torch.manual_seed(3)
    torch.testing.assert_close(editor.loss(net, lm, cases)[0], remembered, rtol=1e-6, atol=1e-9)
    assert mend(size=size).recipe()["size"] == size and "size" not in mend().recipe()
    with pytest.raises(UsageError, match="method.size=large"):
        mend(size="large")


def test_a_checkpoint_edits_like_the_network_that_was_saved(tmp_path):
    lm, editor = embedded_lm(), brief(mend(), tmp_path, steps=3)
    keep_trained(editor, lm, tmp_path)
    requests = [case.requests[0] for case in statements("test")[:2]]
    edit = editor.edit(lm, requests)
    net = editor.trained(lm)
    again = replace(editor)
    assert same_bits(again.trained(lm).state_dict(), net.state_dict()) and again.trained(lm) is not net
    rows = lm.head.encode([(request.text, request.target_new) for request in requests])
    shifts = net(gradients(lm, rows, MODULES), 1)
    for name in MODULES:
        torch.testing.assert_close(edit.stored(lm, f"{name}.weight").T, shifts[name].left[0].T @ shifts[name].right[0], rtol=1e-4, atol=1e-7)
    assert 0 < edit.info["shift"] < 1


def test_checkpoints_of_another_model_and_damaged_ones_are_refused(tmp_path):
    lm, editor = embedded_lm(), brief(mend(layers=[4]), tmp_path, steps=2)
    keep_trained(editor, lm, tmp_path)
    (place,) = [file.parent for file in tmp_path.glob("*/editor.json")]
    other = linear_twin()
    with pytest.raises(MissingError, match="has not been trained for tiny-gpt2-linear"):
        editor.trained(other)
    with pytest.raises(MissingError, match="other weights than tiny-gpt2-linear has"):
        replace(editor, checkpoint=str(place)).trained(other)
    with pytest.raises(MissingError, match="holds another network"):
        replace(editor, checkpoint=str(place), rank=4).trained(lm)
    with pytest.raises(MissingError, match="holds no trained editor"):
        replace(editor, checkpoint=str(tmp_path / "nothing")).trained(lm)
    with pytest.raises(MissingError, match="has not been trained"):
        replace(editor, rank=4).trained(lm)
    file = place / checkpoints.TENSORS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(MissingError, match="damaged"):
        replace(editor).trained(lm)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"learn": "x"}, "method.learn=x"), ({"transformed": "x"}, "method.transformed=x"), ({"step_size": 0.0}, "must be above 0"), ({"part": "x"}, "method.part=x")],
)
def test_wrong_settings_are_refused(changed, message):
    with pytest.raises(UsageError, match=message):
        mend(**changed).build(embedded_lm())


def test_what_a_frozen_model_says_is_remembered_and_changes_nothing():
    lm, first, second = double(), mend(), mend()
    first.training.memory_mib = 0
    net, cases = prepared(first, lm, torch.float64), statements("train")[:3]
    memory = second.memory(lm)
    calls = []
    for part in (cases[:2], cases[1:], cases):  # parts of batches are there already, in other paddings
        torch.manual_seed(4)
        expected, told = first.loss(net, lm, part)
        torch.manual_seed(4)
        found, again = second.loss(net, lm, part)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert again["es"] == told["es"] and memory.used > 0
    used = memory.used
    handle = lm.module("transformer.h.0.attn").register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(4)
    second.loss(net, lm, cases)
    handle.remove()
    assert calls == [] and memory.used == used
