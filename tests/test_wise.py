"""WISE: TIES by hand, routing row by row, masks and shards, and a side memory that comes off exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from embedded import embedded_lm, packaged_editor, requests, same_bits, snapshot, world

from edit_cli.editors.memory.side_memory import SideMemory, WiseLayer, WisePatch, pooled_score, route, ties
from edit_cli.editors.memory.wise import hinge
from edit_cli.errors import UsageError
from edit_cli.lm.prompt_position import PromptPosition

QUICK = ("method.steps=30", "method.context.per_start=1")


@pytest.fixture
def wise(tmp_path):
    return lambda *overrides: packaged_editor(tmp_path, "wise", *QUICK, *overrides)


def test_ties_by_hand():
    first = torch.tensor([[4.0, -1.0, 0.5, -3.0, 0.0]], dtype=torch.float64)
    second = torch.tensor([[2.0, 2.0, -4.0, -1.0, 0.1]], dtype=torch.float64)
    # the largest 3 of 5: (4, −1, ·, −3, ·) and (2, 2, −4, ·, ·); signs of the sums: + + − −
    expected = torch.tensor([[3.0, 2.0, -4.0, -3.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(ties([first, second], [0.5, 0.5], 0.6), expected)
    # weights elect and average: 0.8 · 4 and 0.2 · 2; in the second column −0.8 outvotes 0.4
    expected = torch.tensor([[3.6, -1.0, -4.0, -3.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(ties([first, second], [0.8, 0.2], 0.6), expected)


def test_one_shard_alone_is_only_trimmed():
    shift = torch.arange(1.0, 11.0).view(2, 5)
    assert ties([shift], [1.0], 0.3).flatten().tolist() == [0.0] * 7 + [8.0, 9.0, 10.0]


def test_each_row_is_routed_by_its_own_prompt():
    """Three rows of one batch: activating it enough, too little, and only by what comes after the prompt."""
    inputs = torch.zeros(3, 4, 2)
    inputs[0, :2, 0], inputs[1, :2, 0], inputs[2, 2:, 0] = 3.0, 1.0, 9.0
    position = PromptPosition(torch.ones(3, 4, dtype=torch.long), torch.tensor([1, 1, 1]), 0)
    side = SideMemory(torch.eye(2), epsilon=2.0)
    assert route(inputs, position, [side], act_ratio=1.0).tolist() == [0, -1, -1]
    assert route(inputs, position, [side], act_ratio=0.4).tolist() == [0, 0, -1]


def test_a_prompts_score_is_the_mean_over_its_tokens_or_that_of_its_last():
    scores, tokens = (
        torch.tensor([[1.0, 2.0, 6.0, 9.0], [9.0, 4.0, 2.0, 9.0]]),
        torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0]]),
    )
    assert pooled_score(scores, tokens, "mean").tolist() == [3.0, 3.0]
    assert pooled_score(scores, tokens, "last").tolist() == [6.0, 2.0]


def test_what_the_memory_must_not_answer_comes_from_the_training_records_where_there_are_any(wise):
    lm, wanted, asked = embedded_lm(), requests(1), []
    editor = wise("method.steps=1")

    def examples(split):
        asked.append(split)
        return [("The lake near Oslo is", "deep"), (wanted[0].text, "secret")]

    editor.examples = examples
    editor.edit(lm, wanted)
    assert asked == ["train"] and editor.on(lm)._texts == [
        "The lake near Oslo is deep",
        f"{wanted[0].text} secret",
    ]
    assert len(editor.on(lm)._irrelevant(wanted, 0)) == 1  # the other one names the subject
    with pytest.raises(UsageError, match="the data have no training records"):
        wise("method.elsewhere=examples").edit(embedded_lm(), wanted)


def test_padding_counts_for_nothing():
    inputs = torch.tensor([[[9.0], [9.0], [1.0], [1.0]]])
    left = PromptPosition(torch.tensor([[0, 0, 1, 1]]), torch.tensor([3]), 0)
    assert route(inputs, left, [SideMemory(torch.eye(1), 2.0)], 1.0).tolist() == [-1]


def test_the_memory_with_the_highest_score_answers_or_none():
    inputs = torch.ones(1, 1, 1)
    position = PromptPosition(torch.ones(1, 1, dtype=torch.long), torch.tensor([0]), 0)
    weak, strong = SideMemory(torch.tensor([[2.0]]), 1.0), SideMemory(torch.tensor([[3.0]]), 5.0)
    assert route(inputs, position, [weak], 1.0).tolist() == [0]
    # the strongest wins, and it is below its threshold
    assert route(inputs, position, [weak, strong], 1.0).tolist() == [-1]
    assert route(inputs, position, [weak, SideMemory(strong.shift, 1.0)], 1.0).tolist() == [1]


def test_only_the_masked_part_is_written(wise):
    lm, wanted, name = embedded_lm(), requests(1), embedded_lm().layout.mlp_out(4)
    with lm.edited(wise("method.layer=4", "method.mask_ratio=0.3").edit(lm, wanted)):
        layer: Any = lm.module(name)
        outside = layer.shift[~layer.mask(0)]
        assert float(outside.abs().max()) == 0 and float(layer.shift.abs().max()) > 0
        assert 0.28 < float(layer.mask(0).float().mean()) < 0.32
        assert all(lm.loglikelihood([(wanted[0].text, wanted[0].target_new)])[0].hits)


def test_rows_that_are_not_routed_keep_their_answers_bit_for_bit(wise):
    lm, wanted = embedded_lm(), requests(1)
    pairs = [(case.requests[0].text, "Paris") for case in world("test")[:40]]
    before = lm.loglikelihood(pairs)
    with lm.edited(wise("method.act_ratio=1.0").edit(lm, wanted)):
        after = lm.loglikelihood(pairs)
    same = [new == old for new, old in zip(after, before, strict=True)]
    assert sum(same) > 30


def test_shards_are_finished_and_merged_and_come_back(wise):
    """Two facts a shard, merged after four; edit by edit the memory is put back as it was."""
    lm, wanted, name = embedded_lm(), requests(6), embedded_lm().layout.mlp_out(4)
    untouched = snapshot(lm)
    editor = wise("method.layer=4", "method.shard_every=2", "method.merge_every=4")
    seen = []
    for request in wanted:
        layer = WisePatch.present(lm, name)
        seen.append(
            None if layer is None else (layer.digest, [side.shift.clone() for side in layer.memories], layer.merged)
        )
        lm.attach(editor.edit(lm, [request]))
    layer = WisePatch.present(lm, name)
    assert isinstance(layer, WiseLayer) and (layer.edits, layer.shards, layer.merged, len(layer.finished)) == (
        6,
        3,
        True,
        2,
    )
    assert [memories is None or len(memories[1]) for memories in seen] == [True, 1, 1, 2, 1, 2]
    for before in reversed(seen):
        lm.detach()
        layer = WisePatch.present(lm, name)
        if before is None:
            assert layer is None
            continue
        assert (layer.digest, layer.merged) == (before[0], before[2])
        assert all(torch.equal(side.shift, shift) for side, shift in zip(layer.memories, before[1], strict=True))
    assert same_bits(snapshot(lm), untouched)


def test_merged_groups_stay_apart_and_are_retrieved(wise):
    """Two facts a group: a third is at work while two merged ones stand beside it; taken off, they come back."""
    lm, wanted, name = embedded_lm(), requests(5), embedded_lm().layout.mlp_out(4)
    shards = ("method.layer=4", "method.shard_every=1", "method.density=0.5")
    apart, grouped = (wise(*shards, f"method.merge_every={every}", "method.retrieve=true") for every in ("null", 2))
    with lm.edited(apart.edit(lm, wanted[:2])):
        first = WisePatch.present(lm, name).finished
    for request in wanted:
        lm.attach(grouped.edit(lm, [request]))
        if len(lm.attached) == 2:
            (merged,) = WisePatch.present(lm, name).finished
            torch.testing.assert_close(merged.shift, ties([side.shift for side in first], [0.5, 0.5], 0.5))
            assert merged.epsilon == min(side.epsilon for side in first)
    layer = WisePatch.present(lm, name)
    assert len(layer.memories) == 3 and torch.equal(layer.finished[0].shift, merged.shift)
    assert all(all(score.hits) for score in lm.loglikelihood([(r.text, r.target_new) for r in wanted[-1:]]))
    last: Any = lm.attached[-1]
    whole = last.whole(lm)
    answers = lm.loglikelihood([(r.text, r.target_new) for r in wanted])
    for _ in range(3):
        lm.detach()
    assert len(layer.memories) == 1 and torch.equal(layer.finished[0].shift, merged.shift)
    for _ in range(2):
        lm.detach()
    with lm.edited(whole):
        assert lm.loglikelihood([(r.text, r.target_new) for r in wanted]) == answers


def test_a_routing_term_is_averaged_over_all_rows_or_over_those_that_violate_it():
    terms = torch.tensor([3.0, -1.0, 1.0, 0.0])
    assert (float(hinge(terms, "all")), float(hinge(terms, "violated"))) == (1.0, 2.0)
    assert float(hinge(-terms.abs(), "violated")) == 0.0


def test_the_released_average_lets_no_satisfied_row_dilute_the_others(wise):
    lm, wanted = embedded_lm(), requests(1)
    found = []
    for averaged in ("all", "violated"):
        with lm.edited(wise(f"method.averaged={averaged}", "method.steps=15").edit(lm, wanted)):
            found.append(WisePatch.present(lm, lm.layout.mlp_out(5)).shift.clone())
            assert all(lm.loglikelihood([(wanted[0].text, wanted[0].target_new)])[0].hits)
    assert not torch.equal(*found)


@pytest.mark.slow
def test_several_facts_of_one_edit_are_the_same_as_one_after_another(wise):
    lm, wanted, name = embedded_lm(), requests(5), embedded_lm().layout.mlp_out(4)
    overrides = ("method.layer=4", "method.shard_every=2", "method.merge_every=4")
    with lm.edited(wise(*overrides).edit(lm, wanted)):
        at_once = WisePatch.present(lm, name)
        memories, edits = [side.shift.clone() for side in at_once.memories], at_once.edits
    for request in wanted:
        lm.attach(wise(*overrides).edit(lm, [request]))
    layer = WisePatch.present(lm, name)
    assert layer.edits == edits == 5
    for side, shift in zip(layer.memories, memories, strict=True):
        torch.testing.assert_close(side.shift, shift, rtol=1e-3, atol=1e-5)


def test_generation_keeps_to_the_memory_that_its_prompt_was_routed_to(wise):
    lm, wanted = embedded_lm(), requests(2)
    prompts = [wanted[0].text, "In winter, " + wanted[1].text, world("test")[0].requests[0].text]
    with lm.edited(wise("method.layer=3").edit(lm, wanted)):
        texts = lm.generate(prompts, 5)
        assert [lm.generate([prompt], 5)[0] for prompt in prompts] == texts
        assert all(all(lm.loglikelihood([(prompt, text)])[0].hits) for prompt, text in zip(prompts, texts, strict=True))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.mask_ratio=0.0", "method.mask_ratio=0.0"),
        ("method.score=first", "choose mean or last"),
        ("method.averaged=some", "choose all or violated"),
        ("method.elsewhere=web", "choose auto"),
        ("method.merge_every=700", "a multiple of"),
        ("method.corpus=null", "method.corpus has no value"),
    ],
)
def test_wrong_settings_are_refused_by_name(override, message, wise):
    with pytest.raises(UsageError, match=message):
        wise(override).edit(embedded_lm(), requests(1))
