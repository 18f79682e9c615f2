"""How each source maps rows to cases, and which rows it drops for which reason."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from edit_cli import assets
from edit_cli.datasets import CounterFact, Dataset, Facts, Row, Source, ZsRE
from edit_cli.errors import MissingError, UsageError
from edit_cli.monitor import Monitor
from edit_cli.requests import Case, EditRequest, Probe
from edit_cli.writing import as_text, bare

FULL = {
    "case_id": 7,
    "pararel_idx": 1,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "Dutch", "id": "Q1"},
        "target_true": {"str": "French", "id": "Q2"},
        "subject": "Anna Lemar",
    },
    "paraphrase_prompts": ["It rained. Anna Lemar grew up speaking", "Anna Lemar spoke "],
    "neighborhood_prompts": ["Paul Ruel speaks"],
    "attribute_prompts": ["Jan Vos speaks"],
    "generation_prompts": ["Anna Lemar lives", "Anna Lemar lives"],
}
FLAT: dict[str, Any] = {
    "case_id": 3,
    "prompt": "Lyon, which twin city does Lyon have? It is",
    "subject": "Lyon",
    "target_new": "Manila",
    "ground_truth": "Beirut",
    "rephrase_prompt": "The twin of Lyon is",
    "locality_prompt": "The twin of Trieste is",
    "locality_ground_truth": "Graz",
}
ZSRE: dict[str, Any] = {
    "subject": "Orbin",
    "src": "Who founded Orbin, and why is Orbin old?",
    "pred": "x",
    "rephrase": "Orbin was founded by whom?",
    "alt": " Maria Sol",
    "answers": ["Per Dahl", "P. Dahl", "Per Dahl", "P. Dahl"],
    "loc": "nq question: who sang first",
    "loc_ans": "Eva",
    "cond": "",
}
FACT = {"prompt": "{} lives in", "subject": "Ada", "target_new": "Oslo"}


class Notes(Monitor):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def write(tmp_path: Path, rows: Any, name: str = "data.json") -> str:
    path = tmp_path / name
    path.write_text(json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def changed(row: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(row))
    inner = copy
    *parents, last = path.split(".")
    for key in parents:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return copy


def only_fault(
    source: type, tmp_path: Path, good: dict[str, Any], bad: dict[str, Any], **options: Any
) -> tuple[str, str, str]:
    """Load a good and a bad row; the bad one's place, field and reason."""
    dataset = source("test", path=write(tmp_path, [good, bad]), **options).load()
    assert len(dataset.cases) == 1 and dataset.total == 2
    (drop,) = dataset.dropped
    return drop.where, drop.field, drop.reason


def test_full_counterfact_gives_every_probe_its_target_and_foil(tmp_path: Path) -> None:
    (case,) = CounterFact("cf", path=write(tmp_path, [FULL])).load().cases
    assert case.id == "7"
    assert case.requests == (EditRequest("The mother tongue of {} is", "Anna Lemar", "Dutch", "French"),)
    assert case.probes == (
        Probe("rewrite", "The mother tongue of Anna Lemar is", "Dutch", "French"),
        Probe("paraphrase", "It rained. Anna Lemar grew up speaking", "Dutch", "French"),
        Probe("paraphrase", "Anna Lemar spoke ", "Dutch", "French"),  # as it was typed
        Probe("neighborhood", "Paul Ruel speaks", "French", "Dutch"),
        Probe("attribute", "Jan Vos speaks", "Dutch", "French"),
        Probe("generation", "Anna Lemar lives"),
        Probe("generation", "Anna Lemar lives"),
    )
    assert case.references == ()


def test_flat_counterfact_is_recognized_and_slots_the_first_occurrence(tmp_path: Path) -> None:
    (case,) = CounterFact("cf", path=write(tmp_path, [FLAT])).load().cases
    (request,) = case.requests
    assert request.prompt == "{}, which twin city does Lyon have? It is"
    assert case.probes == (
        Probe("rewrite", FLAT["prompt"], "Manila", "Beirut"),
        Probe("paraphrase", "The twin of Lyon is", "Manila", "Beirut"),
        Probe("neighborhood", "The twin of Trieste is", "Graz", "Manila"),
    )


@pytest.mark.parametrize(
    ("path", "value", "field", "reason"),
    [
        ("requested_rewrite.target_new.str", " ", "requested_rewrite.target_new.str", "is empty"),
        ("requested_rewrite.target_new.str", "French", "requested_rewrite.target_new.str", "equals the true target"),
        ("requested_rewrite.target_new", "Dutch", "requested_rewrite.target_new", "is not an object"),
        ("requested_rewrite.target_true", ..., "requested_rewrite.target_true", "is missing"),
        ("requested_rewrite.subject", 5, "requested_rewrite.subject", "is not text"),
        ("requested_rewrite.prompt", "{} and {} speak", "requested_rewrite.prompt", "holds more than one slot {}"),
        ("requested_rewrite.prompt", " \n", "requested_rewrite.prompt", "is empty"),
        ("requested_rewrite.prompt", "Somebody speaks", "requested_rewrite.prompt", "does not contain the subject"),
        ("paraphrase_prompts", ..., "paraphrase_prompts", "is missing"),
        ("paraphrase_prompts", "a text", "paraphrase_prompts", "is not a list"),
        ("neighborhood_prompts", ["fine", ""], "neighborhood_prompts[1]", "is empty"),
        ("generation_prompts", [None], "generation_prompts[0]", "is not text"),
        ("requested_rewrite.subject", "\ud800", "requested_rewrite.subject", "is not valid Unicode"),
        ("case_id", [1], "case_id", "is neither a number nor text"),
    ],
)
def test_faults_of_full_records_name_field_and_reason(
    tmp_path: Path, path: str, value: Any, field: str, reason: str
) -> None:
    bad = changed(changed(FULL, "case_id", 8), path, value)
    assert only_fault(CounterFact, tmp_path, FULL, bad) == ("record 1", field, reason)


def test_faults_of_flat_records_name_field_and_reason(tmp_path: Path) -> None:
    bad = changed(FLAT, "locality_prompt", ...) | {"case_id": 4}
    assert only_fault(CounterFact, tmp_path, FLAT, bad) == ("record 1", "locality_prompt", "is missing")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the embedded world: one record for tuning, two for testing, texts for one property."""
    other = changed(changed(FULL, "case_id", 8), "requested_rewrite.target_new", {"str": "Greek", "id": "Q9"})
    records = [FULL | {"split": "tune"}, FULL | {"case_id": 9, "split": "test"}, other | {"split": "test"}]
    samples = [{"name": "Jan", "text": "Jan is Dutch."}, {"name": "M", "text": "M too."}]
    snippets = [{"relation_id": "P103", "target_id": "Q1", "samples": samples}]
    (tmp_path / "world").mkdir()
    write(tmp_path, records, "world/records.json")
    write(tmp_path, snippets, "world/snippets.json")
    monkeypatch.setattr(assets, "FOLDER", tmp_path)


@pytest.mark.usefixtures("world")
def test_the_embedded_world_is_read_by_split_and_brings_its_reference_texts() -> None:
    notes = Notes()
    dataset = CounterFact("counterfact", records="world").load(monitor=notes)
    assert (dataset.ids, dataset.split, dataset.total) == (("9", "8"), "test", 2)
    assert dataset.source == "embedded world, split test"
    assert [case.references for case in dataset.cases] == [("Jan is Dutch.", "M too."), ()]
    assert any("no reference texts for 1 of 2 records" in note for note in notes.notes)
    assert CounterFact("counterfact", records="world", split="tune").load().ids == ("7",)
    assert CounterFact("counterfact", records="world", split="all").load().ids == ("7", "9", "8")
    with pytest.raises(UsageError, match="split=train.*test, tune"):
        CounterFact("counterfact", records="world", split="train").load()


def test_the_shipped_world_has_no_bad_record_no_contradiction_and_texts_for_every_record() -> None:
    dataset = CounterFact("counterfact", records="world", split="all").load()
    assert not dataset.dropped and len(dataset.cases) > 1000
    asked = [(request.prompt, request.subject) for case in dataset.cases for request in case.requests]
    assert len(set(asked)) == len(asked)
    assert all(case.references for case in dataset.cases)


@pytest.mark.usefixtures("world")
def test_a_path_comes_before_the_embedded_world_and_a_split_needs_the_field(tmp_path: Path) -> None:
    path = write(tmp_path, [FLAT])
    assert CounterFact("counterfact", records="world", path=path).load().ids == ("3",)
    with pytest.raises(UsageError, match="no field split"):
        CounterFact("counterfact", records="world", path=path, split="test").load()


@pytest.mark.parametrize(("records", "error"), [("nowhere", MissingError), ("../world", UsageError)])
def test_unknown_embedded_records_are_refused(records: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="dataset.records="):
        CounterFact("counterfact", records=records).load()


def test_zsre_true_writes_the_first_answer_with_the_others_as_aliases(tmp_path: Path) -> None:
    (case,) = ZsRE("zsre_true", path=write(tmp_path, [ZSRE])).load().cases
    assert case.id == "0"
    assert case.requests == (EditRequest("Who founded {}, and why is Orbin old?", "Orbin", "Per Dahl", None),)
    assert case.probes == (
        Probe("rewrite", ZSRE["src"], "Per Dahl", aliases=("P. Dahl",)),
        Probe("paraphrase", ZSRE["rephrase"], "Per Dahl", aliases=("P. Dahl",)),
        Probe("locality", "nq question: who sang first?", "Eva"),
    )


def test_zsre_alt_writes_the_alternative_and_can_strip_the_prefix(tmp_path: Path) -> None:
    (case,) = ZsRE("zsre_alt", path=write(tmp_path, [ZSRE]), target="alt", locality_prefix=False).load().cases
    assert case.requests[0].target_new == "Maria Sol" and case.requests[0].target_true == "Per Dahl"
    assert case.probes[0] == Probe("rewrite", ZSRE["src"], "Maria Sol")
    assert case.probes[2].prompt == "who sang first?"


@pytest.mark.parametrize(
    ("target", "path", "value", "field", "reason"),
    [
        ("alt", "alt", "", "alt", "is empty"),
        ("true", "answers", [], "answers", "is empty"),
        ("true", "answers", "Per Dahl", "answers", "is not a list"),
        ("true", "src", "Who founded it?", "src", "does not contain the subject"),
        ("true", "src", "Who is {} of Orbin?", "src", "holds a slot {} where a full sentence is expected"),
        ("alt", "loc_ans", None, "loc_ans", "is missing"),
    ],
)
def test_faults_of_zsre_records(tmp_path: Path, target: str, path: str, value: Any, field: str, reason: str) -> None:
    assert only_fault(ZsRE, tmp_path, ZSRE, changed(ZSRE, path, value), target=target) == ("record 1", field, reason)


def test_zsre_keeps_the_position_as_id_when_records_are_dropped(tmp_path: Path) -> None:
    rows = [changed(ZSRE, "alt", ""), ZSRE, ZSRE]
    assert ZsRE("zsre_alt", path=write(tmp_path, rows), target="alt").load().ids == ("1", "2")
    with pytest.raises(UsageError, match="choose true or alt"):
        ZsRE("zsre", path=write(tmp_path, rows), target="both").load()


def load_facts(tmp_path: Path, text: str, name: str) -> Dataset:
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))  # with the byte order mark that spreadsheets write
    return Facts("facts", path=str(tmp_path / name)).load()


def test_facts_from_json_lines_with_and_without_optional_fields(tmp_path: Path) -> None:
    full = FACT | {
        "id": "a",
        "prompt": "Where does Ada live? Ada lives in",
        "target_true": "Rome",
        "paraphrases": ["Ada's city is"],
        "neighbors": ["Bo lives in", {"prompt": "Cy lives in", "target": "Bern"}],
    }
    bare = FACT | {"neighbors": ["Bo lives in"]}
    first, second = load_facts(tmp_path, "\n".join([json.dumps(full), "", json.dumps(bare)]), "facts.jsonl").cases
    assert first.id == "a" and first.requests == (
        EditRequest("Where does {} live? Ada lives in", "Ada", "Oslo", "Rome"),
    )
    assert first.probes == (
        Probe("rewrite", "Where does Ada live? Ada lives in", "Oslo", "Rome"),
        Probe("paraphrase", "Ada's city is", "Oslo", "Rome"),
        Probe("neighborhood", "Bo lives in", "Rome", "Oslo"),
        Probe("neighborhood", "Cy lives in", "Bern", "Oslo"),
    )
    assert second.id == "1" and second.requests == (EditRequest("{} lives in", "Ada", "Oslo", None),)
    assert second.probes == (Probe("rewrite", "Ada lives in", "Oslo"), Probe("neighborhood", "Bo lives in"))


def test_facts_from_csv_report_bad_rows_by_line(tmp_path: Path) -> None:
    text = (
        "prompt,subject,target_new,target_true,paraphrases,neighbors,comment\n"
        '"{} lives\nin",Ada,Oslo,,Ada is in | The home of Ada is,,x\n'
        "{} lives in,,Oslo,,,,\n"
        "{} lives in,Bo,Oslo,Oslo,,,\n"
        "{} lives in,Cy,Bonn,Rome,,Ann lives in,,too,many\n"
        "{} lives in,Di,Bonn\n"
    )
    dataset = load_facts(tmp_path, text, "facts.csv")
    assert [case.requests[0].subject for case in dataset.cases] == ["Ada", "Di"]
    assert [probe.prompt for probe in dataset.cases[0].probes if probe.kind == "paraphrase"] == [
        "Ada is in",
        "The home of Ada is",
    ]
    assert list(map(str, dataset.dropped)) == [
        "line 4: subject is empty",
        "line 5: target_new equals target_true",
        "line 6: has more cells than the header",
    ]


@pytest.mark.parametrize(
    ("field", "value", "where", "reason"),
    [
        ("paraphrases", {"a": 1}, "paraphrases", "is neither a list nor text with | between its items"),
        ("paraphrases", "a | ", "paraphrases[1]", "is empty"),
        ("neighbors", [{"target": "Bern"}], "neighbors[0].prompt", "is not text"),
        ("neighbors", [{"prompt": "Bo is", "target": ""}], "neighbors[0].target", "is empty"),
        ("target_new", 1998, "target_new", "is not text"),
    ],
)
def test_faults_of_facts(tmp_path: Path, field: str, value: Any, where: str, reason: str) -> None:
    assert only_fault(Facts, tmp_path, FACT, FACT | {field: value}) == ("record 1", where, reason)


def test_facts_without_a_path_and_fields_that_nobody_reads_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dataset.path=FILE \(prompt, subject, target_new"):
        Facts("facts").load()
    notes = Notes()
    Facts("facts", path=write(tmp_path, [FACT | {"paraphrase": ["typo"]}])).load(monitor=notes)
    assert notes.notes == ["facts: ignored fields: paraphrase"]


@dataclass(frozen=True)
class Capitals(Source):
    """The example of docs/datasets.md: a new source says how one row becomes a case, and nothing else."""

    expects: ClassVar[str] = "country, capital"
    fields: ClassVar[frozenset[str]] = frozenset(("country", "capital"))

    def case(self, row: Row) -> Case:
        request = EditRequest("The capital of {} is", row.phrase("country"), row.phrase("capital"))
        return Case(row.id("id"), (request,), (Probe("rewrite", request.text, request.target_new),))


def test_a_new_source_is_one_class(tmp_path: Path) -> None:
    rows = [{"country": "Norway", "capital": "Oslo"}, {"country": "Chad"}]
    dataset = Capitals("capitals", path=write(tmp_path, rows)).load(1)
    assert [case.requests[0].text for case in dataset.cases] == ["The capital of Norway is"]
    assert [str(drop) for drop in dataset.dropped] == ["record 1: capital is missing"]


# how prompts end, and what stands before answers


def asked(case: Case) -> list[str]:
    """Prompt and answer as one text, of every probe's target and foil."""
    return [as_text(probe.prompt, one) for probe in case.probes for one in (probe.target, probe.foil) if one]


def test_prompts_stay_as_they_were_typed(tmp_path: Path) -> None:
    row = FACT | {
        "prompt": "Where does {} live?\n",
        "paraphrases": ["Ada's city?\t", "Ada lives in "],
        "neighbors": ["Bo?\n\n"],
    }
    (case,) = load_facts(tmp_path, json.dumps(row), "facts.jsonl").cases
    assert case.requests[0].prompt == "Where does {} live?\n"
    assert [probe.prompt for probe in case.probes] == [
        "Where does Ada live?\n",
        "Ada's city?\t",
        "Ada lives in ",
        "Bo?\n\n",
    ]
    assert asked(case) == ["Where does Ada live?\nOslo", "Ada's city?\tOslo", "Ada lives in Oslo"]
    (case,) = CounterFact("cf", path=write(tmp_path, [FLAT | {"rephrase_prompt": "Q?\n"}])).load().cases
    assert case.probes[1].prompt == "Q?\n"
    (case,) = (
        ZsRE("zsre", path=write(tmp_path, [ZSRE | {"src": "Who founded Orbin?\n", "loc": "nq question: who "}]))
        .load()
        .cases
    )
    assert case.requests[0].prompt == "Who founded {}?\n"
    assert case.probes[2].prompt == "nq question: who?"  # a text that a question mark follows


@pytest.mark.parametrize(
    ("said", "joined"),
    [
        ({}, "Ada lives in Oslo"),
        ({"join": "none"}, "Ada lives inOslo"),
        ({"join": ""}, "Ada lives inOslo"),
        ({"join": "space"}, "Ada lives in Oslo"),
        ({"join": " "}, "Ada lives in Oslo"),
        ({"join": None}, "Ada lives in Oslo"),
    ],
)
def test_a_record_says_what_stands_before_its_answers(tmp_path: Path, said: dict[str, Any], joined: str) -> None:
    row = FACT | {"target_true": "Rome"} | said
    (case,) = load_facts(tmp_path, json.dumps(row), "facts.jsonl").cases
    assert asked(case) == [joined, joined.replace("Oslo", "Rome")]
    (request,) = case.requests
    assert (as_text(request.text, request.target_new), bare(request.target_new)) == (joined, "Oslo")


def test_a_data_set_says_it_for_the_records_that_do_not(tmp_path: Path) -> None:
    rows = [FACT, FACT | {"join": "space", "neighbors": [{"prompt": "Bo lives in", "target": "Rome"}]}]
    path = write(tmp_path, rows)
    first, second = Facts("facts", path=path, join="none").load().cases
    assert asked(first) == ["Ada lives inOslo"]
    assert asked(second) == ["Ada lives in Oslo", "Bo lives in Rome", "Bo lives in Oslo"]
    table = "prompt,subject,target_new,join\n{} lives in,Ada,Oslo,\n{} is,Ada,Oslo,none\n"
    first, second = load_facts(tmp_path, table, "facts.csv").cases
    assert (asked(first), asked(second)) == (["Ada lives in Oslo"], ["Ada isOslo"])
    with pytest.raises(UsageError, match="dataset.join=comma: choose none, space or null"):
        Facts("facts", path=path, join="comma").load()
    with pytest.raises(MissingError, match="line 1: join is neither none nor space"):
        load_facts(tmp_path, json.dumps(FACT | {"join": ","}), "facts.jsonl")


def test_the_subject_becomes_a_slot_where_it_stands_as_a_word(tmp_path: Path) -> None:
    row = FACT | {"prompt": "The Parisian mayor of Paris is", "subject": "Paris"}
    (case,) = load_facts(tmp_path, json.dumps(row), "facts.jsonl").cases
    assert case.requests[0].prompt == "The Parisian mayor of {} is"
    assert case.requests[0].subject_span == (22, 27)


def test_the_records_of_malmen_hold_the_answer_to_write(tmp_path: Path) -> None:
    row = {key: ZSRE[key] for key in ("src", "rephrase", "loc", "loc_ans")} | {"ans": "Per Dahl"}
    (case,) = ZsRE("zsre_true", path=write(tmp_path, [row])).load().cases
    assert case.requests[0] == EditRequest("Who founded {}, and why is Orbin old?", "Orbin", "Per Dahl")
    assert [probe.target for probe in case.probes] == ["Per Dahl", "Per Dahl", "Eva"]
    (case,) = ZsRE("zsre_true", path=write(tmp_path, [row | {"ans": ["Per Dahl", "Dahl"], "src": "who?"}])).load().cases
    assert case.requests[0] == EditRequest("who?", None, "Per Dahl") and case.probes[0].aliases == ("Dahl",)
    (case,) = ZsRE("zsre_alt", path=write(tmp_path, [row | {"alt": "Bo"}]), target="alt").load().cases
    assert (case.requests[0].target_new, case.requests[0].target_true) == ("Bo", "Per Dahl")
