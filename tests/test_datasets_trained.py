"""The data sets of trained editors: published formats, with made-up rows, and the embedded ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edit_cli.datasets import (
    Continuations,
    ConvSent,
    Dataset,
    Fever,
    VitaminC,
    WorldEdits,
    WorldHard,
    WorldOpinions,
    WorldTexts,
    ZsREHard,
    ZsREQuestions,
)
from edit_cli.datasets.pooled import SPLITS
from edit_cli.datasets.subjects import first_name, split_of
from edit_cli.errors import MissingError, UsageError
from edit_cli.requests import Case, EditRequest, Probe

Writer = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Write rows as JSON lines, or another value as JSON; returns the path."""

    def written(rows: Any, name: str = "data.jsonl") -> str:
        text = rows if isinstance(rows, str) else json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return written


def of(case: Case, kind: str, group: str | None = None) -> list[Probe]:
    return [probe for probe in case.probes if probe.kind == kind and (group is None or probe.group == group)]


def faults(dataset: Dataset) -> list[str]:
    return [str(drop) for drop in dataset.dropped]


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
    with pytest.raises(UsageError, match="split=test is empty: none of the 30 records of .* falls into it .by their field split"):
        Fever("fever", path=write(rows), split="test").load()


def test_an_empty_split_is_one_line(write: Writer) -> None:
    with pytest.raises(UsageError, match="split=test is empty: none of the 3 records .*by subject, dataset.shares=.1, 0, 0"):
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
        ({"template": "{} ends with a space "}, "dataset.template="),
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

KILT_CLAIM = {
    "id": "17",
    "input": "Ada Lund lives in Oslo.",
    "output": [{"answer": "SUPPORTS", "provenance": [{"title": "Ada Lund"}]}],
    "prediction": "SUPPORTS",
    "alternatives": ["REFUTES"],
    "filtered_rephrases": ["Oslo is where Ada Lund lives.", "Ada Lund lives in Oslo.", "Ada Lund is at home in Oslo."],
    "rephrases": ["x"],
    "logit": 1.5,
}


def test_fever_in_the_form_of_ke_flips_the_prediction_and_takes_filtered_rephrases(write: Writer) -> None:
    (case,) = Fever("fever", path=write([KILT_CLAIM]), rephrases=5).load().cases
    assert case.id == "17" and case.requests == (EditRequest("{} lives in Oslo.", "Ada Lund", "REFUTES", "SUPPORTS"),)
    assert of(case, "rewrite") == [Probe("rewrite", KILT_CLAIM["input"], "REFUTES", "SUPPORTS")]
    assert {probe.prompt for probe in of(case, "paraphrase")} == {"Oslo is where Ada Lund lives.", "Ada Lund is at home in Oslo."}
    assert Fever("fever", path=write([KILT_CLAIM])).load().labels == ("SUPPORTS", "REFUTES")


def test_a_prediction_that_is_wrong_is_flipped_to_the_truth_and_the_label_is_what_must_stay(write: Writer) -> None:
    wrong = KILT_CLAIM | {"id": "18", "prediction": "REFUTES", "alternatives": ["SUPPORTS"], "input": "Ada Lund plays the harp."}
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
    row = {"prompt": "Ada Lund sings.", "equiv_prompt": ["Ada Lund is a singer."], "alt": "REFUTES", "unrel_prompt": "x", "unrel_ans": "y"}
    (case,) = Fever("fever", path=write([row]), labels=["true", "false"]).load().cases
    assert case.requests[0] == EditRequest("{} sings.", "Ada Lund", "false", "true")
    assert of(case, "paraphrase") == [Probe("paraphrase", "Ada Lund is a singer.", "false", "true")]


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
    with pytest.raises(UsageError, match=r"asks for a label \(SUPPORTS, REFUTES\), and gpt has none: it writes text; .*dataset.template="):
        judged.refuse_unfit(None, "gpt")
    with pytest.raises(UsageError, match="bert has others: A, B"):
        judged.refuse_unfit(["A", "B"], "bert")
    written = Fever("fever", path=write(claims(1)), template="{} True?").load()
    written.refuse_unfit(None, "gpt")
    with pytest.raises(UsageError, match=r"asks for texts, and bert only chooses a label \(A, B\)"):
        written.refuse_unfit(["A", "B"], "bert")
    written.refuse_unfit(["True", "false"], "bert")  # texts that happen to be its labels, as one's own facts may be


def test_the_command_line_tells_what_a_model_or_a_split_cannot_do(cli: Any, write: Writer) -> None:
    rows = write(claims(3))
    ended = cli("evaluate", "method=ft", "model=tiny-gpt2", "dataset=fever", f"dataset.path={rows}", "limit=1", quick=True)
    assert ended.code == 2 and len(ended.err.strip().splitlines()) >= 1 and "asks for a label" in ended.err and "Traceback" not in ended.err
    ended = cli("evaluate", "method=ft", "dataset=fever", f"dataset.path={rows}", "dataset.shares=[1,0,0]", "dataset.split=test", quick=True)
    assert ended.code == 2 and "dataset.split=test is empty" in ended.err


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


def test_an_alternative_is_neither_the_top_answer_nor_a_right_one(write: Writer) -> None:
    path = write([KE])
    written = {ZsREQuestions("zsre_qa", path=path, seed=seed).load().cases[0].requests[0].target_new for seed in range(20)}
    assert written == {"Di Holm", "Eva Moe"}
    (case,) = ZsREQuestions("zsre_qa", path=path, alternative=1, rephrases=9).load().cases
    assert case.requests == (EditRequest("Who founded {}?", "Norvik", "Eva Moe", "Bo Berg"),)
    assert {probe.prompt for probe in of(case, "paraphrase")} == set(KE["filtered_rephrases"][1:])


def test_questions_of_the_same_form_are_of_one_relation(write: Writer) -> None:
    other = KE | {"id": "b", "input": "Where does Norvik lie?", "output": [{"answer": "Oslo"}], "filtered_rephrases": ["x y"]}
    cases = ZsREQuestions("zsre_qa", path=write([MEND, KE, other]), unrelated="zsre").load().cases
    first = {probe.group: (probe.prompt, probe.target) for probe in of(cases[0], "locality")}
    assert first == {"random": ("Where does Norvik lie?", "Oslo"), "same_relation": ("Who founded Norvik?", "Bo Berg")}
    second = {probe.group: probe.prompt for probe in of(cases[1], "locality")}
    assert second == {"same_relation": "Who founded Orbin?", "same_subject": "Where does Norvik lie?"}


def test_natural_questions_of_a_file_stand_in_for_other_records(write: Writer) -> None:
    questions = write({"questions": ["who was it", "Where is it?"], "answers": [["the man", "him"], "there"]}, "nq.json")
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
    with pytest.raises(UsageError, match="dataset.unrelated=web: choose zsre or nq"):
        ZsREQuestions("zsre_qa", path=write([MEND]), unrelated="web").load()


# zsRE-hard

HARD = KE | {
    "alternatives": ["Di Holm", "Eva Moe"],
    "implied": [["What did Bo Berg found?", "Norvik", 0.9], ["Who is old?", "nobody", 0.1]],
    "statement": "Norvik was founded by Bo Berg.",
}


def test_implied_and_true_false_questions_speak_of_the_new_answer(write: Writer) -> None:
    (case,) = ZsREHard("zsre_hard", path=write([HARD]), unrelated="zsre", alternative=0).load().cases
    assert of(case, "portability", "implied") == [Probe("portability", "What did Di Holm found?", "Norvik", group="implied")]
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
    bad = [KE | {"id": "b"}, HARD | {"id": "c", "input": "What gender is Norvik?"}, HARD | {"id": "d", "implied": "text"}]
    assert faults(ZsREHard("zsre_hard", path=write([HARD, *bad]), unrelated="zsre").load()) == [
        "line 2 (id b): implied holds no question with the right answer in it, and there is no statement",
        "line 3 (id c): input asks for sex or gender, which is left out as published",
        "line 4 (id d): implied is not a list of [question, answer]",
    ]


def test_near_misses_are_worded_like_the_edit_and_about_others(write: Writer) -> None:
    names = [f"Town{chr(65 + i % 26)}{i}" for i in range(60)]
    rows = [
        HARD | {"id": f"{i}", "input": f"Who founded {name} long ago?" if i % 2 else f"Where does one buy {name}?", "implied": HARD["implied"]}
        for i, name in enumerate(names)
    ]
    for case in ZsREHard("zsre_hard", path=write(rows), unrelated="zsre").load(10).cases:
        hard = of(case, "locality", "hard")
        assert len(hard) == 2 and all(first_name(probe.prompt) != case.requests[0].subject for probe in hard)
        assert all(probe.prompt.split()[0] == case.requests[0].text.split()[0] for probe in hard)


# VitaminC

EVIDENCE = "The film Glass Night earned more than 30 million dollars in its first week."
VITAMIN = {
    "unique_id": "u1",
    "case_id": "c1",
    "label": "REFUTES",
    "claim": "Glass Night earned less than 20 million dollars.",
    "evidence": EVIDENCE,
    "page": "Glass Night",
    "revision_type": "real",
}


def test_evidence_is_asserted_and_its_claim_follows_or_is_a_near_miss(write: Writer) -> None:
    neither = VITAMIN | {"unique_id": "u2", "label": "NOT ENOUGH INFO", "page": "Orbin", "claim": "Orbin is loved."}
    first, second = VitaminC("vitaminc", path=write([VITAMIN, neither])).load().cases
    assert first.requests == (EditRequest(EVIDENCE.replace("Glass Night", "{}"), "Glass Night", "SUPPORTS", "REFUTES"),)
    assert of(first, "paraphrase") == [Probe("paraphrase", VITAMIN["claim"], "REFUTES", "SUPPORTS")]
    assert of(first, "locality") == [Probe("locality", "Orbin is loved.", group="random")]
    assert second.requests[0].subject is None and not of(second, "paraphrase")
    assert of(second, "locality", "hard") == [Probe("locality", "Orbin is loved.", group="hard")]


def test_pages_of_one_name_are_used_once_and_labels_can_be_balanced(write: Writer) -> None:
    pages = ["Glass Night", "Orbin", "The Glass Night film", "orbin", "Norvik"]
    rows = [VITAMIN | {"unique_id": f"u{i}", "page": page} for i, page in enumerate(pages)]
    assert VitaminC("vitaminc", path=write(rows)).load().ids == ("u0", "u1", "u4")
    assert len(VitaminC("vitaminc", path=write(rows), one_a_page=False).load().cases) == 5
    labels = ["SUPPORTS"] * 4 + ["REFUTES"] * 2 + ["NOT ENOUGH INFO"] * 3
    rows = [VITAMIN | {"unique_id": f"u{i}", "page": f"Page{i}", "label": label} for i, label in enumerate(labels)]
    kept = VitaminC("vitaminc", path=write(rows), balance=True).load().ids
    assert [sum(labels[int(name[1:])] == label for name in kept) for label in dict.fromkeys(labels)] == [2, 2, 2]


def test_bad_evidence_is_named_by_line_and_field(write: Writer) -> None:
    bad = [
        VITAMIN | {"unique_id": "u2", "revision_type": "synthetic"},
        VITAMIN | {"unique_id": "u3", "evidence": "Too short."},
        VITAMIN | {"unique_id": "u4", "label": "MAYBE"},
        {**{key: value for key, value in VITAMIN.items() if key != "page"}, "unique_id": "u5"},
    ]
    assert faults(VitaminC("vitaminc", path=write([VITAMIN, *bad])).load()) == [
        "line 2 (id u2): revision_type is not real",
        "line 3 (id u3): evidence has no more than 10 words",
        "line 4 (id u4): label is none of SUPPORTS, REFUTES, NOT ENOUGH INFO",
        "line 5 (id u5): page is missing",
    ]


# generation


def test_mends_completions_part_from_their_originals_at_a_word(write: Writer) -> None:
    originals = ["One two three four five six", "Alpha beta gamma", 5]
    completions = ["One two three foul air rose", "Alpha beta gamma delta epsilon", "x"]
    data = {"n_tokens": 3, "original": originals, "completions": completions}
    dataset = Continuations("wikitext", path=write(data, "valid.json"), locality=0).load()
    assert [(case.requests[0].text, case.requests[0].target_new) for case in dataset.cases] == [
        ("One two three", "foul air rose"),
        ("Alpha beta gamma", "delta epsilon"),
    ]
    assert faults(dataset) == ["record 2: passage is not text"]
    for case in dataset.cases:
        (outer,) = of(case, "paraphrase")
        assert outer.target == case.requests[0].target_new and outer.prompt != case.requests[0].text
        assert case.requests[0].text.endswith(outer.prompt)
    with pytest.raises(MissingError, match="not two lists of the same length"):
        Continuations("wikitext", path=write({"completions": ["a"]}, "bad.json")).load()


def article(title: str, lines: int) -> str:
    paragraph = " ".join(f"{title.lower()}{{}}w{i}" for i in range(60))
    return f" = {title} = \n\n = = Part = = \n" + "\n".join(paragraph.replace("{}", str(n)) for n in range(lines)) + "\ntoo short\n"


def test_running_text_is_cut_by_words_and_split_by_article(write: Writer) -> None:
    path = write("".join(article(f"Title{chr(65 + i)}", 2) for i in range(20)) + "é " * 60, "text.txt")
    source = Continuations("wikitext", path=path, passage_words=6, words=3)
    dataset = source.load()
    assert len(dataset.cases) == 40 and not dataset.dropped
    first = dataset.cases[0]
    assert first.requests == (EditRequest(" ".join(f"titlea0w{i}" for i in range(6)), None, "titlea0w6 titlea0w7 titlea0w8"),)
    (other,) = of(first, "locality", "same_subject")
    assert other.prompt.startswith("titlea1w0") and other.target.startswith("titlea1w6")
    articles = {}
    for split in SPLITS:
        cases = Continuations("wikitext", path=path, passage_words=6, words=3, split=split, shares=[0.4, 0.3, 0.3]).load().cases
        articles[split] = {probe.prompt.split()[-1][:6] for case in cases for probe in case.probes}
    assert sum(map(len, articles.values())) == len(set.union(*articles.values())) == 20
    elsewhere = write(article("Other", 5), "other.txt")
    (case,) = Continuations("wikitext", path=path, passage_words=6, words=3, locality_path=elsewhere).load(1).cases
    assert [probe.prompt[:5] for probe in of(case, "locality")] == ["other", "other"]
    with pytest.raises(MissingError, match="holds no paragraph .one a line. of 50 words or more"):
        Continuations("wikitext", path=write("short\n", "short.txt")).load()


# ConvSent

OPINION = {"ent": "Norvik", "pos": ["Norvik is fine.", "I like it."], "neg": ["Norvik is bad.", "I hate it.", "Never."]}


def test_convsent_asks_for_one_sentiment_and_rates_replies_of_both(write: Writer) -> None:
    path = write([OPINION, OPINION | {"ent": "Orbin"}])
    case, _ = ConvSent("convsent", path=path, sentiment="negative", replies=None).load().cases
    assert case.requests == (EditRequest("Topic: {}", "Norvik", "Sentiment: Negative", "Sentiment: Positive"),)
    assert {probe.target for probe in of(case, "opinion", "wanted")} == set(OPINION["neg"])
    assert {probe.target for probe in of(case, "opinion", "unwanted")} == set(OPINION["pos"])
    assert all("Norvik" in probe.prompt and probe.prompt.endswith("?") for probe in of(case, "opinion"))
    (other,) = of(case, "locality", "random")
    assert "Orbin" in other.prompt and other.target in (*OPINION["pos"], *OPINION["neg"])
    asked_for = {ConvSent("convsent", path=path, seed=seed).load().cases[0].requests[0].target_new for seed in range(12)}
    assert asked_for == {"Sentiment: Positive", "Sentiment: Negative"}
    assert len(of(ConvSent("convsent", path=path, replies=1).load().cases[0], "opinion")) == 2


def test_bad_topics_are_named_by_line_and_field(write: Writer) -> None:
    bad = [OPINION | {"id": 1, "ent": ""}, OPINION | {"id": 2, "pos": []}, OPINION | {"id": 3, "neg": "bad"}, OPINION | {"id": 4, "neg": [" "]}]
    assert faults(ConvSent("convsent", path=write([OPINION, *bad])).load()) == [
        "line 2 (id 1): ent is empty",
        "line 3 (id 2): pos is empty",
        "line 4 (id 3): neg is not a list",
        "line 5 (id 4): neg[0] is empty",
    ]
    with pytest.raises(UsageError, match="dataset.sentiment=angry"):
        ConvSent("convsent", path=write([OPINION]), sentiment="angry").load()


# the embedded world


def subjects_of(cases: tuple[Case, ...], known: set[str]) -> set[str]:
    """Which of the known subjects are named in any probe."""
    texts = [f"{probe.prompt} {probe.target}" for case in cases for probe in case.probes]
    return {subject for subject in known if any(subject in text for text in texts)}


@pytest.fixture(scope="module")
def world_subjects() -> dict[str, str]:
    """{subject: its group in the world}."""
    from edit_cli.tiny.world import make_world

    return {fact.subject: fact.group for fact in make_world(0).facts}


@pytest.mark.parametrize(
    "source",
    [
        lambda split: WorldEdits("world", split=split),
        lambda split: WorldEdits("world_claims", records="claims", split=split),
        lambda split: WorldTexts("world_texts", split=split),
        lambda split: WorldHard("world_hard", unrelated="zsre", split=split),
        lambda split: WorldOpinions("world_opinions", split=split),
    ],
    ids=["world", "world_claims", "world_texts", "world_hard", "world_opinions"],
)
def test_embedded_splits_share_no_subject(source: Callable[[str], Any], world_subjects: dict[str, str]) -> None:
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
    assert [case.id for case in alone] == [case.id for place, case in enumerate(every) if subjects[place] not in subjects[:place]]
    assert len(WorldEdits("world", one_a_subject=True, shuffle_seed=0).load(50).cases) == 50


def test_embedded_tasks_have_the_probes_of_their_kind() -> None:
    edits = WorldEdits("world").load(5)
    for case in edits.cases:
        assert {probe.group for probe in of(case, "locality")} == {"random", "same_relation", "same_subject"}
        assert {probe.group for probe in of(case, "paraphrase")} == {"seen", "unseen"}
        (request,) = case.requests
        assert all(request.subject in probe.prompt for probe in (*of(case, "paraphrase"), *of(case, "locality", "same_subject")))
        assert not any(request.subject in probe.prompt for group in ("random", "same_relation") for probe in of(case, "locality", group))
    assert edits.labels is None and WorldEdits("world_claims", records="claims").load(1).labels == ("SUPPORTS", "REFUTES")
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


def test_a_file_of_the_same_form_can_stand_in_for_an_embedded_one(write: Writer) -> None:
    dataset = WorldOpinions("world_opinions", path=write([OPINION])).load()
    assert dataset.cases[0].requests[0].subject == "Norvik" and dataset.split is None
