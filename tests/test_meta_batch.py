"""What trained editors are asked: the prompts and answers that are drawn from cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from embedded import embedded_lm
from families import tiny_lm
from learners import statements

from edit_cli.editors.meta.episodes import DrawOptions, Trial, draw, judged
from edit_cli.editors.meta.factored_gradients import DenseShift
from edit_cli.editors.meta.mend import MEND
from edit_cli.edits.edit import WeightDelta
from edit_cli.errors import UsageError
from edit_cli.lm.answers import Answers

DRAWN = DrawOptions("any", ["random", "same_relation"])
OUT = "transformer.h.5.mlp.c_proj"


def test_lessons_are_drawn_by_seed_and_case_alone():
    cases = statements("train")[:6]
    torch.manual_seed(3)
    lessons = draw(cases, 2, DRAWN)
    torch.manual_seed(3)
    assert draw(cases[2:4], 2, DRAWN) == lessons[1:2]
    for lesson, pair in zip(lessons, (cases[:2], cases[2:4], cases[4:]), strict=True):
        assert [inner for inner in lesson.inner] == [
            (case.requests[0].text, case.requests[0].target_new) for case in pair
        ]
        assert len(lesson.outer) == 2 and len(lesson.local) == 4
        for number, case in enumerate(pair):
            groups = [
                {p.group for p in case.probes if (p.prompt, p.target) == asked}
                for asked in lesson.local[2 * number : 2 * number + 2]
            ]
            assert "random" in groups[0] and "same_relation" in groups[1]
    seen = draw(cases, 1, DrawOptions("seen", []))
    assert all(
        any(p.group == "seen" and p.prompt == lesson.outer[0][0] for p in case.probes)
        for lesson, case in zip(seen, cases, strict=True)
    )
    with pytest.raises(UsageError, match="method.edits"):
        draw(cases, 7, DRAWN)


def test_swapped_lessons_edit_one_wording_and_ask_in_another():
    cases, inner, answers = statements("train")[:20], set(), set()
    for seed in range(5):
        torch.manual_seed(seed)
        for lesson, case in zip(draw(cases, 1, DrawOptions("swapped", [])), cases, strict=True):
            wordings = {case.requests[0].text, *(probe.prompt for probe in case.probes if probe.kind == "paraphrase")}
            ((edited, new),), ((asked, wanted),) = lesson.inner, lesson.outer
            assert {edited, asked} <= wordings and edited != asked and new == wanted != case.requests[0].target_true
            inner.add(edited == case.requests[0].text)
            answers.add(new == case.requests[0].target_new)
    assert inner == answers == {True, False}


def test_the_same_answer_is_drawn_where_there_is_one():
    cases = statements("train")[:40]
    lessons = draw(cases, 1, DrawOptions("any", ["same_answer"]))
    told = [
        ({p.target for p in case.probes if p.group == "same_relation"}, case.requests[0].target_true) for case in cases
    ]
    for (answers, true), lesson, case in zip(told, lessons, cases, strict=True):
        ((prompt, answer),) = lesson.local
        assert any((p.prompt, p.target, p.group) == (prompt, answer, "same_relation") for p in case.probes)
        assert (answer == true) == (true in answers)
    assert {true in answers for answers, true in told} == {True, False}


def test_all_of_a_text_can_have_to_stay():
    """As MEND has it for continuations: the divergence is that of every token after the first word."""
    lm, cases = embedded_lm(), statements("train")[:3]
    torch.manual_seed(0)
    short = draw(cases, 1, DRAWN)
    torch.manual_seed(0)
    whole = draw(cases, 1, replace(DRAWN, stays="text"))
    for one, other in zip(short, whole, strict=True):
        assert one.inner == other.inner and one.outer == other.outer
        for (prompt, answer), (first, rest) in zip(one.local, other.local, strict=True):
            assert f"{first} {rest}" == f"{prompt} {answer}" and " " not in first
    change = DenseShift(0.05 * torch.randn(lm.weight(OUT).shape))
    _, kl, _ = Trial(lm, whole, 5).losses({OUT: change})
    expected = []
    for lesson in whole:
        for first, rest in lesson.local:
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
        MEND(draw=DrawOptions(stays="text")).fits(lm)
    MEND().fits(lm)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"outer": "sen"}, "method.draw.outer=sen: choose any, "),
        ({"locality": ["random", "hrad"]}, "method.draw.locality=hrad: choose any, "),
        ({"stays": "all"}, "method.draw.stays=all: choose answer or text"),
    ],
)
def test_a_word_that_means_nothing_is_refused(options, told):
    with pytest.raises(UsageError, match=told):
        DrawOptions(**options)


@pytest.mark.parametrize(("was", "now", "lost"), [(True, False, 100.0), (False, True, -100.0), (True, True, 0.0)])
def test_drawdown_of_a_validation_is_accuracy_that_is_lost(was, now, lost):
    """Two rows: one that must have its answer, and one whose answer must stay (the second)."""
    right, wrong = torch.tensor([4.0, 0.0]), torch.tensor([0.0, 4.0])

    def answers(second: bool) -> Answers:
        logits = torch.stack([right, right if second else wrong])
        return Answers(logits, torch.zeros(2, dtype=torch.long), torch.arange(2))

    told = judged(answers(now), answers(was), torch.tensor([True, False]))[2]
    assert told["drawdown"] == lost and told["es"] == 100.0
