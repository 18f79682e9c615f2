"""ENN: what training goes back through, how the trained model becomes an edit, and how it comes off again."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from embedded import embedded_lm, linear_twin, same_bits, snapshot
from families import tiny_lm
from learners import changed, statements, trained
from torch.nn.attention import SDPBackend, sdpa_kernel

from edit_cli.editors.finetune.base import lent
from edit_cli.editors.meta.base import TrainingConfig
from edit_cli.editors.meta.enn import ENN, Descent, ENNConfig
from edit_cli.editors.meta.episodes import EpisodeConfig, sample_episodes
from edit_cli.editors.meta.factored_gradients import Shift
from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import Factors
from edit_cli.errors import MissingError, UsageError
from edit_cli.lm.model import LM
from edit_cli.requests import Case, EditRequest, Probe

DRAWN = EpisodeConfig(outer="any", locality=["same_relation"])
RULES: dict[str, dict[str, Any]] = {
    "sgd": {"steps": 3, "step_size": 0.05, "log_step": True},
    "rmsprop": {"steps": 3, "rule": "rmsprop", "objective": "margin", "margin": 20.0, "step_size": 1e-3},
}


def enn(lm: LM, **changed) -> ENN:
    small = {"layers": [4, 5], "step_size": 0.05, "draw": DRAWN, "training": TrainingConfig(edits=4, lr=3e-4)}
    return ENN(ENNConfig(**{**small, **changed}), lm)


@cache
def double() -> LM:
    lm = embedded_lm()
    return LM(lm.model.double(), lm.tokenizer, "tiny-gpt2-64")


def moved(editor: ENN):
    """A network whose weights are not the original ones any more."""
    net = editor.build().to(editor.lm.dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in net.kept.values():
            weight += 1e-2 * weight.std() * torch.randn_like(weight)
    return net.train()


def requests(count: int) -> list[EditRequest]:
    return [case.requests[0] for case in statements("test")[:count]]


def functional(editor: ENN, net, case: Case) -> torch.Tensor:
    """Equation 3 with a functional copy of the model and dense steps, one row at a time."""
    lm, config = editor.lm, editor.config
    (episode,) = sample_episodes([case], 1, DRAWN)
    original = {name: weight.detach() for name, weight in lm.model.named_parameters()}
    present = original | net.weights

    def scores(weights, pair):
        (row,) = lm.head.encode([pair])
        ids = torch.tensor([row.ids[:-1]])
        logits = torch.func.functional_call(lm.model, weights, (ids,), {"use_cache": False}, tie_weights=True).logits[
            0, row.start - 1 :
        ]
        return logits.log_softmax(-1), torch.tensor(row.target)

    def missing(weights, pair):
        logp, labels = scores(weights, pair)
        right = logp.gather(1, labels[:, None])[:, 0]
        if config.objective == "nll":
            return -right.mean()
        others = logp.masked_fill(torch.nn.functional.one_hot(labels, logp.shape[1]).bool(), -torch.inf)
        return torch.relu(config.margin + others.max(-1).values - right).mean()

    def divergence(before, after, pair):
        first, second = scores(before, pair)[0], scores(after, pair)[0]
        return (first.exp() * (first - second)).sum(-1).mean()

    names, after = [f"{name}.weight" for name in net.modules_edited], present
    squares: dict[str, Any] = {}
    for _ in range(config.steps):
        inner = after if net.training else {name: weight.detach().requires_grad_() for name, weight in after.items()}
        found = torch.autograd.grad(
            missing(inner, episode.support[0]), [inner[name] for name in names], create_graph=net.training
        )
        after = dict(after)
        for name, gradient, size in zip(names, found, net.sizes, strict=True):
            if config.rule == "rmsprop":
                squares[name] = (
                    gradient**2 if name not in squares else net.decay * squares[name] + (1 - net.decay) * gradient**2
                )
                gradient = gradient / torch.sqrt(squares[name] + 1e-6)
            after[name] = after[name] - size * gradient
    fixed = {name: weight.detach() for name, weight in present.items()}
    base, local = divergence(original, present, episode.locality[0]), divergence(fixed, after, episode.locality[0])
    return (
        config.base_weight * base
        + config.edit_weight * missing(after, episode.query[0])
        + config.locality_weight * local
    )


@pytest.mark.parametrize("trains", ["all", "edited"])
@pytest.mark.parametrize("rule", RULES)
def test_loss_and_gradient_through_all_steps_are_those_of_a_functional_copy(rule, trains):
    editor, (case,) = enn(double(), trains=trains, edit_weight=1.0, **RULES[rule]), statements("train")[:1]
    net = moved(editor)
    torch.manual_seed(1)
    loss, _ = editor.loss(net, [case])
    learned = [parameter for parameter in net.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, learned)
    torch.manual_seed(1)
    with sdpa_kernel(SDPBackend.MATH):
        plain = functional(editor, net, case)
        expected = torch.autograd.grad(plain, learned)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-9)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)
    assert net.steps.requires_grad and net.decay.requires_grad == (rule == "rmsprop")


def test_the_gradient_is_the_slope_of_the_loss():
    """Finite differences along a random direction; L_loc is left out, because its θ is held fixed on one side."""
    editor, cases = enn(double(), locality_weight=0.0, edit_weight=1.0, steps=2), statements("train")[:2]
    net = moved(editor)
    learned = [parameter for parameter in net.parameters() if parameter.requires_grad]
    torch.manual_seed(2)
    directions = [torch.randn_like(parameter) for parameter in learned]

    def loss():
        torch.manual_seed(3)
        return editor.loss(net, cases)[0]

    gradients = torch.autograd.grad(loss(), learned)
    slope = torch.stack([(g * d).sum() for g, d in zip(gradients, directions, strict=True)]).sum()
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(learned, directions, strict=True):
                parameter += sign * 1e-6 * direction
        ends.append(loss().detach())
        with torch.no_grad():
            for parameter, direction in zip(learned, directions, strict=True):
                parameter -= sign * 1e-6 * direction
    torch.testing.assert_close(slope.detach(), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-7)


def test_independent_edits_in_one_batch_are_those_one_at_a_time():
    lm, cases = double(), statements("train")[:4]
    for editor in (enn(lm, edits=2, steps=2), enn(lm, **RULES["rmsprop"])):
        net = moved(editor)
        torch.manual_seed(4)
        together, told = editor.loss(net, cases)
        alone = []
        for first in range(0, 4, editor.config.edits):
            torch.manual_seed(4)
            alone.append(editor.loss(net, [*cases, *cases][first : first + editor.config.edits])[0])
        torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-6, atol=1e-9)
        assert told["base"] > 0 and told["kl"] > 0


def test_without_the_terms_of_edits_the_model_learns_to_stay_itself():
    editor = enn(double(), edit_weight=0.0, locality_weight=0.0)
    loss, told = editor.loss(editor.build().train(), statements("train")[:2])
    assert float(loss.detach()) == pytest.approx(0, abs=1e-9) == told["base"]


def test_steps_by_hand():
    rate = torch.tensor(0.5)
    plain, scaled = Descent("sgd", torch.tensor(0.1), rate), Descent("rmsprop", torch.tensor(0.1), rate)
    delta, u = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[1.0, 3.0, 0.0]]])
    gradient = torch.tensor([[2.0, 6.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(plain.step(delta, u).factors().dense(), -0.1 * gradient)
    torch.testing.assert_close(plain.step(delta, u).factors().dense(), -0.2 * gradient)
    torch.testing.assert_close(scaled.step(delta, u).factors().dense(), -0.1 * gradient.sign(), rtol=1e-4, atol=1e-6)
    second = scaled.step(2 * delta, u).factors().dense()  # v = (1 + 4)/2 g²
    torch.testing.assert_close(second, -0.1 * gradient.sign() * (1 + 2 / 2.5**0.5), rtol=1e-4, atol=1e-6)
    for shape in ((2, 4, 3), (2, 3, 4)):
        change = torch.randn(shape)
        x, y = torch.randn(4, 5, shape[2]), torch.zeros(4, 5, shape[1])
        expected = torch.einsum("eoi,erti->erto", change, x.view(2, 2, 5, -1)).reshape(4, 5, -1)
        torch.testing.assert_close(Shift.dense(change).add(x, y), expected)


def small_enn(tmp_path, lm: LM, after: int = 2, **settings) -> ENN:
    return trained(enn(lm, **{"layers": [5], **settings}), tmp_path, steps=after)


def test_an_edit_leads_to_the_trained_model_and_steps_on_and_comes_off_exactly(tmp_path):
    lm = embedded_lm()
    untouched, wanted = snapshot(lm), requests(2)
    editor = small_enn(tmp_path, lm)
    first = editor.edit(wanted[:1])
    assert same_bits(snapshot(lm), untouched)
    net, edited = editor.trained(), {f"transformer.h.5.mlp.{name}.weight" for name in ("c_fc", "c_proj")}
    assert first.updates.keys() == untouched.keys() and edited < untouched.keys()
    edit_store.save(first, tmp_path / "first", lm, wanted[:1], {})
    lm.attach(first)
    for name, weight in net.weights.items():
        if name not in edited:
            torch.testing.assert_close(lm.parameter(name), weight, rtol=0, atol=1e-6)
    second = editor.edit(wanted[1:])  # of a sequence: from where it stands
    assert second.updates.keys() == edited
    assert all(isinstance(update, Factors) and update.rank <= 40 for update in second.updates.values())
    after = snapshot(lm)
    lm.attach(second)
    assert not same_bits(snapshot(lm), after)
    lm.detach()
    assert same_bits(snapshot(lm), after)
    lm.detach()
    assert same_bits(snapshot(lm), untouched)
    (loaded,) = edit_store.attach(tmp_path / "first", lm)
    assert same_bits(snapshot(lm), after)
    resumed = changed(editor)
    resumed.recall(loaded)
    again = resumed.edit(wanted[1:])
    assert same_bits(again.state()[0], second.state()[0])
    lm.detach()
    assert changed(editor).edit(wanted[:1]).updates.keys() == untouched.keys()  # forgotten


def test_the_control_changes_the_edited_matrices_alone(tmp_path):
    lm, (request,) = embedded_lm(), requests(1)
    editor = small_enn(tmp_path, lm, trains="nothing", step_size=0.2)
    edit = editor.edit([request])
    assert not editor.trained().weights and len(edit.updates) == 2
    before = lm.loglikelihood([(request.text, request.target_new)])[0].nll
    with lm.edited(edit):
        assert lm.loglikelihood([(request.text, request.target_new)])[0].nll < before - 0.5


def test_steps_end_where_the_margin_is_met(tmp_path):
    """A target that is the likeliest already: nothing is changed but to the trained weights."""
    lm, (request,) = embedded_lm(), requests(1)
    editor = small_enn(
        tmp_path, lm, after=1, trains="nothing", **{k: v for k, v in RULES["rmsprop"].items() if k != "margin"}
    )
    assert request.target_true is not None
    known = EditRequest(request.prompt, request.subject, request.target_true)
    assert lm.loglikelihood([(known.text, known.target_new)])[0].hits == (True,)
    assert all(float(norm) == 0 for norm in editor.edit([known]).norms().values())
    assert all(float(norm) > 0 for norm in editor.edit([request]).norms().values())


def test_training_makes_the_model_editable(tmp_path):
    """The same validation edits, before and after: the new answers become likelier at no more cost."""
    lm, cases = embedded_lm(), statements("validation")[:16]
    editor = small_enn(tmp_path, lm, after=15, layers=[4, 5], step_size=0.1, step_lr=0.0)
    with torch.no_grad():
        torch.manual_seed(5)
        before, started = editor.loss(editor.build().eval(), cases)
        torch.manual_seed(5)
        after, told = editor.loss(editor.trained(), cases)
    assert float(after) < 0.9 * float(before) and told["nll"] < started["nll"]


def test_checkpoints_of_another_model_are_refused(tmp_path):
    lm = embedded_lm()
    editor = small_enn(tmp_path, lm, after=1, trains="edited")
    (place,) = [file.parent for file in tmp_path.glob("*/editor.json")]
    assert same_bits(changed(editor).trained().state_dict(), editor.trained().state_dict())
    with pytest.raises(MissingError, match="other weights than tiny-gpt2-linear has"):
        ENN(replace(editor.config, checkpoint=str(place)), linear_twin()).trained()
    with pytest.raises(MissingError, match="has not been trained"):
        changed(editor, trains="nothing").trained()


@pytest.mark.parametrize("family", ["t5", "bart", "bert"])
def test_other_heads(family):
    lm = tiny_lm(family)
    labels = getattr(lm.head, "labels", ["ab", "c"])
    request = EditRequest("ab {} b", "ca", labels[0], labels[1])
    case = Case("1", (request,), (Probe("paraphrase", "ca ab", labels[0]), Probe("locality", "b a b", labels[1])))
    editor = enn(lm, layers=[], last=1, steps=2, draw=EpisodeConfig())
    net = editor.build().train()
    loss, told = editor.loss(net, [case])
    loss.backward()
    moving = [name for name, weight in net.weights.items() if weight.grad is not None and weight.grad.abs().max() > 0]
    assert told["nll"] > 0 and len(moving) > len(net.modules_edited)
    editor.context.kept["network"] = net.eval().requires_grad_(False)
    before = snapshot(lm)
    with lm.edited(editor.edit([request])):
        assert not same_bits(snapshot(lm), before)
    assert same_bits(snapshot(lm), before)


def test_a_lent_weight_stands_wherever_its_parameter_does():
    lm = embedded_lm()
    name = "transformer.wte.weight"
    assert lm.model.get_output_embeddings().weight is lm.parameter(name)
    stand_in = torch.zeros_like(lm.parameter(name)).requires_grad_()
    own, names = lm.parameter(name), [n for n, _ in lm.model.named_parameters()]
    with lent(lm, {name: stand_in}):
        assert lm.model.get_input_embeddings().weight is stand_in is lm.model.get_output_embeddings().weight
    assert lm.parameter(name) is own is lm.model.get_output_embeddings().weight
    assert [n for n, _ in lm.model.named_parameters()] == names


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"rule": "x"}, "method.rule=x"), ({"objective": "x"}, "method.objective=x"), ({"trains": "x"}, "method.trains=x"),
     ({"steps": 0}, "method.steps=0: give a whole number from 1 up"), ({"decay": 2.0}, "method.decay=2")],
)  # fmt: skip
def test_wrong_settings_are_refused(changed, message):
    with pytest.raises(UsageError, match=message):
        enn(embedded_lm(), **changed)
