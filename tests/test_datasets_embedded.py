"""The embedded data sets of trained editors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rows import OPINION, Writer, of

from edit_cli.datasets import (
    WorldEdits,
    WorldHard,
    WorldOpinions,
    WorldTexts,
)
from edit_cli.errors import UsageError
from edit_cli.requests import Case

# the embedded world


def subjects_of(cases: tuple[Case, ...], known: set[str]) -> set[str]:
    """Which of the known subjects are named in any probe."""
    texts = [f"{probe.prompt} {probe.target}" for case in cases for probe in case.probes]
    return {subject for subject in known if any(subject in text for text in texts)}


@pytest.fixture(scope="module")
def world_subjects() -> dict[str, str]:
    """{subject: its group in the world}."""
    from tools.tiny_world.world import make_world

    return {fact.subject: fact.group for fact in make_world(0).facts}


@pytest.mark.parametrize(
    "source",
    [
        lambda split: WorldEdits("world", split=split),
        lambda split: WorldEdits("world_claims", records="claims", split=split),
        lambda split: WorldEdits("world_evidence", records="evidence", split=split),
        lambda split: WorldTexts("world_texts", split=split),
        lambda split: WorldHard("world_hard", unrelated="zsre", split=split),
        lambda split: WorldOpinions("world_opinions", split=split),
    ],
    ids=["world", "world_claims", "world_evidence", "world_texts", "world_hard", "world_opinions"],
)
def test_embedded_splits_share_no_subject(source: Callable[[str | None], Any], world_subjects: dict[str, str]) -> None:
    groups = {"train": "bystander", "validation": "tune", "test": "test"}
    for split, group in groups.items():
        dataset = source(split).load(25)
        assert not dataset.dropped and len(dataset.cases) == 25 and dataset.source.endswith(f"split {split}")
        others = {subject for subject, own in world_subjects.items() if own != group}
        assert not subjects_of(dataset.cases, others)
        assert subjects_of(dataset.cases, set(world_subjects))
    assert source(None).load(1).split == "test"


def test_one_record_of_a_subject_is_the_first_and_no_other_edit_writes_what_its_locality_asks() -> None:
    every, alone = (WorldEdits("world", one_a_subject=one).load().cases for one in (False, True))
    subjects = [case.requests[0].subject for case in every]
    assert len(set(subjects)) < len(subjects)
    assert [case.requests[0].subject for case in alone] == list(dict.fromkeys(subjects))
    assert [case.id for case in alone] == [
        case.id for place, case in enumerate(every) if subjects[place] not in subjects[:place]
    ]
    assert len(WorldEdits("world", one_a_subject=True, shuffle_seed=0).load(50).cases) == 50


def test_embedded_tasks_have_the_probes_of_their_kind() -> None:
    edits = WorldEdits("world").load(5)
    for case in edits.cases:
        assert {probe.group for probe in of(case, "locality")} == {"random", "same_relation", "same_subject"}
        assert {probe.group for probe in of(case, "paraphrase")} == {"seen", "unseen"}
        (request,) = case.requests
        assert all(
            request.subject in probe.prompt
            for probe in (*of(case, "paraphrase"), *of(case, "locality", "same_subject"))
        )
        assert not any(
            request.subject in probe.prompt
            for group in ("random", "same_relation")
            for probe in of(case, "locality", group)
        )
    assert edits.labels is None and WorldEdits("world_claims", records="claims").load(1).labels == (
        "SUPPORTS",
        "REFUTES",
    )
    for records in ("questions", "statements"):
        case = WorldHard("world_hard", unrelated="zsre", records=records).load(1).cases[0]
        (request,) = case.requests
        assert {probe.group for probe in of(case, "locality")} == {"random", "same_relation", "same_subject", "hard"}
        implied = of(case, "portability", "implied")
        assert len(implied) == 2 and all(request.target_new in probe.prompt for probe in implied)
        assert all(request.target_true not in probe.prompt for probe in implied)
        assert {probe.target for probe in of(case, "portability", "true_false")} == {"True", "False"}
    assert WorldHard("world_hard").load(3).sha256 == WorldHard("world_hard").load(5).sha256
    with pytest.raises(UsageError, match="choose questions or statements"):
        WorldHard("world_hard", records="claims").load()


def test_of_evidence_claims_follow_and_are_refuted_and_others_keep_the_labels_that_they_have() -> None:
    told = {case.id: case for case in WorldEdits("world").load(20).cases}
    evidence = WorldEdits("world_evidence", records="evidence").load(20)
    assert evidence.labels == ("SUPPORTS", "REFUTES") and [case.id for case in evidence.cases] == list(told)
    for case in evidence.cases:
        (asserted,), (fact,) = case.requests, told[case.id].requests
        assert asserted.text == f"{fact.text} {fact.target_new}."
        assert (asserted.subject, asserted.target_new, asserted.target_true) == (fact.subject, "SUPPORTS", "REFUTES")
        wordings = [probe.prompt for probe in of(told[case.id], "paraphrase")]
        within = {(probe.prompt, probe.target) for probe in of(case, "paraphrase")}
        assert within == {(f"{text} {fact.target_new}.", "SUPPORTS") for text in wordings} | {
            (f"{text} {fact.target_true}.", "REFUTES") for text in wordings
        }
        known = {probe.prompt: probe.target for probe in of(told[case.id], "locality")}
        for probe in of(case, "locality"):
            (text,) = (prompt for prompt in known if probe.prompt.startswith(f"{prompt} "))
            said = probe.prompt[len(text) + 1 : -1]
            assert probe.target == ("SUPPORTS" if said == known[text] else "REFUTES")
            assert said in (known[text], fact.target_new)
        assert {probe.target for probe in of(case, "locality", "same_relation")} == {"SUPPORTS", "REFUTES"}


def test_a_file_of_the_same_form_can_stand_in_for_an_embedded_one(write: Writer) -> None:
    dataset = WorldOpinions("world_opinions", path=write([OPINION])).load()
    assert dataset.cases[0].requests[0].subject == "Norvik" and dataset.split is None
