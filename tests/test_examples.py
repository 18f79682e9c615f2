"""Records that editors may remember: never one that the run edits or asks about, and never a wording that is held
out.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from edit_cli.datasets.counterfact import CounterFact
from edit_cli.datasets.world import WorldEdits
from edit_cli.experiment.examples import OtherRecords

QUESTIONS = WorldEdits(name="world_qa", records="questions")


def test_pairs_are_the_right_answers_of_a_split():
    cases = replace(QUESTIONS, split="train").load(None).cases
    found = OtherRecords(QUESTIONS, [])("train")
    answers = {request.text: request.target_true for case in cases for request in case.requests}
    assert {prompt for prompt, _ in found[: len(cases)]} == answers.keys() and all(
        answers[prompt] == answer for prompt, answer in found[: len(cases)]
    )
    # locality prompts and other wordings of the training come after
    assert len(dict(found)) == len(found) > 3 * len(cases)
    unseen = {probe.prompt for case in cases for probe in case.probes if probe.group == "unseen"}
    assert unseen and not unseen & dict(found).keys()
    assert OtherRecords(QUESTIONS, [])("train") == found != OtherRecords(QUESTIONS, [], seed=1)("train")


def test_nothing_that_the_run_edits_or_asks_about():
    """Also where the run edits the training split itself, and asks of its records about others."""
    asked = replace(QUESTIONS, split="train", shuffle_seed=3).load(300).cases
    taken = {probe.prompt for case in asked for probe in case.probes} | {
        request.text for case in asked for request in case.requests
    }
    everything, found = dict(OtherRecords(QUESTIONS, [])("train")), dict(OtherRecords(QUESTIONS, asked)("train"))
    assert found.keys() == everything.keys() - taken
    assert len(found) < len(everything)
    # whatever the run selects
    assert len(OtherRecords(replace(QUESTIONS, split="train", offset=700, ids=[]), [])("train")) == len(everything)


@pytest.mark.parametrize(
    "source", [CounterFact(name="counterfact"), replace(QUESTIONS, path="one.jsonl")], ids=["no splits", "lacks it"]
)
def test_data_without_the_split_offer_nothing(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = (
        '{"id": 1, "split": "test", "prompt": "Where is {}?", "subject": "Rome", "target_true": "Italy",'
        ' "alternatives": ["France"]}\n'
    )
    (tmp_path / "one.jsonl").write_text(row, encoding="utf-8")
    assert OtherRecords(source, [])("train") == []


def test_other_records_are_of_the_training_split_else_of_the_rest_of_the_file(tmp_path):
    asked = replace(QUESTIONS, split="test").load(20).cases
    train = replace(QUESTIONS, split="train").load(None).cases
    taken = {probe.prompt for case in asked for probe in case.probes} | {case.requests[0].text for case in asked}
    expected = [case.id for case in train if case.requests[0].text not in taken]
    assert [case.id for case in OtherRecords(QUESTIONS, asked).others()] == expected
    edited = replace(QUESTIONS, split="train").load(300).cases
    others = OtherRecords(replace(QUESTIONS, split="train", offset=5), edited).others()
    assert others and not {case.id for case in edited} & {case.id for case in others}
    row = (
        '{"id": %d, "split": "test", "prompt": "Where is {}?", "subject": "%s", "target_true": "a",'
        ' "alternatives": ["b"]}'
    )
    (tmp_path / "test.jsonl").write_text("\n".join(row % (i, name) for i, name in enumerate(("Rome", "Oslo"))))
    alone = replace(QUESTIONS, path=str(tmp_path / "test.jsonl"), split="test")
    (rest,) = OtherRecords(alone, alone.load(1).cases).others()
    assert rest.requests[0].subject == "Oslo" and OtherRecords(alone, alone.load(None).cases).others() == []
