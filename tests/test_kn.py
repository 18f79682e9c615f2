"""Knowledge neurons: attributions against a plain loop and against what they must add up to; which values move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from embedded import embedded_lm, requests
from families import tiny_lm

from edit_cli.editors.locate.context_prefixes import ContextConfig
from edit_cli.editors.locate.kn import KN, KNConfig, attributions
from edit_cli.edits.edit import Factors
from edit_cli.lm.tokenization import Row
from edit_cli.requests import EditRequest

ALONE = KNConfig(context=ContextConfig(prefixes=[]), steps=4)


@pytest.fixture(scope="module")
def lm():
    return embedded_lm()


def probability(lm, ids, answer, layer, activation):
    """P(answer) where `activation` enters the projection at the last token, by hooks of PyTorch alone."""

    def put(_, args):
        whole = args[0].clone()
        whole.view(*args[0].shape)[..., -1, :] = activation
        return (whole,)

    with lm.module(lm.layout.mlp_out(layer)).register_forward_pre_hook(put):
        return lm.model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[answer]


def activation(lm, ids, layer):
    seen = []
    module = lm.module(lm.layout.mlp_out(layer))
    with module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()[..., -1, :].reshape(-1))):
        lm.model(input_ids=torch.tensor([ids]))
    return seen[0]


@pytest.mark.parametrize("family", ["embedded", "llama"])
def test_attributions_are_those_of_a_plain_loop(family, lm):
    model = lm if family == "embedded" else tiny_lm(family)
    rows = [Row(ids, len(ids), ()) for ids in ((5, 6, 7, 8), (9, 10), (5, 6, 11, 12, 13))]
    found = attributions(model, rows, 42, 1, 3)
    for row, told in zip(rows, found, strict=True):
        whole, total = activation(model, row.ids, 1), 0
        for share in (1 / 3, 2 / 3, 1):
            point = (share * whole).requires_grad_()
            total = total + torch.autograd.grad(probability(model, row.ids, 42, 1, point), point)[0]
        torch.testing.assert_close(told, whole * total / 3, atol=1e-8, rtol=2e-3)


def test_they_add_up_to_the_probability_that_the_activations_are_responsible_for(lm):
    """By an error that falls with the number of steps."""
    (fact,) = requests(1)
    (row,) = lm.head.encode([(fact.text, fact.target_true)])
    prompt, answer = row.until(row.start - 1), row.target[0]
    for layer in (0, 4):
        whole = activation(lm, prompt.ids, layer)
        with torch.no_grad():
            ends = [probability(lm, prompt.ids, answer, layer, share * whole).item() for share in (0.0, 1.0)]
        wanted = ends[1] - ends[0]
        found = [attributions(lm, [prompt], answer, layer, steps).sum().item() for steps in (5, 20, 80)]
        coarse, fine, finest = (abs(each - wanted) for each in found)
        assert finest < fine / 3 < coarse / 6 and finest < 0.1 * abs(wanted)


@pytest.mark.parametrize("family", ["embedded", "llama"])
def test_what_the_neurons_write_moves_from_the_old_answer_to_the_new_one(family, lm):
    """Also where some are negative at the prompt, as in gated MLPs."""
    model = lm if family == "embedded" else tiny_lm(family)
    fact = requests(1)[0] if family == "embedded" else EditRequest("{} is in", "Paris", "Rome")
    edit = KN(replace(ALONE, fewest=20, most=40), model).edit([fact])
    (row,) = model.head.encode([(fact.text, fact.target_new)])
    prompt = row.ids[: row.start]
    with torch.no_grad():
        says = int(model.model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())
    network: Any = model.model
    embedding = network.get_output_embeddings().weight
    towards = 8 * embedding[row.target[0]] / embedding[row.target[0]].norm() - embedding[says] / embedding[says].norm()
    signs = set()
    for layer in {layer for layer, _ in edit.info["neurons"][0]}:
        name, keys = model.layout.mlp_out(layer), activation(model, prompt, layer)
        numbers = [number for one, number in edit.info["neurons"][0] if one == layer]
        sizes = model.weight(name)[:, numbers].norm(dim=0)
        factors = edit.updates[f"{name}.weight"]
        assert isinstance(factors, Factors)
        written = factors.dense() @ keys
        torch.testing.assert_close(written, (sizes * keys[numbers].abs()).sum() * towards, atol=1e-4, rtol=1e-4)
        signs |= {bool(keys[number] < 0) for number in numbers}
    assert family == "embedded" or signs == {True, False}


def test_values_move_from_what_the_model_says_to_the_new_answer(lm):
    (fact,) = requests(1)
    edit = KN(ALONE, lm).edit([fact])
    (neurons,) = edit.info["neurons"]
    assert neurons
    (row,) = lm.head.encode([(fact.text, fact.target_new)])
    with torch.no_grad():
        says = int(lm.model(input_ids=torch.tensor([row.ids[: row.start]])).logits[0, -1].argmax())
    embedding = lm.model.transformer.wte.weight
    old, new = embedding[says], embedding[row.target[0]]
    for layer in range(lm.layout.depth):
        name = f"{lm.layout.mlp_out(layer)}.weight"
        values, own = lm.parameter(name), [number for one, number in neurons if one == layer]
        moved = edit.stored(lm, name) if name in edit.updates else torch.zeros_like(values)
        expected = torch.zeros_like(values)
        for number in own:
            expected[number] = (
                activation(lm, row.ids[: row.start], layer)[number].sign()
                * values[number].norm()
                * (8 * new / new.norm() - old / old.norm())
            )
        torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)
    plain = KN(replace(ALONE, scaled=False, subtract=2.0, add=2.0), lm).edit([fact])
    factors = next(iter(plain.updates.values()))
    assert isinstance(factors, Factors)
    torch.testing.assert_close(factors.left[:, 0], 2 * new - 2 * old)


def test_how_many_neurons_are_kept(lm):
    """The share of prompts moves until there are two to five; where nothing is shared, the strongest stay."""
    editor = KN(ALONE, lm)
    shared = torch.zeros(10, 30)
    shared[:, :3] = 1.0  # in all prompts
    shared[:6, 3] = 1.0  # in six of ten
    assert editor._refined(shared) == [0, 1, 2]
    shared[:, 1:3] = 0.0
    assert editor._refined(shared) == [0, 3]  # seven of ten would leave one
    shared[:9, 10:16] = 1.0
    assert editor._refined(shared) == [0]  # nine of ten would leave seven
    apart = torch.eye(10, 30) + 0.1 * torch.eye(10, 30)[:, [1, 0, *range(2, 30)]]
    assert len(editor._refined(apart)) == 2
    weak = torch.zeros(10, 30)
    weak[:, 4], weak[:, 5] = 1.0, 0.19  # below the threshold of 0.2
    assert editor._refined(weak) == [4]
