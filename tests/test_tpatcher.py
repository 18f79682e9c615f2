"""T-Patcher: its losses and its start by hand in float64, what it leaves alone, and what patches say of facts."""

from __future__ import annotations

import math

import pytest
import torch
from embedded import embedded_lm, packaged_editor, same_bits, snapshot, world

from edit_cli.editors.memory import mlp_in
from edit_cli.editors.queries import inputs_on_text
from edit_cli.editors.tpatcher import NeuronPatch, Neurons, PatchedLayer, TPatcher, patch_activations, top_exp
from edit_cli.errors import UsageError
from edit_cli.lm.hooks import exact, on_input
from edit_cli.requests import EditRequest

SMALL = ("method.memory_size=2000", "method.validation_size=500", "method.top_memory=200")


def requests(count: int):
    return [case.requests[0] for case in world("tune")[:count]]


@pytest.fixture
def tpatcher(tmp_path):
    return lambda *overrides: packaged_editor(tmp_path, "tpatcher", *SMALL, *overrides)


def neurons() -> tuple[Neurons, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    keys, biases, weights, queries = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((2, 3), (2,), (2, 3), (2, 3)))
    return Neurons(keys, biases, weights, torch.full_like(weights, 10.0)), queries


def test_top_exp_is_the_mean_of_the_largest():
    values = torch.tensor([[0.0, 1.0], [2.0, -1.0], [1.0, 5.0]], dtype=torch.float64)
    expected = (math.exp(2) + math.exp(1) + math.exp(5) + math.exp(1)) / 4
    assert float(top_exp(values, 2)) == pytest.approx(expected, rel=1e-12)
    assert float(top_exp(values, 99)) == pytest.approx(sum(map(math.exp, (0, 1, 2, -1, 1, 5))) / 6, rel=1e-12)
    assert float(top_exp(torch.tensor([[1e6]]), 1)) == pytest.approx(math.exp(30), rel=1e-6)  # clamped, not infinite


def test_losses_by_hand():
    added, queries = neurons()
    memory = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    editor = TPatcher(beta=-3.0, gamma=3.0, top_activation=5, top_memory=4)
    own = [sum(q * k for q, k in zip(queries[p].tolist(), added.keys[p].tolist(), strict=True)) + added.biases[p].item() for p in range(2)]
    assert float(editor._activation_loss(added, queries)) == pytest.approx(sum(math.exp(-a) for a in own) / 2, rel=1e-12)

    def elsewhere(m: int, p: int) -> float:
        return sum(x * k for x, k in zip(memory[m].tolist(), added.keys[p].tolist(), strict=True)) + added.biases[p].item()

    below = [sorted((math.exp(elsewhere(m, p) + 3) for m in range(7)), reverse=True)[:4] for p in range(2)]
    apart = [sorted((math.exp(elsewhere(m, p) - own[p] + 3) for m in range(7)), reverse=True)[:4] for p in range(2)]
    expected = sum(map(sum, below)) / 8 + sum(map(sum, apart)) / 8
    assert float(editor._memory_losses(added, queries, memory)) == pytest.approx(expected, rel=1e-12)


def test_a_patch_starts_with_a_pre_activation_of_exactly_one():
    queries = torch.randn(4, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 7
    added = TPatcher().__class__(value_scale=10.0)._start(queries, 0)
    torch.testing.assert_close(added.own(queries), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(added.values, 10 * added.weights)
    again = TPatcher()._start(queries[2:], 2)
    assert torch.equal(again.weights, added.weights[2:])  # a neuron's start depends on its number alone


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
    ids, seen, out = torch.arange(5, 17)[None], [], []
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
    assert isinstance(lm.module(name), PatchedLayer) and not isinstance(lm.module(name).original, PatchedLayer)
    assert lm.module(name).edits == 3 and [edit for edit, _ in lm.module(name).made_for] == [0, 1, 2]
    assert all(all(score.hits) for score in answers[-1])
    for earlier in reversed(answers[:-1]):
        lm.detach()
        assert lm.loglikelihood(pairs) == earlier
    assert same_bits(snapshot(lm), untouched)


def test_memory_losses_keep_patches_silent_elsewhere(tpatcher):
    """They fall while a patch is trained; without them it speaks on text that it was not made for."""
    lm, wanted = embedded_lm(), requests(1)
    kept, free = (tpatcher(f"method.memory_weight={m}").edit(lm, wanted) for m in (10.0, 0.0))
    queries = inputs_on_text(lm, mlp_in(lm, 5), tpatcher().corpus, 1000, seed=5)

    def loudest(edit) -> float:
        return float((queries @ edit.tensors["keys"].T + edit.tensors["biases"][:, 0]).max())

    assert loudest(kept) < loudest(free) - 1
    assert loudest(kept) < 0.5


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
