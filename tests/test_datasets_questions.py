"""The question sets of trained editors, zsRE and zsRE-hard, in their published formats with made-up rows."""

from __future__ import annotations

from typing import Any

import pytest
from rows import Writer, faults, of

from edit_cli.datasets import (
    ZsREHard,
    ZsREQuestions,
)
from edit_cli.datasets.subjects import first_name
from edit_cli.errors import MissingError, UsageError
from edit_cli.requests import EditRequest, Probe
from edit_cli.writing import joined

# zsRE

MEND = {
    "subject": "Orbin",
    "src": "Who founded Orbin?",
    "pred": "Per Dahl",
    "rephrase": "By whom was Orbin founded?",
    "alt": "Maria Sol",
    "answers": ["Per Dahl", "P. Dahl"],
    "loc": "nq question: who sang first",
    "loc_ans": "Eva",
    "cond": "",
}
KE = {
    "id": "a",
    "input": "Who founded Norvik?",
    "output": [{"answer": "Bo Berg"}, {"answer": "B. Berg"}, {}],
    "prediction": "Cy Falk",
    "alternatives": ["cy falk", "The B. Berg!", "Di Holm", "Eva Moe"],
    "rephrases": ["never used"],
    "filtered_rephrases": ["Who founded Norvik?", "By whom was Norvik founded?", "Norvik was founded by whom?"],
}


def test_flat_zsre_is_read_with_its_natural_question(write: Writer) -> None:
    (case,) = ZsREQuestions("zsre_qa", path=write([MEND])).load().cases
    assert case.id == "0" and case.requests == (EditRequest("Who founded {}?", "Orbin", "Maria Sol", "Per Dahl"),)
    assert case.probes == (
        Probe("rewrite", "Who founded Orbin?", "Maria Sol", "Per Dahl"),
        Probe("paraphrase", "By whom was Orbin founded?", "Maria Sol", "Per Dahl"),
        Probe("locality", "nq question: who sang first?", "Eva", group="random"),
    )


def test_the_records_of_malmen_are_written_as_they_are(write: Writer) -> None:
    rows = [{key: MEND[key] for key in ("src", "rephrase", "loc", "loc_ans")} | {"ans": "Per Dahl"}]
    rows.append({"src": "Who leads Orbin?", "rephrase": "The leader of Orbin?", "ans": "Bo Berg"})
    first, second = ZsREQuestions("zsre_qa", path=write(rows)).load().cases
    assert first.requests == (EditRequest("Who founded {}?", "Orbin", "Per Dahl"),)
    assert first.probes[:2] == (
        Probe("rewrite", "Who founded Orbin?", "Per Dahl"),
        Probe("paraphrase", "By whom was Orbin founded?", "Per Dahl"),
    )
    assert of(first, "locality") == [
        Probe("locality", "Who leads Orbin?", "Bo Berg", group="same_subject"),
        Probe("locality", "nq question: who sang first?", "Eva", group="random"),
    ]
    assert of(second, "locality") == [Probe("locality", "Who founded Orbin?", "Per Dahl", group="same_subject")]


def test_an_answer_is_exchanged_where_it_stands_as_a_word(write: Writer) -> None:
    harder: dict[str, Any] = {
        "statement": "Also Al founded Orbin.",
        "implied": [["Where did Al, of Alta, live?", "With Al"]],
    }
    row = MEND | {"answers": ["Al"], "pred": "Cy", "alt": "Bo"} | harder
    (case,) = ZsREHard("zsre_hard", path=write([row])).load().cases
    implied, true, _ = of(case, "portability")
    assert (implied.prompt, implied.target) == ("Where did Bo, of Alta, live?", "With Bo")
    assert true.prompt.endswith(": Also Bo founded Orbin.")


def test_a_setting_of_the_data_set_holds_for_all_that_must_stay_too(write: Writer) -> None:
    rows = [MEND, MEND | {"subject": "Norvik", "src": "Who founded Norvik?", "join": "space"}]
    cases = ZsREQuestions("zsre_qa", path=write(rows), join="none", unrelated="zsre").load().cases
    targets = {
        probe.prompt: {one.target for case in cases for one in case.probes if one.prompt == probe.prompt}
        for case in cases
        for probe in case.probes
    }
    assert {joined("Maria Sol", "none"), joined("Per Dahl", "none")} == targets["Who founded Orbin?"]
    assert {joined("Maria Sol", "space"), joined("Per Dahl", "space")} == targets["Who founded Norvik?"]


def test_an_alternative_is_neither_the_top_answer_nor_a_right_one(write: Writer) -> None:
    path = write([KE])
    written = {
        ZsREQuestions("zsre_qa", path=path, seed=seed).load().cases[0].requests[0].target_new for seed in range(20)
    }
    assert written == {"Di Holm", "Eva Moe"}
    (case,) = ZsREQuestions("zsre_qa", path=path, alternative=1, rephrases=9).load().cases
    assert case.requests == (EditRequest("Who founded {}?", "Norvik", "Eva Moe", "Bo Berg"),)
    assert {probe.prompt for probe in of(case, "paraphrase")} == set(KE["filtered_rephrases"][1:])


def test_questions_of_the_same_form_are_of_one_relation(write: Writer) -> None:
    other = KE | {
        "id": "b",
        "input": "Where does Norvik lie?",
        "output": [{"answer": "Oslo"}],
        "filtered_rephrases": ["x y"],
    }
    cases = ZsREQuestions("zsre_qa", path=write([MEND, KE, other]), unrelated="zsre").load().cases
    first = {probe.group: (probe.prompt, probe.target) for probe in of(cases[0], "locality")}
    assert first == {"random": ("Where does Norvik lie?", "Oslo"), "same_relation": ("Who founded Norvik?", "Bo Berg")}
    second = {probe.group: probe.prompt for probe in of(cases[1], "locality")}
    assert second == {"same_relation": "Who founded Orbin?", "same_subject": "Where does Norvik lie?"}


def test_natural_questions_of_a_file_stand_in_for_other_records(write: Writer) -> None:
    questions = write(
        {"questions": ["who was it", "Where is it?"], "answers": [["the man", "him"], "there"]}, "nq.json"
    )
    (case,) = ZsREQuestions("zsre_qa", path=write([KE]), nq_path=questions).load().cases
    assert of(case, "locality") == [
        Probe("locality", "Who was it?", "him", group="random"),
        Probe("locality", "Where is it?", "there", group="random"),
    ]
    with pytest.raises(MissingError, match="dataset.nq_path: .* is not JSON of the form"):
        ZsREQuestions("zsre_qa", path=write([KE]), nq_path=write([1], "bad.json")).load()


def test_bad_questions_are_named_by_line_and_field(write: Writer) -> None:
    bad = [
        MEND | {"alt": "per dahl"},
        MEND | {"src": "Who founded it?"},
        MEND | {"alt": ""},
        KE | {"alternatives": ["Cy Falk"]},
        KE | {"filtered_rephrases": ["Who founded Norvik?"]},
        KE | {"output": []},
    ]
    assert faults(ZsREQuestions("zsre_qa", path=write([MEND, *bad])).load()) == [
        "line 2: alt is an answer already",
        "line 3: src does not contain the subject",
        "line 4: alt is empty",
        "line 5 (id a): alternatives is an answer already",
        "line 6 (id a): filtered_rephrases has no wording but the question's own",
        "line 7 (id a): output is not a list of objects with an answer",
    ]
    with pytest.raises(UsageError, match="dataset.unrelated=web: choose nq or zsre"):
        ZsREQuestions("zsre_qa", path=write([MEND]), unrelated="web").load()


# zsRE-hard

HARD = KE | {
    "alternatives": ["Di Holm", "Eva Moe"],
    "implied": [["What did Bo Berg found?", "Norvik", 0.9], ["Who is old?", "nobody", 0.1]],
    "statement": "Norvik was founded by Bo Berg.",
}


def test_implied_and_true_false_questions_speak_of_the_new_answer(write: Writer) -> None:
    (case,) = ZsREHard("zsre_hard", path=write([HARD]), unrelated="zsre", alternative=0).load().cases
    assert of(case, "portability", "implied") == [
        Probe("portability", "What did Di Holm found?", "Norvik", group="implied")
    ]
    true, false = of(case, "portability", "true_false")
    assert true.prompt.endswith("Norvik was founded by Di Holm.") and (true.target, true.foil) == ("True", "False")
    assert false.prompt.endswith("Norvik was founded by Eva Moe.") and (false.target, false.foil) == ("False", "True")
    assert true.prompt.split(":")[0].lower() in ("true or false", "true/false", "t/f", "answer true or false")


def test_files_beside_the_records_go_line_by_line(write: Writer) -> None:
    plain = [KE | {"id": "a"}, KE | {"id": "b", "input": "Who founded Orbin?"}]
    files = {
        "implied_path": write([[], [["What did Bo Berg found?", "Orbin", 1]]], "impl.json"),
        "true_false_path": write("Norvik was founded by Bo Berg.\nOrbin is old.\n", "yn.txt"),
    }
    first, second = ZsREHard("zsre_hard", path=write(plain), unrelated="zsre", **files).load().cases
    assert [len(of(case, "portability", "implied")) for case in (first, second)] == [0, 1]
    assert [len(of(case, "portability", "true_false")) for case in (first, second)] == [2, 0]
    with pytest.raises(UsageError, match="implied_path=.* has 2 items for 1 records"):
        ZsREHard("zsre_hard", path=write(plain[:1]), implied_path=files["implied_path"]).load()


def test_hard_records_without_a_hard_question_or_about_sex_are_dropped_by_name(write: Writer) -> None:
    bad = [
        KE | {"id": "b"},
        HARD | {"id": "c", "input": "What gender is Norvik?"},
        HARD | {"id": "d", "implied": "text"},
    ]
    assert faults(ZsREHard("zsre_hard", path=write([HARD, *bad]), unrelated="zsre").load()) == [
        "line 2 (id b): implied holds no question with the right answer in it, and there is no statement",
        "line 3 (id c): input asks for sex or gender, which is left out as published",
        "line 4 (id d): implied is not a list of [question, answer]",
    ]


def test_near_misses_are_worded_like_the_edit_and_about_others(write: Writer) -> None:
    names = [f"Town{chr(65 + i % 26)}{i}" for i in range(60)]
    rows = [
        HARD
        | {
            "id": f"{i}",
            "input": f"Who founded {name} long ago?" if i % 2 else f"Where does one buy {name}?",
            "implied": HARD["implied"],
        }
        for i, name in enumerate(names)
    ]
    for case in ZsREHard("zsre_hard", path=write(rows), unrelated="zsre").load(10).cases:
        hard = of(case, "locality", "hard")
        assert len(hard) == 2 and all(first_name(probe.prompt) != case.requests[0].subject for probe in hard)
        assert all(probe.prompt.split()[0] == case.requests[0].text.split()[0] for probe in hard)
