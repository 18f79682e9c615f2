"""Sequential model editing: each rate on a fold by hand; only mistakes are edited; runs go on where they stopped."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import Killed, exact, json_lines, nearly

from edit_cli.datasets import Fever, Source, ZsRE, ZsREQuestions
from edit_cli.errors import UsageError
from edit_cli.experiment.sme_protocol import SmeProtocol, known
from edit_cli.metrics.sme import fold_rates, right, sme_rates, spread
from edit_cli.requests import Case, EditRequest, Probe

GRACE = ("method=grace", "method.layer=4", "method.radius=3.6")
SMALL = ("protocol=sme", "dataset=world", "protocol.folds=2", "protocol.train=3", "protocol.test=3", "protocol.every=2")
FINISHED = ("sequential", *GRACE, *SMALL, "limit=6", "figures=true")
RUN = Path("runs/sequential/world/tiny-gpt2/sme/grace")


def seen(rewrite: bool, *paraphrases: bool) -> dict:
    kinds = ["rewrite"] + ["paraphrase"] * len(paraphrases)
    return {
        "probes": [
            {"kind": kind, "target": "Rome", "target_hits": [hit]}
            for kind, hit in zip(kinds, (rewrite, *paraphrases), strict=True)
        ]
    }


def turn(fold: int, edits: int, before: dict, after: dict | None, error: str | None = None) -> dict:
    mistake = after is not None or error is not None
    return {
        "when": "turn",
        "fold": fold,
        "edits": edits,
        "before": before,
        "after": after,
        "mistake": mistake,
        "error": error,
    }


def kept(fold: int, edits: int, edited: list[int], train: list[int], test: list[int], last: bool = False) -> dict:
    return {
        "when": "kept",
        "fold": fold,
        "edits": edits,
        "edited": edited,
        "train": train,
        "test": test,
        "last": last,
        "error": None,
    }


FOLD = [
    kept(0, 0, [], [1, 1, 1, 0], [1, 1, 0, 0]),
    turn(0, 0, seen(True, False), None),  # right already: skipped, in no rate
    turn(0, 1, seen(False, False), seen(True, True)),
    turn(0, 2, seen(False, True, False, False), seen(False, True, False, False)),
    turn(0, 3, seen(False), None, "no room"),  # failed: in no rate
    kept(0, 2, [1, 0], [1, 1, 0, 0], [1, 1, 1, 0], last=True),
]


def test_each_rate_by_hand():
    """GR pools: 2 of 4 paraphrases, where the mean of the edits' means would be (1 + 1/3) / 2."""
    assert fold_rates(FOLD) == {
        "SR": 1 / 2,
        "GR": 2 / 4,
        "GR before": 1 / 4,
        "ER": 1 / 2,
        "TrainR": 2 / 3,
        "TestR": 3 / 2,
    }


def test_rates_after_the_first_edits_only():
    lines = [*FOLD[:-1], kept(0, 1, [1], [1, 1, 1, 0], [0, 1, 0, 0]), FOLD[-1]]
    assert fold_rates(lines, 1) == {"SR": 1.0, "GR": 1.0, "GR before": 0.0, "ER": 1.0, "TrainR": 1.0, "TestR": 1 / 2}


def test_mean_and_deviation_over_finished_folds():
    other = [
        kept(1, 0, [], [1], [1]),
        turn(1, 1, seen(False, False), seen(True, False)),
        kept(1, 1, [1], [0], [1], last=True),
    ]
    cut = [kept(2, 0, [], [1], [1]), turn(2, 1, seen(False, False), seen(False, False))]
    found = sme_rates([*FOLD, *other, *cut])
    assert found["rates"]["SR"] == {"mean": 0.75, "std": pytest.approx(0.5**0.5 / 2), "folds": 2}
    assert found["rates"]["TrainR"]["mean"] == pytest.approx(1 / 3)
    assert [(fold["fold"], fold["examples"], fold["edits"], fold["finished"]) for fold in found["folds"]] == [
        (0, 4, 2, True),
        (1, 1, 1, True),
        (2, 1, 1, False),
    ]
    assert [(row["edits"], row["ER"]["mean"], row["ER"]["folds"]) for row in found["course"]] == [
        (1, 1.0, 1),
        (2, 0.5, 1),
    ]
    assert spread([3.0]) == {"mean": 3.0, "std": None, "folds": 1}


def test_replies_count_where_there_are_any():
    probe = {"target": "Rome", "aliases": ["the Eternal City"], "target_hits": [False]}
    assert (
        not right(probe)
        and right(probe | {"generated": " eternal city. It is"})
        and not right(probe | {"target_hits": [True], "generated": "Oslo"})
    )


def test_the_true_answers_take_the_place_of_the_written_ones():
    request = EditRequest("{} is in", "Rome", "France", "Italy")
    case = Case(
        "1",
        (request,),
        (Probe("rewrite", "Rome is in", "France", "Italy", ("Gaul",)), Probe("locality", "Oslo is in", "Norway")),
    )
    true = SmeProtocol(answers="right").as_edited(case)
    assert true.requests == (EditRequest("{} is in", "Rome", "Italy", "France"),)
    assert true.probes == (Probe("rewrite", "Rome is in", "Italy", "France"),)
    assert SmeProtocol().as_edited(case).requests == case.requests
    with pytest.raises(UsageError, match="does not tell its right answer"):
        SmeProtocol(answers="right").as_edited(Case("2", (EditRequest("a", None, "b"),), ()))


ANSWERS = ("Per Dahl", "P. Dahl", "Dahl")


def test_every_right_answer_counts(write):
    """An accepted alias is no mistake, and TrainR and TestR take it, too."""
    record = {
        "subject": "Orbin", "src": "Who founded Orbin?", "rephrase": "By whom was Orbin founded?", "alt": "Maria Sol",
        "pred": "Per Dahl", "answers": list(ANSWERS), "loc": "nq question: who sang first", "loc_ans": "Eva",
    }  # fmt: skip
    path = write([record, record | {"src": "Who sold Orbin?"}])
    sources: list[Source] = [
        ZsREQuestions("zsre_qa", path=path, unrelated="zsre"),
        ZsRE("zsre_alt", path=path, target="alt"),
        ZsRE("zsre_true", path=path, target="true"),
    ]
    for source in sources:
        case, other = source.load().cases
        edited = SmeProtocol(answers="right").as_edited(case)
        (request,) = edited.requests
        assert request.target_new == ANSWERS[0] and request.target_true in ("Maria Sol", None)
        for reply in ANSWERS:
            said = [{**asdict(probe), "generated": f" {reply}. And"} for probe in edited.probes]
            assert len(said) == 2 and all(map(right, said)), (source.name, reply)
        assert not right({**asdict(edited.probes[0]), "generated": "Maria Sol"})
        (asked,) = known("train 1", other).probes
        assert right({**asdict(asked), "generated": "P. Dahl"})
    (stays,) = [probe for probe in sources[0].load().cases[0].probes if probe.kind == "locality"]
    assert stays.prompt == "Who sold Orbin?" and right({**asdict(stays), "generated": "P. Dahl"})


def test_the_right_label_is_the_datas_and_not_what_the_model_said(write):
    """KE's records of FEVER have both; where the model was wrong, its label is what an edit replaces."""
    claim = {
        "id": "1", "input": "Rome is in Italy.", "output": [{"answer": "SUPPORTS"}], "prediction": "REFUTES",
        "alternatives": ["SUPPORTS"], "filtered_rephrases": ["Italy holds Rome."],
    }  # fmt: skip
    (case,) = Fever("fever", path=write([claim]), locality=0).load().cases
    assert case.requests[0].target_true == "REFUTES"
    edited = SmeProtocol(answers="right").as_edited(case)
    assert (edited.requests[0].target_new, edited.requests[0].target_true) == ("SUPPORTS", "REFUTES")
    assert {(probe.target, probe.foil) for probe in edited.probes} == {("SUPPORTS", "REFUTES")}
    assert known("test 1", case).probes[0].target == "SUPPORTS"


def test_folds_cut_all_records_at_random_and_none_twice():
    cases = [Case(str(number), (), ()) for number in range(7)]
    folds = SmeProtocol(folds=3, fold_seed=1).cut(cases)
    assert sorted(len(fold) for fold in folds.values()) == [2, 2, 3]
    assert sorted(case.id for fold in folds.values() for case in fold) == [case.id for case in cases]
    assert folds == SmeProtocol(folds=3, fold_seed=1).cut(cases) != SmeProtocol(folds=3, fold_seed=2).cut(cases)
    assert SmeProtocol(folds=3, fold_seed=1, only_folds=[2]).cut(cases) == {2: folds[2]}


@pytest.mark.parametrize(
    "wrong",
    [{"answers": "true"}, {"folds": 0}, {"every": 0}, {"max_edits": 0}, {"only_folds": [3]}, {"only_folds": []}],
)
def test_protocols_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError, match=f"protocol.{next(iter(wrong))}="):
        SmeProtocol(**wrong)


def test_a_run_from_end_to_end(finished, look):
    ended, _ = finished
    assert ended.code == 0 and ended.last == str(RUN)
    summary, lines = json.loads((RUN / "summary.json").read_text()), json_lines(RUN / "results.jsonl")
    assert summary["sme"]["rates"]["SR"] == {"mean": 1.0, "std": 0.0, "folds": 2}
    assert set(summary["sme"]["rates"]) == {"SR", "GR", "ER", "TrainR", "TestR", "GR before"}
    assert summary["edits"] == 6 and [row["edits"] for row in summary["sme"]["course"]] == [2, 3]
    assert all(
        line["mistake"] and not line["before"]["probes"][0]["target_hits"][0]
        for line in lines
        if line["when"] == "turn"
    )
    assert all(name in ended.out for name in ("SR", "GR before", "TrainR", "deviation"))
    assert (RUN / "sme.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (RUN / "sme.svg").read_text()
    assert summary["metrics"]["sme_er"]["at_end"] == {
        "mean": 100 * summary["sme"]["rates"]["ER"]["mean"],
        "ci95": None,
        "n": 2,
    }
    assert [(row["edits"], row["metrics"]["sme_sr"]["mean"]) for row in summary["checkpoints"]] == [(2, 100), (3, 100)]
    shown = look("show", str(RUN))
    assert shown.code == 0 and "TestR" in shown.out
    again = look(*FINISHED, quick=True)
    assert again.out == ended.out and "nothing is edited again" in again.err


@pytest.mark.slow
def test_runs_are_compared_by_their_rates(finished, look):
    """Beside another method, whose edits are lost: the figure has a panel a rate, over the edits of a fold."""
    look("sequential", "method=lookup", *SMALL, "limit=6", "run_dir=other", quick=True)
    ended = look("compare", str(RUN), "other", "--out", "both")
    assert ended.code == 0 and all(
        rate in ended.out for rate in ("SR", "GR", "ER", "TrainR", "TestR", "grace", "lookup")
    )
    assert [line.split(",")[2] for line in Path("both.csv").read_text().splitlines()[1:6]] == [
        f"sme_{rate}" for rate in ("sr", "gr", "er", "train_r", "test_r")
    ]
    assert Path("both.png").read_bytes().startswith(b"\x89PNG") and "| grace | 3 | 100" in Path("both.md").read_text()


def test_a_memory_of_another_model_is_refused(finished, look):
    edit = min((RUN / "edits").iterdir())
    ended = look(
        "edit", *GRACE, "model=tiny-t5", "dataset=world_qa", "limit=1", f"base_edit={edit}", "run_dir=wrong", quick=True
    )
    assert ended.code == 3
    assert (
        f"{edit} was made for tiny-gpt2: this model (tiny-t5) has no transformer.h.4.mlp.c_" in ended.err
        and "Traceback" not in ended.err
    )


@pytest.mark.slow
def test_two_processes_find_the_same(finished, look):
    ended = look(*FINISHED, "processes=2", "run_dir=two", quick=True)
    assert ended.code == 0, ended.err
    one, two = (json.loads((path / "summary.json").read_text()) for path in (RUN, Path("two")))
    assert two["sme"] == nearly(one["sme"]) and two["processes"] == 2
    assert len(json_lines(RUN / "results.jsonl")) == len(json_lines(Path("two/results.jsonl")))


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bits(finished, look, kill_after):
    cut = (*FINISHED, "run_dir=cut")
    for lines in (2, 3, 4):  # in the first fold, at its end, in the second
        kill_after(lines)
        with pytest.raises(Killed):
            look(*cut, quick=True)
    assert look(*cut, quick=True).code == 0
    assert exact(Path("cut")) == exact(RUN)
    whole, again = (json.loads((path / "summary.json").read_text())["sme"] for path in (RUN, Path("cut")))
    assert again == whole


def test_what_is_right_already_is_skipped(cli):
    """In its own answers the model knows the world: nothing is edited, and that is said."""
    ended = cli("sequential", *GRACE, *SMALL, "limit=4", "protocol.answers=right", quick=True)
    assert ended.code == 2
    assert "makes no mistakes" in ended.err and "protocol.answers=written" in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("limit=3", "protocol.folds=4"), "protocol.folds=4 is more than the 3 records"),
        (("limit=4", "protocol.fold=2"), "did you mean"),
        (("limit=880",), "no record is left that is not edited"),
        (("protocol=smee",), "there is no such protocol"),
    ],
)
def test_wrong_input_is_told_in_a_line(cli, arguments, told):
    ended = cli("sequential", *GRACE, *SMALL, *arguments, quick=True)
    assert ended.code == 2 and told in " ".join(ended.err.split()) and "Traceback" not in ended.err


def test_a_record_that_cannot_be_asked_is_not_counted_as_right():
    from types import SimpleNamespace

    from edit_cli.commands import sme

    said: list[str] = []
    known, unknown, long = (Case(name, (), ()) for name in ("known", "unknown", "long"))
    stream: Any = SimpleNamespace(done={}, kept={"train": [known, unknown, long], "test": [known]})
    stream.lm = SimpleNamespace(monitor=SimpleNamespace(note=said.append))
    stream.ask = lambda cases, phase: [
        {"probes": [], "error": "4216 tokens are more than 256"} if case is long else seen(case is known)
        for case in cases
    ]
    line = sme._kept(stream, 0, [])
    assert (line["train"], line["test"]) == ([1, 0], [1])
    assert said == [
        "1 record of 3 for TrainR cannot be asked and is left out (protocol.train): 4216 tokens are more than 256"
    ]
    assert sme._kept(stream, 1, [])["train"] == [1, 0] and len(said) == 1


def test_too_few_mistakes_for_the_folds_are_told():
    from types import SimpleNamespace

    from edit_cli.commands import sme

    wrong, right = (Case(name, (), ()) for name in ("wrong", "right"))
    stream: Any = SimpleNamespace(lm=SimpleNamespace(name="a model"), protocol=SmeProtocol(folds=2))
    stream.ask = lambda cases, phase: [seen(case is not wrong) for case in cases]
    with pytest.raises(
        UsageError, match=r"protocol.folds=2: 1 mistake is too few for so many folds \(fold 1 has none\)"
    ):
        sme._refuse_too_few(stream, {0: [wrong, right], 1: [right]})
    sme._refuse_too_few(stream, {0: [wrong], 1: [right, wrong]})
