"""What trained editors are asked: the prompts and answers that are drawn from cases."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from embedded import embedded_lm
from families import tiny_lm
from learners import statements

from edit_cli.editors.meta.base_model_cache import BaseModelCache
from edit_cli.editors.meta.episodes import (
    BEYOND,
    WITHIN,
    EpisodeConfig,
    EpisodeEvaluation,
    Locality,
    Outer,
    losses,
    sample_episodes,
)
from edit_cli.editors.meta.factored_gradients import DenseShift
from edit_cli.editors.meta.mend import MEND, MENDConfig
from edit_cli.edits.edit import WeightDelta
from edit_cli.errors import UsageError
from edit_cli.lm.heads.answers import Answers
from edit_cli.metrics.registry import PARTS

DRAWN = EpisodeConfig(outer="any", locality=["random", "same_relation"])
OUT = "transformer.h.5.mlp.c_proj"


def test_episodes_are_sampled_by_seed_and_case_alone():
    cases = statements("train")[:6]
    torch.manual_seed(3)
    episodes = sample_episodes(cases, 2, DRAWN)
    torch.manual_seed(3)
    assert sample_episodes(cases[2:4], 2, DRAWN) == episodes[1:2]
    for episode, pair in zip(episodes, (cases[:2], cases[2:4], cases[4:]), strict=True):
        assert [inner for inner in episode.support] == [
            (case.requests[0].text, case.requests[0].target_new) for case in pair
        ]
        assert len(episode.query) == 2 and len(episode.locality) == 4
        for number, case in enumerate(pair):
            groups = [
                {p.group for p in case.probes if (p.prompt, p.target) == asked}
                for asked in episode.locality[2 * number : 2 * number + 2]
            ]
            assert "random" in groups[0] and "same_relation" in groups[1]
    seen = sample_episodes(cases, 1, EpisodeConfig(outer="seen", locality=[]))
    assert all(
        any(p.group == "seen" and p.prompt == episode.query[0][0] for p in case.probes)
        for episode, case in zip(seen, cases, strict=True)
    )
    with pytest.raises(UsageError, match="method.edits"):
        sample_episodes(cases, 7, DRAWN)


def test_swapped_episodes_edit_one_wording_and_ask_in_another():
    cases, inner, answers = statements("train")[:20], set(), set()
    for seed in range(5):
        torch.manual_seed(seed)
        for episode, case in zip(
            sample_episodes(cases, 1, EpisodeConfig(outer="swapped", locality=[])), cases, strict=True
        ):
            wordings = {case.requests[0].text, *(probe.prompt for probe in case.probes if probe.kind == "paraphrase")}
            ((edited, new),), ((asked, wanted),) = episode.support, episode.query
            assert {edited, asked} <= wordings and edited != asked and new == wanted != case.requests[0].target_true
            inner.add(edited == case.requests[0].text)
            answers.add(new == case.requests[0].target_new)
    assert inner == answers == {True, False}


def test_the_same_answer_is_drawn_where_there_is_one():
    cases = statements("train")[:40]
    episodes = sample_episodes(cases, 1, EpisodeConfig(outer="any", locality=["same_answer"]))
    told = [
        ({p.target for p in case.probes if p.group == "same_relation"}, case.requests[0].target_true) for case in cases
    ]
    for (answers, true), episode, case in zip(told, episodes, cases, strict=True):
        ((prompt, answer),) = episode.locality
        assert any((p.prompt, p.target, p.group) == (prompt, answer, "same_relation") for p in case.probes)
        assert (answer == true) == (true in answers)
    assert {true in answers for answers, true in told} == {True, False}


def test_all_of_a_text_can_have_to_stay():
    """As MEND has it for continuations: the divergence is that of every token after the first word."""
    lm, cases = embedded_lm(), statements("train")[:3]
    torch.manual_seed(0)
    short = sample_episodes(cases, 1, DRAWN)
    torch.manual_seed(0)
    whole = sample_episodes(cases, 1, replace(DRAWN, stays="text"))
    for one, other in zip(short, whole, strict=True):
        assert one.support == other.support and one.query == other.query
        for (prompt, answer), (first, rest) in zip(one.locality, other.locality, strict=True):
            assert f"{first} {rest}" == f"{prompt} {answer}" and " " not in first
    change = DenseShift(0.05 * torch.randn(lm.weight(OUT).shape))
    _, kl, _ = EpisodeEvaluation(BaseModelCache(lm), whole, 5).losses({OUT: change})
    expected = []
    for episode in whole:
        for first, rest in episode.locality:
            start = len(lm.tokenizer(first)["input_ids"]) - 1
            ids = lm.tokenizer(f"{first} {rest}", return_tensors="pt")["input_ids"]
            before = lm.model(ids).logits[0, start:-1].log_softmax(-1)
            with lm.edited(WeightDelta({f"{OUT}.weight": change.change.T.contiguous()})):
                after = lm.model(ids).logits[0, start:-1].log_softmax(-1)
            expected.append((before.exp() * (before - after)).sum(-1).mean())
    torch.testing.assert_close(kl, torch.stack(expected).mean(), rtol=1e-3, atol=1e-6)


def test_a_model_whose_prompt_and_answer_are_two_texts_keeps_answers_alone():
    lm = tiny_lm("t5")
    with pytest.raises(UsageError, match="method.draw.stays=text needs a causal language model"):
        MEND(MENDConfig(draw=EpisodeConfig(stays="text"), last=1), lm)
    MEND(MENDConfig(last=1), lm)


def test_every_group_of_a_data_set_can_be_asked_for():
    for kinds, names in ((WITHIN, get_args(Outer)), (BEYOND, get_args(Locality))):
        assert {part for kind, part, _ in PARTS.values() if kind in kinds} < {*names}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"outer": "sen"}, "method.draw.outer=sen: choose any, "),
        ({"locality": ["random", "hrad"]}, r"hrad.*: give some of \[any, same_answer"),
        ({"stays": "all"}, "method.draw.stays=all: choose answer or text"),
    ],
)
def test_a_word_that_means_nothing_is_refused(options, told):
    with pytest.raises(UsageError, match=told):
        EpisodeConfig(**options)


@pytest.mark.parametrize(("was", "now", "lost"), [(True, False, 100.0), (False, True, -100.0), (True, True, 0.0)])
def test_drawdown_of_a_validation_is_accuracy_that_is_lost(was, now, lost):
    """Two rows: one that must have its answer, and one whose answer must stay (the second)."""
    right, wrong = torch.tensor([4.0, 0.0]), torch.tensor([0.0, 4.0])

    def answers(second: bool) -> Answers:
        logits = torch.stack([right, right if second else wrong])
        return Answers(logits, torch.zeros(2, dtype=torch.long), torch.arange(2))

    told = losses(answers(now), answers(was), torch.tensor([True, False]))[2]
    assert told["drawdown"] == lost and told["es"] == 100.0
