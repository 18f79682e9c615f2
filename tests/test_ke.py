"""KE: the update beside a plain computation, the bound and its multiplier, and what a checkpoint is good for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from embedded import embedded_lm, linear_twin, same_bits, snapshot
from families import tiny_lm
from learners import changed, statements, trained

from edit_cli.editors.meta.base import TrainingConfig
from edit_cli.editors.meta.episodes import EpisodeConfig, sample_episodes
from edit_cli.editors.meta.factored_gradients import gradients
from edit_cli.editors.meta.ke import KE, BoundConfig, KEConfig, climbing
from edit_cli.editors.passes import row_losses
from edit_cli.edits.edit import Factors
from edit_cli.errors import MissingError, UsageError
from edit_cli.lm.model import LM
from edit_cli.requests import Case, EditRequest, Probe

DRAWN = EpisodeConfig(outer="any", locality=["random", "same_relation"])
MODULES = [f"transformer.h.{layer}.mlp.{name}" for layer in (4, 5) for name in ("c_fc", "c_proj")]


def ke(lm: LM, **changed) -> KE:
    small = {"layers": [4, 5], "hidden": 8, "width": 16, "inner": 8, "scale": 100.0, "others": 0, "draw": DRAWN}
    return KE(KEConfig(**{**small, "training": TrainingConfig(edits=4, lr=3e-3), **changed}), lm)


@cache
def double() -> LM:
    lm = embedded_lm()
    return LM(lm.model.double(), lm.tokenizer, "tiny-gpt2-64")


def requests(count: int, split: str = "test") -> list[EditRequest]:
    return [case.requests[0] for case in statements(split)[:count]]


def rows_of(lm, wanted):
    return lm.head.encode([(request.text, request.target_new) for request in wanted])


def plain_weight(layer: Any) -> torch.Tensor:
    """g v / ‖v‖ of a weight-normalized layer, row by row."""
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
    lm, wanted = double(), requests(3)
    editor = ke(lm)
    torch.manual_seed(0)
    net = editor.build().double().eval()
    shifts = net(gradients(lm, rows_of(lm, wanted), MODULES), *editor.read(wanted, {}))
    for number, request in enumerate(wanted):  # padded beside longer ones, and alone
        for name, change in by_hand(net, lm, request, 100.0).items():
            torch.testing.assert_close(
                shifts[name].left[number].T @ shifts[name].right[number], change, rtol=1e-8, atol=1e-12
            )


def test_an_edit_of_several_facts_is_the_sum_and_small(tmp_path):
    lm, wanted = embedded_lm(), requests(2)
    editor = small_ke(tmp_path, lm)
    edit = editor.edit(wanted)
    tokens = sum(len(row.ids) - 1 for row in rows_of(lm, wanted))
    for name, update in edit.updates.items():  # a column for each token that the answer depends on, and B
        assert isinstance(update, Factors)
        assert update.rank == 4 if ".5." in name else 4 < update.rank <= tokens + 2
    parts = [editor.edit([request]) for request in wanted]
    for name in edit.updates:
        torch.testing.assert_close(
            edit.stored(lm, name), sum(part.stored(lm, name) for part in parts), rtol=1e-4, atol=1e-6
        )


def test_prompts_of_the_other_facts_of_a_batch_must_stay():
    """As published: of a batch one fact is edited, and the others are its constraint; validation takes each fact."""
    editor, cases = ke(embedded_lm(), others=3), statements("train")[:8]
    assert (editor.config.cases_per_edit, editor.config.cases_per_evaluation) == (4, 1)
    torch.manual_seed(0)
    edited, episodes = editor._episodes(cases, 4)
    torch.manual_seed(0)
    plain = sample_episodes([cases[0], cases[4]], 1, editor.config.draw)
    assert edited == [cases[0], cases[4]]
    for episode, drawn, first in zip(episodes, plain, (0, 4), strict=True):
        others = [case.requests[0] for case in cases[first + 1 : first + 4]]
        assert episode.support == episode.query == drawn.support
        assert episode.locality == (*drawn.locality, *((request.text, request.target_true) for request in others))
    net = editor.build()
    assert editor.loss(net.train(), cases)[1]["kl"] >= 0
    assert editor.loss(net.eval(), cases[:3])[1]["shift"] > 0
    with pytest.raises(UsageError, match="method.others=-1"):
        ke(editor.lm, others=-1)


def test_it_can_begin_as_a_step_down_the_gradient():
    lm, wanted = embedded_lm(), requests(2)
    found = gradients(lm, rows_of(lm, wanted), MODULES)
    editor = ke(lm, step_size=0.3, scale=2.0)
    net = editor.build().eval()
    texts = editor.read(wanted, {})
    for name, shift in net(found, *texts).items():
        for number in range(2):
            expected = -0.3 * found[name].outputs[number].T @ found[name].inputs[number]
            torch.testing.assert_close(shift.left[number].T @ shift.right[number], expected, rtol=1e-4, atol=1e-7)


def test_the_multiplier_climbs_where_the_bound_is_broken_and_stays_above_zero():
    multiplier = torch.tensor(2.0, requires_grad=True)
    value = climbing(multiplier) * (torch.tensor(0.7) - 0.1)
    value.backward()
    assert value.item() == pytest.approx(1.2)
    assert multiplier.grad is not None and multiplier.grad.item() == pytest.approx(-0.6)  # descending, it climbs
    editor = ke(embedded_lm(), layers=[5])
    net = editor.build().train()
    cases = statements("train")[:2]
    for bound, way in ((-1.0, 1), (50.0, -1)):
        net.bound.fill_(bound)
        with torch.no_grad():
            net.multiplier.fill_(1.0)
        (group,) = [group for group in editor.groups(net) if group.get("lr") == 0.1]
        optimizer = torch.optim.SGD(group["params"], lr=0.1)
        net.zero_grad()
        loss, told = editor.loss(net, cases)
        loss.backward()
        optimizer.step()
        editor.after_step(net)
        expected = max(0.0, 1.0 + 0.1 * (told["kl"] - bound))
        assert net.multiplier.item() == pytest.approx(expected, rel=1e-4) and (expected - 1) * way > 0
    assert net.multiplier.item() == 0


def test_the_bound_tightens_when_edits_succeed_and_is_saved():
    editor = ke(embedded_lm(), layers=[5], bound=BoundConfig(start=1e-2, least=7e-3))
    net = editor.build()
    seen = []
    for success in (90.0, 90.1, 99.0, 99.0):
        editor.after_validation(net, {"es": success})
        seen.append(float(net.bound))
    assert seen == pytest.approx([1e-2, 8e-3, 7e-3, 7e-3])
    assert {"bound", "multiplier"} <= net.state_dict().keys()


def test_losses_of_training_and_validation():
    """Smoothed NLL under the bound while training; the same weighted sum at every validation, and without a bound."""
    lm, cases = double(), statements("train")[:2]
    editor = ke(lm, smoothing=0.0, edit_weight=0.5, locality_weight=2.0)
    net = editor.build().double()
    with torch.no_grad():
        net.multiplier.fill_(3.0)
    numbers = {}
    free = BoundConfig(active=False)
    for name, current in (
        ("bound", editor),
        ("smooth", changed(editor, smoothing=0.3)),
        ("sum", changed(editor, bound=free)),
    ):
        torch.manual_seed(1)
        numbers[name] = current.loss(net.train(), cases)
    loss, told = numbers["bound"]
    assert float(loss.detach()) == pytest.approx(told["nll"] + 3 * (told["kl"] - 1e-3), rel=1e-5)
    assert numbers["smooth"][0] != loss
    assert float(numbers["sum"][0].detach()) == pytest.approx(0.5 * told["nll"] + 2 * told["kl"], rel=1e-5)
    torch.manual_seed(1)
    assert torch.equal(editor.loss(net.eval(), cases)[0], numbers["sum"][0])
    torch.manual_seed(1)
    assert changed(editor, wordings=True).loss(net, cases)[1]["nll"] != told["nll"]
    assert not changed(editor, bound=free).build().multiplier.requires_grad


def test_the_models_own_answer_is_read_where_no_old_one_is_told():
    lm = embedded_lm()
    editor = ke(lm)
    (told,) = requests(1)
    untold = EditRequest(told.prompt, told.subject, told.target_new)
    known: dict[str, str] = {}
    expected, _ = editor.read([told], {})
    found, _ = editor.read([untold, untold], known)
    assert told.target_true is not None
    assert known == {told.text: lm.generate([told.text], 8)[0]}
    assert known[told.text].strip().startswith(told.target_true)
    assert (
        found[0].tolist()
        == lm.tokenizer(f"{known[told.text].strip()} >> {told.target_new} || {told.text}")["input_ids"]
    )
    known[told.text] = told.target_true
    assert torch.equal(editor.read([untold], known)[0], expected)


def small_ke(tmp_path, lm: LM, after: int = 2, **settings) -> KE:
    return trained(ke(lm, **settings), tmp_path, steps=after)


def test_training_learns(tmp_path):
    """Validation edits that the untrained network leaves as they are get their new answers."""
    lm, cases = embedded_lm(), statements("validation")[:16]
    editor = small_ke(tmp_path, lm, after=40, hidden=32, width=64)
    with torch.no_grad():
        torch.manual_seed(5)
        before, _ = editor.loss(editor.build().eval(), cases)
        torch.manual_seed(5)
        after, told = editor.loss(editor.trained(), cases)
    assert float(after) < 0.5 * float(before) and told["es"] > 50


def test_rounds_go_on_with_what_is_not_right_yet(tmp_path):
    lm, wanted = embedded_lm(), requests(6)
    editor = small_ke(tmp_path, lm, after=25)
    pairs = [(request.text, request.target_new) for request in wanted]

    def right(edit, asked=pairs):
        with lm.edited(edit):
            return sum(all(score.hits) for score in lm.loglikelihood(asked))

    before = snapshot(lm)
    one, more = (changed(editor, rounds=rounds).edit(wanted) for rounds in (1, 4))
    assert same_bits(snapshot(lm), before) and lm.attached == []
    assert right(one) < right(more)
    alone = [changed(editor, rounds=1).edit([request]) for request in wanted]
    enough = [number for number, edit in enumerate(alone) if right(edit, pairs[number : number + 1])]
    assert 0 < len(enough) < 6
    for number, edit in enumerate(alone):  # one round more only where it is needed
        again = changed(editor, rounds=2).edit(wanted[number : number + 1])
        assert same_bits(again.state()[0], edit.state()[0]) == (number in enough)
    each = changed(editor, rounds=4).edit_each([[request] for request in wanted])
    assert each is not None
    for number, edit in enumerate(each):  # together as alone, each as many rounds as it needs
        own = changed(editor, rounds=4).edit(wanted[number : number + 1])
        for name in edit.updates:
            found, expected = edit.stored(lm, name), own.stored(lm, name)
            assert (found - expected).norm() <= 1e-3 * expected.norm()
        assert edit.info["shift"] == pytest.approx(own.info["shift"], rel=1e-4)
    assert same_bits(snapshot(lm), before) and editor.edit_each([wanted[:2], wanted[2:]]) is None


def test_checkpoints_and_those_of_another_model(tmp_path):
    lm = embedded_lm()
    editor = small_ke(tmp_path, lm)
    (place,) = [file.parent for file in tmp_path.glob("*/editor.json")]
    assert same_bits(changed(editor).trained().state_dict(), editor.trained().state_dict())
    assert changed(editor, rounds=3).trained() is not None  # rounds change nothing of what is learned
    with pytest.raises(MissingError, match="other weights than tiny-gpt2-linear has"):
        KE(replace(editor.config, checkpoint=str(place)), linear_twin()).trained()
    with pytest.raises(MissingError, match="holds another network"):
        changed(editor, checkpoint=str(place), width=8).trained()


@pytest.mark.parametrize("family", ["t5", "bart", "bert"])
def test_other_heads(family):
    lm = tiny_lm(family)
    labels = getattr(lm.head, "labels", ["ab", "c"])
    told, untold = EditRequest("ab {} b", "ca", labels[0], labels[1]), EditRequest("b {} b", "ab", labels[0])
    probes = (Probe("paraphrase", "ca ab", labels[0]), Probe("locality", "b a b", labels[1]))
    cases = [Case(str(number), (request,), probes) for number, request in enumerate((told, untold))]
    editor = ke(lm, layers=[], last=1, draw=EpisodeConfig(), wordings=True)
    net = editor.build().train()
    loss, told_ = editor.loss(net, cases)
    loss.backward()
    assert told_["nll"] > 0
    assert all(own.grad is not None and own.grad.abs().max() > 0 for own in net.own.parameters())
    editor.context.kept["network"] = net.eval().requires_grad_(False)
    before = snapshot(lm)
    with lm.edited(editor.edit([told, untold])):
        assert not same_bits(snapshot(lm), before)
    assert same_bits(snapshot(lm), before)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"condition": "{old} {new}"}, "must hold {prompt}"),
        ({"scale": 0.0}, "method.scale=0.0: give a number above 0"),
        ({"rounds": 0}, "method.rounds=0: give a whole number from 1 up"),
    ],
)
def test_wrong_settings_are_refused(changed, message):
    with pytest.raises(UsageError, match=message):
        ke(embedded_lm(), **changed)
