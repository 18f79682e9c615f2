"""What the data sets of trained editors share, subjects and splits, and claims: published formats, with made-up
rows.
"""

from __future__ import annotations

from typing import Any

import pytest
from rows import Writer, faults, of

from edit_cli.datasets import (
    Fever,
)
from edit_cli.datasets.pooled import SPLITS
from edit_cli.datasets.subjects import first_name, split_of
from edit_cli.errors import UsageError
from edit_cli.requests import EditRequest, Probe

# whom a text is about, and splits


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Ada Lund's album was released in 2011.", "Ada Lund"),
        ("There is a town called Norvik.", "Norvik"),
        ("What is the seat of the Bank of Orbin?", "Bank of Orbin"),
        ("The Night of Glass was directed by Per Dahl.", "Night of Glass"),
        ("Who founded Élan Vital, and why?", "Élan Vital"),
        ("Is it?", None),
        ("nothing here is a name", None),
    ],
)
def test_a_text_is_about_its_first_name(text: str, name: str | None) -> None:
    assert first_name(text) == name


def test_splits_depend_on_the_subject_alone_and_keep_their_shares() -> None:
    found = [split_of(f"Subject {i}", [0.8, 0.1, 0.1], SPLITS) for i in range(3000)]
    assert [round(found.count(name) / 3000, 1) for name in SPLITS] == [0.8, 0.1, 0.1]
    assert split_of("Ada  Lund", [0.5, 0.3, 0.2], SPLITS) == split_of("ada lund", [0.5, 0.3, 0.2], SPLITS)
    assert {split_of(f"{i}", [0, 0, 1], SPLITS) for i in range(50)} == {"test"}


def claims(count: int) -> list[dict[str, Any]]:
    """Three claims about each of `count` people."""
    facts = ("lives in Oslo.", "plays the harp.", "was never a judge.")
    return [
        {"id": 3 * i + j, "claim": f"Person{chr(65 + i % 26)}{i} {fact}", "label": ("SUPPORTS", "REFUTES")[(i + j) % 2]}
        for i in range(count)
        for j, fact in enumerate(facts)
    ]


def test_no_subject_is_in_two_splits_not_even_in_a_locality_prompt(write: Writer) -> None:
    path = write(claims(60))
    subjects = {}
    for split in SPLITS:
        dataset = Fever("fever", path=path, split=split).load()
        assert dataset.split == split and dataset.total == len(dataset.cases)
        subjects[split] = {first_name(probe.prompt) for case in dataset.cases for probe in case.probes}
    assert all(subjects.values()) and sum(map(len, subjects.values())) == len(set.union(*subjects.values())) == 60
    assert len(Fever("fever", path=path).load().cases) == 180


def test_a_field_split_comes_before_the_hash(write: Writer) -> None:
    rows = [row | {"split": "validation" if i < 9 else "train"} for i, row in enumerate(claims(10))]
    assert len(Fever("fever", path=write(rows), split="validation").load().cases) == 9
    with pytest.raises(
        UsageError, match="split=test is empty: none of the 30 records of .* falls into it .by their field split"
    ):
        Fever("fever", path=write(rows), split="test").load()


def test_an_empty_split_is_one_line(write: Writer) -> None:
    with pytest.raises(
        UsageError, match="split=test is empty: none of the 3 records .*by subject, dataset.shares=.1.0, 0.0, 0.0"
    ):
        Fever("fever", path=write(claims(1)), split="test", shares=[1, 0, 0]).load()
    with pytest.raises(UsageError, match="dataset.split=dev: .* has train"):
        Fever("fever", path=write(claims(1)), split="dev", shares=[1, 0, 0]).load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": [1, 2]}, "dataset.shares="),
        ({"shares": [0, 0, 0]}, "dataset.shares="),
        ({"locality": -1}, "dataset.locality=-1"),
        ({"labels": ["yes"]}, "dataset.labels="),
        ({"template": "no slot"}, "dataset.template="),
        ({"join": "a comma"}, "dataset.join=a comma: choose none, space or null"),
    ],
)
def test_options_that_make_no_sense_are_refused(write: Writer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Fever("fever", path=write(claims(2)), **options).load()


def test_locality_is_drawn_from_others_by_group_and_avoids_what_is_edited(write: Writer) -> None:
    path = write(claims(30))
    few = Fever("fever", path=path, locality=2).load(6)
    edited = {first_name(case.requests[0].text) for case in few.cases}
    for case in few.cases:
        own = first_name(case.requests[0].text)
        others, same = of(case, "locality", "random"), of(case, "locality", "same_subject")
        assert len(others) == len(same) == 2
        assert not {first_name(probe.prompt) for probe in others} & edited
        assert {first_name(probe.prompt) for probe in same} == {own}
        assert case.requests[0].text not in {probe.prompt for probe in same}
        assert {probe.target for probe in (*others, *same)} <= {"SUPPORTS", "REFUTES"}
    again = Fever("fever", path=path, locality=2).load(6)
    assert again.cases == few.cases and Fever("fever", path=path, locality=2, seed=1).load(6).cases != few.cases
    assert not any(of(case, "locality") for case in Fever("fever", path=path, locality=0).load(3).cases)


# FEVER

KILT_CLAIM: dict[str, Any] = {
    "id": "17",
    "input": "Ada Lund lives in Oslo.",
    "output": [{"answer": "SUPPORTS", "provenance": [{"title": "Ada Lund"}]}],
    "prediction": "SUPPORTS",
    "alternatives": ["REFUTES"],
    "filtered_rephrases": ["Oslo is where Ada Lund lives.", "Ada Lund lives in Oslo.", "Ada Lund is at home in Oslo."],
    "rephrases": ["x"],
    "logit": 1.5,
}


def test_half_of_the_edits_of_fever_write_what_is_there_if_asked_for(write: Writer) -> None:
    path = write(claims(40))
    flipped = Fever("fever", path=path).load().cases
    mixed = Fever("fever", path=path, flips=0.5).load().cases
    kept = [case for case in mixed if case.requests[0].target_true is None]
    assert 40 < len(kept) < 80 and len(mixed) == 120
    for case, flip in zip(mixed, flipped, strict=True):
        assert case.right == flip.right and [p.prompt for p in case.probes] == [p.prompt for p in flip.probes]
        if case in kept:
            assert case.requests[0].target_new == flip.requests[0].target_true == case.right[0]
            assert (case.probes[0].target, case.probes[0].foil) == (flip.probes[0].foil, flip.probes[0].target)
        else:
            assert case == flip
    assert mixed == Fever("fever", path=path, flips=0.5).load().cases
    assert all(case.requests[0].target_true is None for case in Fever("fever", path=path, flips=0.0).load().cases)
    with pytest.raises(UsageError, match="dataset.flips=1.5: give a number from 0 to 1"):
        Fever("fever", path=path, flips=1.5).load()


def test_fever_in_the_form_of_ke_flips_the_prediction_and_takes_filtered_rephrases(write: Writer) -> None:
    (case,) = Fever("fever", path=write([KILT_CLAIM]), rephrases=5).load().cases
    assert case.id == "17" and case.requests == (EditRequest("{} lives in Oslo.", "Ada Lund", "REFUTES", "SUPPORTS"),)
    assert of(case, "rewrite") == [Probe("rewrite", KILT_CLAIM["input"], "REFUTES", "SUPPORTS")]
    assert {probe.prompt for probe in of(case, "paraphrase")} == {
        "Oslo is where Ada Lund lives.",
        "Ada Lund is at home in Oslo.",
    }
    assert Fever("fever", path=write([KILT_CLAIM])).load().labels == ("SUPPORTS", "REFUTES")


def test_a_prediction_that_is_wrong_is_flipped_to_the_truth_and_the_label_is_what_must_stay(write: Writer) -> None:
    wrong = KILT_CLAIM | {
        "id": "18",
        "prediction": "REFUTES",
        "alternatives": ["SUPPORTS"],
        "input": "Ada Lund plays the harp.",
    }
    first, second = Fever("fever", path=write([KILT_CLAIM, wrong])).load().cases
    assert second.requests[0].target_new == "SUPPORTS" and second.requests[0].target_true == "REFUTES"
    assert of(first, "locality") == [Probe("locality", wrong["input"], "SUPPORTS", group="same_subject")]


def test_claims_as_questions_for_a_model_that_writes(write: Writer) -> None:
    path = write(claims(2)[:1])
    dataset = Fever("fever", path=path, template="{} True or False? Answer:").load()
    (request,) = dataset.cases[0].requests
    assert request.text == "PersonA0 lives in Oslo. True or False? Answer:" and request.subject == "PersonA0"
    assert (request.target_new, request.target_true, dataset.labels) == ("False", "True", None)
    (case,) = Fever("fever", path=path, template="Is it so? {}", labels=["yes", "no"]).load().cases
    assert case.requests[0].target_new == "no"


def test_other_label_names_and_the_forms_of_malmen(write: Writer) -> None:
    row = {
        "prompt": "Ada Lund sings.",
        "equiv_prompt": ["Ada Lund is a singer."],
        "alt": "REFUTES",
        "unrel_prompt": "x",
        "unrel_ans": "SUPPORTS",
    }
    (case,) = Fever("fever", path=write([row]), labels=["true", "false"]).load().cases
    assert case.requests[0] == EditRequest("{} sings.", "Ada Lund", "false", "true")
    assert of(case, "paraphrase") == [Probe("paraphrase", "Ada Lund is a singer.", "false", "true")]
    assert of(case, "locality") == [Probe("locality", "x", "true", group="random")]
    other = claims(1)[0] | {"id": "z"}
    first, _ = Fever("fever", path=write([row, other])).load().cases
    assert of(first, "locality") == [Probe("locality", "x", "SUPPORTS", group="random")]  # not one of other records
    assert faults(Fever("fever", path=write([other, row | {"unrel_ans": "maybe"}])).load()) == [
        "line 2: unrel_ans is neither SUPPORTS nor REFUTES"
    ]


def test_a_template_may_end_in_a_line_break(write: Writer) -> None:
    (case,) = Fever("fever", path=write(claims(1)[:1]), template="{} True or False?\n").load().cases
    assert case.requests[0].text.endswith(" True or False?\n")


def test_bad_claims_are_named_by_line_and_field(write: Writer) -> None:
    good = claims(1)[0]
    bad = [
        good | {"id": 5, "label": "NOT ENOUGH INFO"},
        {"id": 6, "label": "SUPPORTS"},
        KILT_CLAIM | {"id": 7, "alternatives": ["MAYBE"]},
        {**{key: value for key, value in KILT_CLAIM.items() if key != "alternatives"}, "id": 8, "output": "SUPPORTS"},
        good | {"id": 9, "claim": " "},
    ]
    assert faults(Fever("fever", path=write([good, *bad])).load()) == [
        "line 2 (id 5): label is neither SUPPORTS nor REFUTES",
        "line 3 (id 6): claim is missing",
        "line 4 (id 7): alternatives[0] is neither SUPPORTS nor REFUTES",
        "line 5 (id 8): output is not a list of objects with an answer",
        "line 6 (id 9): claim is empty",
    ]


# models of the wrong kind


def test_a_model_of_the_wrong_kind_is_refused_in_one_line(write: Writer) -> None:
    judged = Fever("fever", path=write(claims(1))).load()
    judged.refuse_unfit(["refutes", "supports"], "bert")
    with pytest.raises(
        UsageError,
        match=r"asks for a label \(SUPPORTS, REFUTES\), and gpt has none: it writes text; .*dataset.template=",
    ):
        judged.refuse_unfit(None, "gpt")
    with pytest.raises(UsageError, match="bert has others: A, B"):
        judged.refuse_unfit(["A", "B"], "bert")
    written = Fever("fever", path=write(claims(1)[:1]), template="{} True?").load()
    written.refuse_unfit(None, "gpt")
    with pytest.raises(UsageError, match=r"asks for texts, and bert only chooses a label \(A, B\)"):
        written.refuse_unfit(["A", "B"], "bert")
    written.refuse_unfit(["True", "false"], "bert")  # texts that happen to be its labels, as one's own facts may be


def test_the_command_line_tells_what_a_model_or_a_split_cannot_do(cli: Any, write: Writer) -> None:
    rows = write(claims(3))
    ended = cli(
        "evaluate", "method=ft", "model=tiny-gpt2", "dataset=fever", f"dataset.path={rows}", "limit=1", quick=True
    )
    assert (
        ended.code == 2
        and len(ended.err.strip().splitlines()) >= 1
        and "asks for a label" in ended.err
        and "Traceback" not in ended.err
    )
    ended = cli(
        "evaluate",
        "method=ft",
        "dataset=fever",
        f"dataset.path={rows}",
        "dataset.shares=[1,0,0]",
        "dataset.split=test",
        quick=True,
    )
    assert ended.code == 2 and "dataset.split=test is empty" in ended.err
