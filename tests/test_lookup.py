"""The manual cache: edits of one kind are one cache, and the nearest fact answers, whenever it was stored."""

from __future__ import annotations

import pytest
import torch
from embedded import embedded_lm, prepared, requests, world

from edit_cli.editors.retrieval.lookup import Lookup, mean_states
from edit_cli.edits import store as edit_store
from edit_cli.requests import EditRequest


@pytest.fixture(scope="module")
def lm():
    return embedded_lm()


def paraphrase(number: int) -> str:
    return next(probe.prompt for probe in world("tune")[number].probes if probe.kind == "paraphrase")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_nearest_fact_answers_whenever_it_was_stored(lm, order):
    """Two facts whose radii both hold the prompt, in one edit or in two, in either order."""
    wanted = requests(2)
    states = mean_states(lm, [paraphrase(0), *(request.text for request in wanted)])
    near, far = (states[1:] - states[0]).norm(dim=1).tolist()
    assert near < far
    editor, asked = prepared(Lookup, radius=far + 1.0), [paraphrase(0)]
    lm.attach(editor.edit(lm, [wanted[order[0]]]))
    lm.attach(editor.edit(lm, [wanted[order[1]]]))
    in_two = lm.generate(asked, 4), lm.loglikelihood([(asked[0], wanted[0].target_new)])
    lm.detach()
    lm.detach()
    with lm.edited(editor.edit(lm, [wanted[i] for i in order])):
        assert (lm.generate(asked, 4), lm.loglikelihood([(asked[0], wanted[0].target_new)])) == in_two
    assert in_two[0][0].split()[0] == wanted[0].target_new.split()[0]


def test_a_correction_replaces_what_it_corrects_for_other_wordings_too(lm, tmp_path):
    fact = requests(1)[0]
    editor, later = prepared(Lookup, radius=100.0), EditRequest(fact.prompt, fact.subject, "Paris")
    with lm.edited(editor.edit(lm, [fact, later])):
        assert lm.generate([fact.text, paraphrase(0)], 4) == [" Paris", " Paris"]
    lm.attach(editor.edit(lm, [fact]))
    second = editor.edit(lm, [later])
    edit_store.save(second, tmp_path / "second", lm, [later], {"name": "lookup"})
    loaded = edit_store.load(tmp_path / "second", lm)
    with lm.edited(loaded):
        assert lm.generate([fact.text, paraphrase(0)], 4) == [" Paris", " Paris"]
    assert lm.generate([paraphrase(0)], 4)[0].split()[0] == fact.target_new.split()[0]  # taken off, the first is back
    lm.detach()
    assert lm.attached == []


def test_caches_of_other_radii_stand_in_front_of_each_other(lm):
    wanted = requests(2)
    with (
        lm.edited(prepared(Lookup, radius=100.0).edit(lm, wanted[:1])),
        lm.edited(prepared(Lookup, mode="exact").edit(lm, wanted[1:])),
    ):
        asked = [wanted[1].text, wanted[0].text, paraphrase(1)]
        first = [text.split()[0] for text in lm.generate(asked, 4)]
        assert first == [request.target_new.split()[0] for request in (wanted[1], wanted[0], wanted[0])]


def test_keys_are_means_over_a_prompts_own_tokens(lm):
    together, alone = mean_states(lm, [paraphrase(0), "In"]), mean_states(lm, ["In"])
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)
