"""KE: the update beside a plain computation, the bound and its multiplier, and what a checkpoint is good for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from embedded import embedded_lm, linear_twin, same_bits, snapshot
from families import tiny_lm
from learners import brief, keep_trained, statements

from edit_cli.editors.meta.base import TrainingOptions
from edit_cli.editors.meta.episodes import DrawOptions, draw
from edit_cli.editors.meta.factored_gradients import gradients
from edit_cli.editors.meta.ke import KE, BoundOptions, climbing
from edit_cli.editors.passes import row_losses
from edit_cli.errors import MissingError, UsageError
from edit_cli.lm.model import LM
from edit_cli.requests import Case, EditRequest, Probe

DRAWN = DrawOptions("any", ["random", "same_relation"])
MODULES = [f"transformer.h.{layer}.mlp.{name}" for layer in (4, 5) for name in ("c_fc", "c_proj")]


def ke(**changed) -> KE:
    small = {"layers": [4, 5], "hidden": 8, "width": 16, "inner": 8, "scale": 100.0, "draw": DRAWN}
    return KE(**{**small, "training": TrainingOptions(edits=4, lr=3e-3), **changed})


@cache
def double() -> LM:
    lm = embedded_lm()
    return LM(lm.model.double(), lm.tokenizer, "tiny-gpt2-64")


def requests(count: int, split: str = "test") -> list[EditRequest]:
    return [case.requests[0] for case in statements(split)[:count]]


def rows_of(lm, wanted):
    return lm.head.encode([(request.text, request.target_new) for request in wanted])


def plain_weight(layer: torch.nn.Module) -> torch.Tensor:
    """g v / ‖v‖ of a weight-normalised layer, row by row."""
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    return g * v / v.norm(dim=1, keepdim=True)


@torch.no_grad()
def by_hand(net, lm: LM, request: EditRequest, scale: float) -> dict[str, torch.Tensor]:
    """ΔW (d_out, d_in) with dense masks, a dense gradient, and an LSTM that reads token by token."""
    ids = torch.tensor(lm.tokenizer(f"{request.target_true} >> {request.target_new} || {request.text}")["input_ids"])
    words, ends = net.words.weight[ids], []
    for suffix, order in (("", words), ("_reverse", words.flip(0))):
        w, r, b, c = (
            getattr(net.lstm, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        state = cell = torch.zeros(net.lstm.hidden_size, dtype=torch.float64)
        for word in order:
            i, f, g, o = (w @ word + b + r @ state + c).chunk(4)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cell.tanh()
        ends.append(state)
    text = torch.tanh(net.text.weight @ torch.cat(ends) + net.text.bias)
    weights = [lm.parameter(f"{name}.weight").requires_grad_(True) for name in MODULES]
    with torch.enable_grad():
        loss = row_losses(lm.head.answers(rows_of(lm, [request]), end=True), 1).sum()
        found = torch.autograd.grad(loss, weights)
    changes = {}
    for name, gradient, own in zip(MODULES, found, net.own, strict=True):
        lm.parameter(f"{name}.weight").requires_grad_(False)
        first, _, last = own
        out = plain_weight(last) @ torch.tanh(plain_weight(first) @ text + first.bias) + last.bias
        n, m = gradient.shape  # a Conv1D stores (d_in, d_out)
        gamma_a, alpha, gamma_b, beta, eta = out.split([n, m, n, m, 1])
        a, b = torch.outer(alpha.softmax(0), gamma_a), torch.outer(beta.softmax(0), gamma_b)
        changes[name] = scale * eta.sigmoid() * (gradient.T * a + b)
    return changes


def test_the_update_is_that_of_dense_masks_and_gradients():
    lm, editor, wanted = double(), ke(), requests(3)
    torch.manual_seed(0)
    net = editor.build(lm).double().eval()
    shifts = net(gradients(lm, rows_of(lm, wanted), MODULES), *editor.read(lm, wanted, {}))
    for number, request in enumerate(wanted):  # padded beside longer ones, and alone
        for name, change in by_hand(net, lm, request, 100.0).items():
            torch.testing.assert_close(
                shifts[name].left[number].T @ shifts[name].right[number], change, rtol=1e-8, atol=1e-12
            )


def test_an_edit_of_several_facts_is_the_sum_and_small(tmp_path):
    lm, wanted = embedded_lm(), requests(2)
    editor = trained(tmp_path, lm)
    edit = editor.edit(lm, wanted)
    tokens = sum(len(row.ids) - 1 for row in rows_of(lm, wanted))
    for name, update in edit.updates.items():  # a column for each token that the answer depends on, and B
        assert update.rank == 4 if ".5." in name else 4 < update.rank <= tokens + 2
    parts = [editor.edit(lm, [request]) for request in wanted]
    for name in edit.updates:
        torch.testing.assert_close(
            edit.stored(lm, name), sum(part.stored(lm, name) for part in parts), rtol=1e-4, atol=1e-6
        )


def test_prompts_of_the_other_facts_of_a_batch_must_stay():
    """As published: of a batch one fact is edited, and the others are its constraint; validation takes each fact."""
    editor, cases = ke(others=3), statements("train")[:8]
    assert (editor.cases_per_edit, editor.cases_per_trial) == (4, 1)
    torch.manual_seed(0)
    edited, lessons = editor._lessons(cases, 4)
    torch.manual_seed(0)
    plain = draw([cases[0], cases[4]], 1, editor.draw)
    assert edited == [cases[0], cases[4]]
    for lesson, drawn, first in zip(lessons, plain, (0, 4), strict=True):
        others = [case.requests[0] for case in cases[first + 1 : first + 4]]
        assert lesson.inner == lesson.outer == drawn.inner
        assert lesson.local == (*drawn.local, *((request.text, request.target_true) for request in others))
    lm = embedded_lm()
    net = editor.build(lm)
    assert editor.loss(net.train(), lm, cases)[1]["kl"] >= 0
    assert editor.loss(net.eval(), lm, cases[:3])[1]["shift"] > 0
    assert "others" not in ke().recipe() and editor.recipe()["others"] == 3  # what was trained without is found
    with pytest.raises(UsageError, match="method.others=-1"):
        ke(others=-1)


def test_it_can_begin_as_a_step_down_the_gradient():
    lm, wanted = embedded_lm(), requests(2)
    found = gradients(lm, rows_of(lm, wanted), MODULES)
    editor = ke(step_size=0.3, scale=2.0)
    net = editor.build(lm).eval()
    texts = editor.read(lm, wanted, {})
    for name, shift in net(found, *texts).items():
        for number in range(2):
            expected = -0.3 * found[name].outputs[number].T @ found[name].inputs[number]
            torch.testing.assert_close(shift.left[number].T @ shift.right[number], expected, rtol=1e-4, atol=1e-7)


def test_the_multiplier_climbs_where_the_bound_is_broken_and_stays_above_zero():
    multiplier = torch.tensor(2.0, requires_grad=True)
    value = climbing(multiplier) * (torch.tensor(0.7) - 0.1)
    value.backward()
    assert value.item() == pytest.approx(1.2) and multiplier.grad.item() == pytest.approx(-0.6)  # descending, it climbs
    lm, editor = embedded_lm(), ke(layers=[5])
    net = editor.build(lm).train()
    cases = statements("train")[:2]
    for bound, way in ((-1.0, 1), (50.0, -1)):
        net.bound.fill_(bound)
        with torch.no_grad():
            net.multiplier.fill_(1.0)
        (group,) = [group for group in editor.groups(net) if group.get("lr") == 0.1]
        optimiser = torch.optim.SGD(group["params"], lr=0.1)
        net.zero_grad()
        loss, told = editor.loss(net, lm, cases)
        loss.backward()
        optimiser.step()
        editor.after_step(net)
        expected = max(0.0, 1.0 + 0.1 * (told["kl"] - bound))
        assert net.multiplier.item() == pytest.approx(expected, rel=1e-4) and (expected - 1) * way > 0
    assert net.multiplier.item() == 0


def test_the_bound_tightens_when_edits_succeed_and_is_saved():
    lm, editor = embedded_lm(), ke(layers=[5], bound=BoundOptions(start=1e-2, least=7e-3))
    net = editor.build(lm)
    seen = []
    for success in (90.0, 90.1, 99.0, 99.0):
        editor.after_validation(net, {"es": success})
        seen.append(float(net.bound))
    assert seen == pytest.approx([1e-2, 8e-3, 7e-3, 7e-3])
    assert {"bound", "multiplier"} <= net.state_dict().keys()


def test_losses_of_training_and_validation():
    """Smoothed NLL under the bound while training; the same weighted sum at every validation, and without a bound."""
    lm, cases = double(), statements("train")[:2]
    editor = ke(smoothing=0.0, edit_weight=0.5, locality_weight=2.0)
    net = editor.build(lm).double()
    with torch.no_grad():
        net.multiplier.fill_(3.0)
    numbers = {}
    free = BoundOptions(active=False)
    for name, current in (
        ("bound", editor),
        ("smooth", replace(editor, smoothing=0.3)),
        ("sum", replace(editor, bound=free)),
    ):
        torch.manual_seed(1)
        numbers[name] = current.loss(net.train(), lm, cases)
    loss, told = numbers["bound"]
    assert float(loss.detach()) == pytest.approx(told["nll"] + 3 * (told["kl"] - 1e-3), rel=1e-5)
    assert numbers["smooth"][0] != loss
    assert float(numbers["sum"][0].detach()) == pytest.approx(0.5 * told["nll"] + 2 * told["kl"], rel=1e-5)
    torch.manual_seed(1)
    assert torch.equal(editor.loss(net.eval(), lm, cases)[0], numbers["sum"][0])
    torch.manual_seed(1)
    assert replace(editor, wordings=True).loss(net, lm, cases)[1]["nll"] != told["nll"]
    assert not replace(editor, bound=free).build(lm).multiplier.requires_grad


def test_the_models_own_answer_is_read_where_no_old_one_is_told():
    lm, editor = embedded_lm(), ke()
    (told,) = requests(1)
    untold = EditRequest(told.prompt, told.subject, told.target_new)
    known: dict[str, str] = {}
    expected, _ = editor.read(lm, [told], {})
    found, _ = editor.read(lm, [untold, untold], known)
    assert known == {told.text: lm.generate([told.text], 8)[0]} and known[told.text].strip().startswith(
        told.target_true
    )
    assert (
        found[0].tolist()
        == lm.tokenizer(f"{known[told.text].strip()} >> {told.target_new} || {told.text}")["input_ids"]
    )
    known[told.text] = told.target_true
    assert torch.equal(editor.read(lm, [untold], known)[0], expected)


def trained(tmp_path, lm: LM, after: int = 2, **changed) -> KE:
    editor = brief(ke(**changed), tmp_path, steps=after)
    keep_trained(editor, lm, tmp_path)
    return editor


def test_training_learns(tmp_path):
    """Validation edits that the untrained network leaves as they are get their new answers."""
    lm, cases = embedded_lm(), statements("validation")[:16]
    editor = trained(tmp_path, lm, after=40, hidden=32, width=64)
    with torch.no_grad():
        torch.manual_seed(5)
        before, _ = editor.loss(editor.build(lm).eval(), lm, cases)
        torch.manual_seed(5)
        after, told = editor.loss(editor.trained(lm), lm, cases)
    assert float(after) < 0.5 * float(before) and told["es"] > 50


def test_rounds_go_on_with_what_is_not_right_yet(tmp_path):
    lm, wanted = embedded_lm(), requests(6)
    editor = trained(tmp_path, lm, after=25)
    pairs = [(request.text, request.target_new) for request in wanted]

    def right(edit, asked=pairs):
        with lm.edited(edit):
            return sum(all(score.hits) for score in lm.loglikelihood(asked))

    before = snapshot(lm)
    one, more = (replace(editor, rounds=rounds).edit(lm, wanted) for rounds in (1, 4))
    assert same_bits(snapshot(lm), before) and lm.attached == []
    assert right(one) < right(more)
    alone = [replace(editor, rounds=1).edit(lm, [request]) for request in wanted]
    enough = [number for number, edit in enumerate(alone) if right(edit, pairs[number : number + 1])]
    assert 0 < len(enough) < 6
    for number, edit in enumerate(alone):  # one round more only where it is needed
        again = replace(editor, rounds=2).edit(lm, wanted[number : number + 1])
        assert same_bits(again.state()[0], edit.state()[0]) == (number in enough)


def test_checkpoints_and_those_of_another_model(tmp_path):
    lm = embedded_lm()
    editor = trained(tmp_path, lm)
    (place,) = [file.parent for file in tmp_path.glob("*/editor.json")]
    assert same_bits(replace(editor).trained(lm).state_dict(), editor.trained(lm).state_dict())
    assert replace(editor, rounds=3).trained(lm) is not None  # rounds change nothing of what is learnt
    with pytest.raises(MissingError, match="other weights than tiny-gpt2-linear has"):
        replace(editor, checkpoint=str(place)).trained(linear_twin())
    with pytest.raises(MissingError, match="holds another network"):
        replace(editor, checkpoint=str(place), width=8).trained(lm)


@pytest.mark.parametrize("family", ["t5", "bart", "bert"])
def test_other_heads(family):
    lm = tiny_lm(family)
    labels = getattr(lm.head, "labels", ["ab", "c"])
    told, untold = EditRequest("ab {} b", "ca", labels[0], labels[1]), EditRequest("b {} b", "ab", labels[0])
    probes = (Probe("paraphrase", "ca ab", labels[0]), Probe("locality", "b a b", labels[1]))
    cases = [Case(str(number), (request,), probes) for number, request in enumerate((told, untold))]
    editor = ke(layers=[], last=1, draw=DrawOptions(), wordings=True)
    net = editor.build(lm).train()
    loss, told_ = editor.loss(net, lm, cases)
    loss.backward()
    assert told_["nll"] > 0 and all(parameter.grad.abs().max() > 0 for parameter in net.own.parameters())
    editor.scratch(lm)["network"] = net.eval().requires_grad_(False)
    before = snapshot(lm)
    with lm.edited(editor.edit(lm, [told, untold])):
        assert not same_bits(snapshot(lm), before)
    assert same_bits(snapshot(lm), before)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"condition": "{old} {new}"}, "must hold {prompt}"),
        ({"scale": 0.0}, "must be above 0"),
        ({"rounds": 0}, "must be above 0"),
    ],
)
def test_wrong_settings_are_refused(changed, message):
    with pytest.raises(UsageError, match=message):
        ke(**changed)
