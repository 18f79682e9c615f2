"""GRACE: the codebook by hand, routing under padding and in generation, and a memory that is undone, saved and
refused.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from embedded import embedded_lm, packaged_editor, requests, same_bits, snapshot, world
from families import tiny_lm
from torch import nn

from edit_cli.editors.memory.base import GAP, Entries, module_of, nearest
from edit_cli.editors.memory.grace import Codebook, GraceLayer, GracePatch, replaced
from edit_cli.edits import store as edit_store
from edit_cli.errors import MissingError, UsageError
from edit_cli.lm.prompt_position import PromptPosition
from edit_cli.requests import EditRequest


@pytest.fixture
def grace(tmp_path):
    """grace(*overrides): the packaged editor."""
    return lambda *overrides: packaged_editor(tmp_path, "grace", *overrides)


def answered(lm, wanted) -> list[bool]:
    return [all(score.hits) for score in lm.loglikelihood([(request.text, request.target_new) for request in wanted])]


def empty_book(radius: float) -> Codebook:
    """On top of a codebook of keys (n, 2) that has no entry yet."""
    attached: Any = SimpleNamespace(
        **{part: Entries(width, torch.device("cpu"), torch.float64) for part, width in (("keys", 2), ("radii", 1))}
    )
    return Codebook(attached, radius)


def at(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_far_query_begins_a_key_of_its_own():
    book = empty_book(radius=1.0)
    assert book.add_key(at(0, 0), (7,)) == 0
    assert book.add_key(at(2.5, 0), (7,)) == 1  # 2.5 > 1 + 1, whatever the answer
    assert book.radii == {0: 1.0, 1: 1.0}


def test_the_same_answer_expands_the_nearest_key_to_hold_the_query():
    book = empty_book(radius=1.0)
    book.add_key(at(0, 0), (7, 8))
    assert book.add_key(at(1.5, 0), (7, 8)) == 0
    assert book.radii == {0: 1.5}
    assert book.add_key(at(0.5, 0), (7, 8)) == 0
    assert book.radii == {0: 1.5}  # it holds it already


def test_another_answer_splits_the_two_half_way():
    book = empty_book(radius=1.0)
    book.add_key(at(0, 0), (7,))
    assert book.add_key(at(1.5, 0), (9,)) == 1
    assert book.radii[0] == pytest.approx(0.75 - GAP, abs=1e-7)
    assert book.radii[1] == pytest.approx(0.75, abs=1e-7)
    assert book.radii[0] + book.radii[1] < 1.5


def test_a_split_never_enlarges_a_ball():
    book = empty_book(radius=1.0)
    book.add_key(at(0, 0), (7,))
    book.add_key(at(0.4, 0), (9,))  # both shrink to 0.2
    book.add_key(at(-1.1, 0), (9,))  # within 1 + 0.2 of the first: half-way would be 0.55
    assert book.radii[0] == pytest.approx(0.2 - GAP, abs=1e-7)
    assert book.radii[2] == pytest.approx(0.55, abs=1e-7)


def test_answers_are_equal_only_token_by_token():
    """Reference code compares means of token ids: (1, 3) and (2, 2) would be one answer."""
    book = empty_book(radius=1.0)
    book.add_key(at(0, 0), (1, 3))
    assert book.add_key(at(0.5, 0), (2, 2)) == 1


def test_a_correction_takes_the_place_of_what_it_corrects():
    book = empty_book(radius=1.0)
    book.add_key(at(3, 4), (7,))
    assert book.add_key(at(3, 4), (9,)) == 1
    assert book.radii[0] < 0 and book.radii[1] == 1.0
    assert book.add_key(at(3, 4.5), (9,)) == 1


def test_small_distances_between_long_vectors_keep_their_digits():
    """The matrix product alone would be off by more than the distance itself."""
    keys = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)) * 3 + 100
    queries = keys[[5, 17]] + 1e-3
    distance, index = nearest(queries, keys)
    assert index.tolist() == [5, 17]
    torch.testing.assert_close(distance, (queries - keys[[5, 17]]).norm(dim=1))
    assert nearest(queries, keys, torch.arange(300) != 5)[1].tolist()[0] != 5


@pytest.mark.parametrize(
    ("which", "include", "expected"),
    [
        ("last", False, [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]),
        ("prompt", False, [[1, 1, 0, 0, 0], [0, 1, 1, 0, 0]]),
        ("prompt", True, [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0]]),
        ("all", False, [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]),
    ],
)
def test_which_tokens_are_replaced(which, include, expected):
    position = PromptPosition(torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]), torch.tensor([2, 3]), 0)
    assert replaced(position, which, include).int().tolist() == expected


def test_outside_every_radius_the_output_is_the_models_own_bit_for_bit(grace):
    lm, wanted = embedded_lm(), requests(3)
    others = [probe.prompt for case in world("test")[:20] for probe in case.probes if probe.kind == "neighborhood"]
    pairs = [(prompt, "Paris") for prompt in others]
    before = lm.loglikelihood(pairs)
    with lm.edited(grace("method.radius=0.5").edit(lm, wanted)):
        assert lm.loglikelihood(pairs) == before
        assert all(answered(lm, wanted))


def two_wordings() -> list[EditRequest]:
    """A new fact, and another wording with the old answer: known before, and within reach of the new one's key."""
    case = world("tune")[0]
    wording = next(probe.prompt for probe in case.probes if probe.kind == "paraphrase")
    return [case.requests[0], EditRequest(wording, None, case.requests[0].target_true or "")]


@pytest.mark.parametrize("sizes", [(10,), (5, 5), (1, 9)])
def test_many_at_once_are_one_at_a_time(sizes, grace):
    """The same entries, radii and values, bit for bit, whether facts come in one edit or in several."""
    lm, wanted = embedded_lm(), [*two_wordings(), *requests(8, start=1)]
    made, name, found = grace("method.radius=5"), module_of(lm, 5, "mlp_in"), []
    for cut in ((1,) * len(wanted), sizes):
        left = list(wanted)
        for size in cut:
            lm.attach(made.edit(lm, left[:size]))
            del left[:size]
        layer = GracePatch.present(lm, name)
        found.append((list(layer.answers), *(getattr(layer, part).all.clone() for part in ("keys", "radii", "values"))))
        for _ in cut:
            lm.detach()
    (answers, *parts), (answers_at_once, *parts_at_once) = found
    assert answers == answers_at_once
    assert float(parts[1].min()) < 5  # some keys were split
    assert all(torch.equal(one, other) for one, other in zip(parts, parts_at_once, strict=True))


def test_a_fact_that_an_earlier_one_of_the_same_edit_takes_away_gets_its_entry(grace):
    lm, (fact, known) = embedded_lm(), two_wordings()
    assert answered(lm, [fact, known]) == [False, True]
    with lm.edited(grace().edit(lm, [fact, known])):
        assert answered(lm, [fact, known]) == [True, True]
    # first in turn it is right and needs none, as published, so the later fact covers it; with an entry it stays
    with lm.edited(grace().edit(lm, [known, fact])):
        assert answered(lm, [fact, known]) == [True, False]
    with lm.edited(grace("method.only_mistakes=false").edit(lm, [known, fact])):
        assert answered(lm, [fact, known]) == [True, True]


def test_a_sequence_is_one_layer_and_comes_off_edit_by_edit(grace):
    lm, untouched = embedded_lm(), snapshot(embedded_lm())
    editor, wanted, name = grace("method.radius=5"), requests(40), module_of(embedded_lm(), 5, "mlp_in")
    seen = []
    for request in wanted:
        layer = GracePatch.present(lm, name)
        seen.append(
            None
            if layer is None
            else (layer.digest, layer.radii.all.clone(), layer.values.all.clone(), list(layer.answers))
        )
        lm.attach(editor.edit(lm, [request]))
    assert isinstance(lm.module(name), GraceLayer) and not isinstance(lm.module(name).original, GraceLayer)
    # radii of earlier entries have moved
    assert any(isinstance(edit, GracePatch) and len(edit.tensors["moved"]) for edit in lm.attached)
    for before in reversed(seen):
        lm.detach()
        layer = GracePatch.present(lm, name)
        if before is None:
            assert layer is None
        else:
            assert (layer.digest, layer.answers) == (before[0], before[3])
            assert torch.equal(layer.radii.all, before[1]) and torch.equal(layer.values.all, before[2])
    assert same_bits(snapshot(lm), untouched)
    assert lm.head.trackers == 0 and not lm.model._forward_pre_hooks


@pytest.mark.parametrize("replace", ["last", "prompt", "all"])
def test_generation_from_a_cache_is_computing_anew(replace, grace):
    """Left-padded prompts of different lengths, continued token by token, against whole rows without a cache."""
    lm, wanted = embedded_lm(), requests(4)
    prompts = [request.text for request in wanted] + ["In winter, " + wanted[0].text, world("test")[0].requests[0].text]
    with lm.edited(grace(f"method.replace={replace}", "method.layer=4").edit(lm, wanted)):
        texts = lm.generate(prompts, 5)
        assert [lm.generate([prompt], 5)[0] for prompt in prompts] == texts
        for prompt, text in zip(prompts, texts, strict=True):
            assert all(lm.loglikelihood([(prompt, text)])[0].hits)


def test_the_query_is_the_prompts_last_token_whatever_is_in_the_batch(grace):
    lm, wanted = embedded_lm(), requests(6)
    pairs = [
        (request.text, target)
        for request in wanted
        for target in (request.target_new, request.target_true, "Paris and a long answer")
        if target is not None
    ]
    with lm.edited(grace().edit(lm, wanted)):
        together = lm.loglikelihood(pairs)
        for pair, score in zip(pairs, together, strict=True):
            alone = lm.loglikelihood([pair])[0]
            assert alone.predicted == score.predicted and alone.nll == pytest.approx(score.nll, rel=1e-3, abs=1e-3)


def test_what_is_answered_already_gets_no_entry(grace):
    lm, wanted = embedded_lm(), requests(2)
    with lm.edited(grace().edit(lm, wanted)):
        assert len(grace().edit(lm, wanted).tensors["keys"]) == 0
    assert len(grace("method.only_mistakes=false").edit(lm, wanted).tensors["keys"]) == 2


def test_radius_auto_is_measured_and_stays_with_the_codebook(grace):
    lm, wanted = embedded_lm(), requests(2)
    first = grace("method.radius=auto").edit(lm, wanted[:1])
    assert 1.0 < first.content["radius"] < 8.0
    assert grace("method.radius=auto").edit(lm, wanted).content["radius"] == first.content["radius"]
    with lm.edited(first):
        assert grace("method.radius=auto").edit(lm, wanted[1:]).content["radius"] == first.content["radius"]


def test_a_memory_of_another_model_or_of_other_edits_is_refused(grace, tmp_path):
    lm, wanted = embedded_lm(), requests(2)
    first = grace().edit(lm, wanted[:1])
    edit_store.save(first, tmp_path / "first", lm, wanted[:1], {"name": "grace"})
    with pytest.raises(MissingError, match="made for"):
        edit_store.load(tmp_path / "first", tiny_lm("gpt2"))
    with lm.edited(first):
        second = grace().edit(lm, wanted[1:])
        edit_store.save(second, tmp_path / "second", lm, wanted[1:], {"name": "grace"}, tmp_path / "first")
    with pytest.raises(UsageError, match="on earlier edits"):
        lm.attach(second)
    assert lm.attached == []
    edit_store.attach(tmp_path / "second", lm)
    assert all(answered(lm, wanted))


def test_flattened_inputs_are_rows_and_tokens(grace):
    """Some families work on (rows · tokens, width) in their MLP."""

    class Flat(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, states):
            return self.inner(states.reshape(-1, states.shape[-1])).view(states.shape)

    lm, wanted = embedded_lm(), requests(2)
    with lm.edited(grace().edit(lm, wanted)):
        expected = lm.loglikelihood([(request.text, request.target_new) for request in wanted])
        block = lm.module(lm.layout.block(5))
        block.mlp = Flat(block.mlp)
        assert lm.loglikelihood([(request.text, request.target_new) for request in wanted]) == expected
        block.mlp = block.mlp.inner
