"""T-Patcher: its losses and its start by hand in float64, its training beside a plain one, what it leaves alone, and
what patches say of facts.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from embedded import Prepared, embedded_lm, packaged_editor, prepared, requests, same_bits, snapshot, world
from omegaconf import OmegaConf
from transformers import GPT2Config

from edit_cli.datasets.world import WorldEdits
from edit_cli.editors.memory.activations import inputs_on_examples, inputs_on_text
from edit_cli.editors.memory.base import mlp_in
from edit_cli.editors.memory.tpatcher import (
    NeuronPatch,
    Neurons,
    PatchedLayer,
    TPatcher,
    TPatcherConfig,
    activation_loss,
    begun,
    edit_loss,
    memory_losses,
    patch_activations,
    top_exp,
)
from edit_cli.errors import MissingError, UsageError
from edit_cli.lm.heads.answers import Answers
from edit_cli.lm.hooks import exact, on_input, on_output
from edit_cli.lm.loading import ModelOptions
from edit_cli.requests import EditRequest
from edit_cli.statistics.corpora import EmbeddedText

CONF = Path(__file__).parent.parent / "conf" / "tuned" / "tpatcher"
SMALL = ("method.memory_size=800", "method.validation_size=200", "method.top_memory=200")


@pytest.fixture
def tpatcher(tmp_path):
    return lambda *overrides: packaged_editor(tmp_path, "tpatcher", *SMALL, *overrides)


def neurons() -> tuple[Neurons, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    keys, biases, weights, queries = (
        torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((2, 3), (2, 1), (2, 3), (2, 3))
    )
    return Neurons(keys, biases, weights, torch.full_like(weights, 10.0)), queries


def test_top_exp_is_the_mean_of_the_largest():
    values = torch.tensor([[0.0, 2.0, 1.0], [1.0, -1.0, 5.0]], dtype=torch.float64)
    expected = [(math.exp(2) + math.exp(1)) / 2, (math.exp(5) + math.exp(1)) / 2]
    assert top_exp(values, 2).tolist() == pytest.approx(expected, rel=1e-12)
    assert top_exp(values, 99)[0].item() == pytest.approx(sum(map(math.exp, (0, 1, 2))) / 3, rel=1e-12)
    assert float(top_exp(torch.tensor([[1e6]]), 1)) == pytest.approx(math.exp(30), rel=1e-6)  # clamped, not infinite


def test_losses_by_hand():
    added, queries = neurons()
    memory = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    config = TPatcherConfig(beta=-3.0, gamma=2.0, top_activation=5, top_memory=4)
    own = [
        sum(q * k for q, k in zip(queries[p].tolist(), added.keys[p].tolist(), strict=True)) + added.biases[p].item()
        for p in range(2)
    ]
    expected = (math.exp(-own[0]) + math.exp(-own[1])) / 2
    assert float(activation_loss(added, queries, config)) == pytest.approx(expected, rel=1e-12)

    def elsewhere(m: int, p: int) -> float:
        return (
            sum(x * k for x, k in zip(memory[m].tolist(), added.keys[p].tolist(), strict=True)) + added.biases[p].item()
        )

    below = [sorted((math.exp(elsewhere(m, p) + 3) for m in range(7)), reverse=True)[:4] for p in range(2)]
    apart = [sorted((math.exp(elsewhere(m, p) - own[p] + 2) for m in range(7)), reverse=True)[:4] for p in range(2)]
    expected = sum(map(sum, below)) / 8 + sum(map(sum, apart)) / 8
    whole = float(memory_losses(added, queries, [memory], config))
    assert whole == pytest.approx(float(memory_losses(added, queries, [memory[:2], memory[2:]], config)), rel=1e-12)
    assert whole == pytest.approx(expected, rel=1e-12)


def test_pooled_losses_by_hand():
    """The authors' code: of a fact that stands 8 times in a batch the 1,000 (here 24) largest terms of all neurons."""
    added, queries = neurons()
    memory = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    config = TPatcherConfig(beta=-3.0, gamma=2.0, pooled=True, top_activation=1, top_memory=3)
    said, own = added.activations(memory), added.own(queries)
    below = [math.exp(value + 3) for row in said.tolist() for value in row for _ in range(8)]
    apart = [math.exp(v - own[p].item() + 2) for row in said.tolist() for p, v in enumerate(row) for _ in range(8)]
    expected = sum(sum(sorted(terms, reverse=True)[:24]) / 24 for terms in (below, apart))
    assert float(memory_losses(added, queries, [memory], config)) == pytest.approx(expected, rel=1e-12)
    repeated = sorted((math.exp(-value) for value in own.tolist() for _ in range(8)), reverse=True)[:5]
    assert float(activation_loss(added, queries, config)) == pytest.approx(sum(repeated) / 5, rel=1e-12)


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_a_smoothed_edit_loss_by_hand(kind):
    """Of texts the label keeps 1 − ε and the others share ε; of a label ε of the entropy is taken off."""
    logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]], dtype=torch.float64)
    labels, nothing = torch.tensor([0, 2]), torch.zeros(1, 3, dtype=torch.float64)
    lm = SimpleNamespace(head=SimpleNamespace(kind=kind), model=SimpleNamespace(config=GPT2Config()))
    run: Any = SimpleNamespace(lm=lm, answers=lambda change: Answers(change(logits), labels, torch.tensor([0, 0])))
    silent = Neurons(nothing, nothing[:, :1], nothing, nothing)
    loss, right = edit_loss(run, torch.zeros(2, 3, dtype=torch.float64), 0.1, silent)
    logp = logits.log_softmax(-1)
    if kind == "causal":
        weights = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.05, 0.9]], dtype=torch.float64)
        expected = -(weights * logp).sum(-1).mean()
    else:
        expected = -logp[[0, 1], labels].mean() - 0.1 * -(logp.exp() * logp).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    assert right()


@pytest.mark.parametrize("model", ["tiny-bert", pytest.param("tiny-t5", marks=pytest.mark.slow)])
def test_the_authors_settings_mend_a_mistake(model, tmp_path):
    """Those of their models, on the small ones."""
    data: Any
    data, task = ("claims", "bert-base-uncased") if model == "tiny-bert" else ("questions", "bart-base")
    lm = ModelOptions(name=model, id=f"embedded:{model}", device="cpu").load()
    settings = OmegaConf.load(CONF / f"{task}.yaml")
    chosen = {str(key): value for key, value in settings.items() if key not in ("layer", "negatives")}
    small: dict[str, Any] = {"corpus": EmbeddedText(), "memory_size": 300, "validation_size": 100}
    (request,) = WorldEdits(name="world", records=data, split="validation").load(1).cases[0].requests
    asked = [(request.text, request.target_new)]
    assert not all(lm.loglikelihood(asked)[0].hits)
    with lm.edited(prepared(TPatcher, **chosen, **small).edit(lm, [request])):
        assert all(lm.loglikelihood(asked)[0].hits)


def test_a_patch_starts_with_a_pre_activation_of_exactly_one():
    queries = torch.randn(4, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 7
    added = begun(queries, 8, 10.0, [0, 1, 2, 3])
    torch.testing.assert_close(added.own(queries), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(added.values, 10 * added.weights)
    assert added.values.shape == (4, 8)
    # a neuron's start depends on its number alone
    assert torch.equal(begun(queries[2:], 8, 10.0, [2, 3]).weights, added.weights[2:])


def plain_training(made: Prepared, lm, request: EditRequest, steps: int) -> dict[str, torch.Tensor]:
    """One neuron by the formulas: whole passes, gradients of all that is remembered, one tensor a parameter."""
    name, entrance, (memory, _) = lm.layout.mlp_out(5), mlp_in(lm, 5), made.on(lm).negatives
    config: Any = made.config
    row, act = lm.head.encode([(request.text, request.target_new)])[0], torch.nn.functional.gelu
    entering: list[torch.Tensor] = []
    with torch.no_grad(), on_input(lm.module(entrance), entering.append):
        lm.head.answers([row])
    inputs = entering[0][0]
    q = inputs[row.start - 1]
    w = torch.randn(len(q), generator=torch.Generator().manual_seed(config.seed * 1_000_003))
    k, b, a = q / q.dot(q), torch.zeros(()), torch.full_like(w, 10.0)
    parameters = [x.clone().requires_grad_() for x in (k, b, w, a)]
    k, b, w, a = parameters
    optimizer = torch.optim.Adam(parameters, lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, threshold=0.05)
    for step in range(steps):
        added = act(inputs @ k + b, approximate="tanh")[:, None] * (w * a)
        with on_output(lm.module(name), added.add, 1):
            found = lm.head.answers([row])
        edit = torch.nn.functional.cross_entropy(found.logits, found.labels)
        if step and step % 25 == 0:
            schedule.step(edit.detach())
        own, elsewhere = q @ k + b, memory @ k + b
        below, apart = (
            x.topk(config.top_memory).values.exp().mean()
            for x in (elsewhere - config.beta, elsewhere - own + config.gamma)
        )
        optimizer.zero_grad()
        (edit + config.activation_weight * (-own).exp() + config.memory_weight * (below + apart)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
    return {"keys": k[None], "biases": b.view(1, 1), "values": (w * a)[None]}


def test_training_takes_the_same_steps_as_the_plain_one(tpatcher):
    lm, request = embedded_lm(), requests(1)[0]
    editor = tpatcher("method.steps=60")
    expected, found = plain_training(editor, lm, request, 60), editor.edit(lm, [request])
    for name, value in expected.items():
        torch.testing.assert_close(found.tensors[name], value.detach(), rtol=1e-2, atol=1e-3)


def test_the_patched_layer_is_the_papers_formula():
    lm, name = embedded_lm(), embedded_lm().layout.mlp_out(5)
    entrance = mlp_in(lm, 5)
    draw = torch.Generator().manual_seed(3)
    tensors = {
        "keys": torch.randn(3, 128, generator=draw),
        "biases": torch.randn(3, 1, generator=draw),
        "values": torch.randn(3, 128, generator=draw),
        "seen": torch.zeros(0, 128),
    }
    patch = NeuronPatch(name, "", tensors, {"entrance": entrance, "edits": 2, "made_for": [[0, 0], [0, 1], [1, 0]]})
    ids, out = torch.arange(5, 17)[None], []
    seen: list[torch.Tensor] = []
    with torch.no_grad(), on_input(lm.module(entrance), seen.append):
        handle = lm.module(name).register_forward_hook(lambda _, __, output: out.append(output))
        lm.model(input_ids=ids)
        handle.remove()
        with lm.edited(patch):
            handle = lm.module(name).register_forward_hook(lambda _, __, output: out.append(output))
            lm.model(input_ids=ids)
            handle.remove()
            assert lm.module(name).made_for == [(0, 0), (0, 1), (1, 0)]
    act = torch.nn.functional.gelu(seen[0] @ tensors["keys"].T + tensors["biases"][:, 0], approximate="tanh")
    torch.testing.assert_close(out[1], out[0] + act @ tensors["values"])


def test_weights_are_frozen_and_taking_patches_off_is_exact(tpatcher):
    lm, wanted, name = embedded_lm(), requests(3), embedded_lm().layout.mlp_out(5)
    untouched, editor = snapshot(lm), tpatcher()
    pairs = [(request.text, request.target_new) for request in wanted]
    answers = [lm.loglikelihood(pairs)]
    for request in wanted:
        lm.attach(editor.edit(lm, [request]))
        answers.append(lm.loglikelihood(pairs))
    layer = lm.module(name)
    assert isinstance(layer, PatchedLayer) and not isinstance(layer.original, PatchedLayer)
    assert layer.edits == 3 and [edit for edit, _ in layer.made_for] == [0, 1, 2]
    assert all(all(score.hits) for score in answers[-1])
    for earlier in reversed(answers[:-1]):
        lm.detach()
        assert lm.loglikelihood(pairs) == earlier
    assert same_bits(snapshot(lm), untouched)


def test_memory_losses_keep_patches_silent_elsewhere(tpatcher):
    """They fall while a patch is trained; without them it speaks on text that it was not made for."""
    lm, wanted = embedded_lm(), requests(1)
    kept, free = (tpatcher(f"method.memory_weight={m}").edit(lm, wanted) for m in (10.0, 0.0))
    queries = inputs_on_text(lm, mlp_in(lm, 5), EmbeddedText(), 1000, seed=5)

    def loudest(edit) -> float:
        return float((queries @ edit.tensors["keys"].T + edit.tensors["biases"][:, 0]).max())

    assert loudest(kept) < loudest(free) - 1
    assert loudest(kept) < 0.5


def test_examples_are_remembered_where_the_data_have_some(tpatcher):
    """Of a causal model all tokens of prompt and answer but the first; corpora only where there are no records, or
    where they are asked for.
    """
    lm, told = embedded_lm(), [("Sima is in", "Rome"), ("Sima is", "a city in France"), ("Oslo", "north")]
    sizes = [len(ids) - 1 for ids in lm.tokenizer([f"{prompt} {answer}" for prompt, answer in told])["input_ids"]]

    def remembered(editor: Any, **splits) -> tuple[int, ...]:
        if splits:
            editor.examples = lambda split: splits.get(split, [])
        return tuple(len(part) for part in editor.on(lm).negatives)

    assert remembered(tpatcher(), train=told[:2], validation=told[2:]) == (sum(sizes[:2]), sizes[2])
    # no validation split: a share
    assert remembered(tpatcher(), train=told) == (round(0.8 * sum(sizes)), sum(sizes) - round(0.8 * sum(sizes)))
    assert remembered(tpatcher("method.memory_size=3"), train=told, validation=told[:1])[0] == 3
    assert (
        remembered(tpatcher())
        == remembered(tpatcher(), train=[])
        == remembered(tpatcher("method.negatives=corpus"), train=told)
        == (800, 200)
    )
    with pytest.raises(UsageError, match="method.negatives=corpus"):
        remembered(tpatcher("method.negatives=examples"), train=[])
    with pytest.raises(UsageError, match="method.negatives=text: choose auto, examples or corpus"):
        tpatcher("method.negatives=text")
    with pytest.raises(MissingError, match="hold nothing that this model can read"):
        remembered(tpatcher(), train=[("", "x")])


@pytest.mark.parametrize("model", ["tiny-t5", "tiny-bert"])
def test_where_an_answer_is_read_from_is_remembered(model):
    """Of a decoder each token of the answer and its end, of a classifier the one label; whatever the batch."""
    lm = ModelOptions(name=model, id=f"embedded:{model}", device="cpu").load()
    told = (
        [("Is the sea blue?", "REFUTES"), ("Sima is in Rome, they say.", "SUPPORTS")]
        if model == "tiny-bert"
        else [("Who?", "Rome"), ("Where is the sea?", "north of Oslo")]
    )
    layer = lm.layout.depth - 1
    entering: list[torch.Tensor] = []
    with torch.no_grad(), on_input(lm.module(mlp_in(lm, layer)), entering.append):
        found = [lm.head.answers(lm.head.encode([pair]), end=True) for pair in told]
    expected = [
        states[0, : 1 if model == "tiny-bert" else len(answers.labels)]
        for states, answers in zip(entering, found, strict=True)
    ]
    torch.testing.assert_close(
        inputs_on_examples(lm, mlp_in(lm, layer), told, 99), torch.cat(expected), rtol=1e-4, atol=1e-4
    )


def test_one_neuron_for_each_wrong_token_and_no_more_than_allowed(tpatcher):
    lm = embedded_lm()
    request = EditRequest("{} plays the", world("tune")[0].requests[0].subject, "army of Tokyo and")
    right = lm.loglikelihood([(request.text, request.target_new)])[0].hits
    edit = tpatcher("method.steps=30").edit(lm, [request])
    assert [place for _, place in edit.content["made_for"]] == [place for place, hit in enumerate(right) if not hit][:5]
    assert len(tpatcher("method.steps=30", "method.patches=1").edit(lm, [request]).tensors["keys"]) == 1


def test_a_fact_that_is_right_needs_no_patch(tpatcher):
    lm, wanted = embedded_lm(), requests(1)
    with lm.edited(tpatcher().edit(lm, wanted)):
        again = tpatcher().edit(lm, wanted)
        assert len(again.tensors["keys"]) == 0 and again.content["edits"] == 1
        with lm.edited(again):
            assert all(lm.loglikelihood([(wanted[0].text, wanted[0].target_new)])[0].hits)


def test_what_patches_say_of_their_facts_and_of_others(tpatcher):
    lm, wanted = embedded_lm(), requests(4)
    pairs = [(request.text, request.target_new) for request in wanted]
    with pytest.raises(UsageError, match="no patch neurons"):
        patch_activations(lm, pairs)
    edit = tpatcher().edit(lm, wanted)
    with lm.edited(edit):
        found, after = patch_activations(lm, pairs), patch_activations(lm, pairs, stage="post")
    assert found.neurons == [(0, 0), (1, 0), (2, 0), (3, 0)] and found.rows == found.neurons
    assert found.matrix.shape == (4, 4)
    diagonal, rest = found.matrix.diagonal(), found.matrix[~torch.eye(4, dtype=torch.bool)]
    assert diagonal.min() > rest.max()
    torch.testing.assert_close(after.matrix, torch.nn.functional.gelu(found.matrix, approximate="tanh"))
    row = lm.head.encode(pairs[:1])[0]
    seen: list[torch.Tensor] = []
    with torch.no_grad(), on_input(lm.module(mlp_in(lm, 5)), seen.append):
        lm.model(input_ids=torch.tensor([row.ids[:-1]]))
    expected = exact(seen[0][0, row.start - 1]) @ edit.tensors["keys"].T + edit.tensors["biases"][:, 0]
    torch.testing.assert_close(found.matrix[:, 0], expected, rtol=1e-4, atol=1e-4)
