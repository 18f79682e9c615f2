"""`sequential`: edits stay; what was true right after an edit and what is true at the end have names of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Killed, exact, json_lines
from embedded import embedded_lm, world

from edit_cli.edits import store as edit_store
from edit_cli.errors import UsageError
from edit_cli.experiment.protocol import SequentialProtocol
from edit_cli.report.sequence import sequential_summary

FT = ("method=ft", "method.steps=8", "method.lr=5.0e-4")
ULTRAEDIT = ("method=ultraedit", "method.begin_with=0")
FEW = ("limit=6", "protocol.batch_size=2", "protocol.holdout=2", "protocol.checkpoints=[2,6]")
FINISHED = ("sequential", *FT, *FEW, "figures=true")
RUN = Path("runs/sequential/counterfact/tiny-gpt2/ft")


@pytest.mark.parametrize(
    ("sizes", "checkpoints", "expected"),
    [
        ([1] * 10, None, {0, 1, 3, 7, 9}),
        ([10] * 3, None, {0, 1, 2}),
        ([4, 4, 1], [1, 5, 9], {0, 1, 2}),
        ([2, 2, 2], [4], {1, 2}),
        ([7], None, {0}),
    ],
)
def test_checkpoints_are_the_first_steps_that_reach_them_and_the_last(sizes, checkpoints, expected):
    assert SequentialProtocol(checkpoints=checkpoints).checkpoint_steps(sizes) == expected


@pytest.mark.parametrize(
    "wrong", [{"checkpoints": []}, {"checkpoints": [0]}, {"sample": 0}, {"holdout": -1}, {"batch_size": -1}]
)
def test_protocols_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError, match=f"protocol.{next(iter(wrong))}="):
        SequentialProtocol(**wrong)


def test_three_moments_of_every_fact(finished, look):
    ended, _ = finished
    assert ended.code == 0
    assert ended.last == str(RUN)
    found, lines = json.loads((RUN / "summary.json").read_text()), json_lines(RUN / "results.jsonl")
    metric = found["metrics"]["efficacy_magnitude"]
    assert set(metric) == {"before", "after_edit", "at_end"}
    assert metric["before"]["mean"] < metric["after_edit"]["mean"]
    assert [row["edits"] for row in found["checkpoints"]] == [2, 6]
    assert [row["asked"] for row in found["checkpoints"]] == [2, 6]
    assert found["checkpoints"][-1]["metrics"]["efficacy_magnitude"] == metric["at_end"]
    assert found["checkpoints"][0]["held_out"]["neighborhood_success"]["after"]["n"] == 2
    assert found["protocol"]["restored"] is False
    counts = {when: sum(line["when"] == when for line in lines) for when in ("after_edit", "checkpoint", "held_out")}
    assert counts == {"after_edit": 6, "checkpoint": 8, "held_out": 4}
    for told in (
        "6 facts edited, in batches of 2",
        "Nothing is taken back",
        "after edit",
        "at end",
        "WITH MORE AND MORE EDITS",
    ):
        assert told in ended.out
    assert (RUN / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (RUN / "curve.svg").read_text()


def test_the_last_checkpoint_is_the_model_with_all_edits_in_place(look):
    lm = embedded_lm()
    untouched = lm.fingerprint()
    for number in range(3):
        lm.attach(edit_store.load(RUN / "edits" / f"{number:05d}", lm))
    assert len(lm.attached) == 3
    for line in json_lines(RUN / "results.jsonl"):
        if line["when"] == "checkpoint" and line["edits"] == 6:
            probe = line["after"]["probes"][0]
            assert lm.loglikelihood([(probe["prompt"], probe["target"])])[0].nll == pytest.approx(
                probe["target_nll"], abs=1e-4
            )
    for _ in range(3):
        lm.detach()
    assert lm.fingerprint([name for name, _ in lm.model.named_parameters()]) == untouched


def test_answers_before_are_those_of_the_unedited_model(look):
    lm = embedded_lm()
    for line in json_lines(RUN / "results.jsonl"):
        if line["when"] == "after_edit":
            probe = line["before"]["probes"][0]
            assert lm.loglikelihood([(probe["prompt"], probe["target"])])[0].nll == pytest.approx(
                probe["target_nll"], abs=1e-4
            )


def test_held_out_records_are_not_among_the_edited_ones(look):
    lines = json_lines(RUN / "results.jsonl")
    held_out = {line["case_id"].removeprefix("untouched ") for line in lines if line["when"] == "held_out"}
    assert held_out == {case.id for case in world()[6:8]}
    assert not held_out & {line["case_id"] for line in lines if line["when"] == "after_edit"}


@pytest.mark.parametrize(
    "method",
    [*(pytest.param(method, marks=pytest.mark.slow) for method in (FT, ULTRAEDIT)), ("method=grace",)],
    ids=["ft", "ultraedit", "grace"],
)
def test_a_killed_run_ends_in_the_same_bits(cli, kill_after, method):
    """UltraEdit remembers its earlier turns: a run that goes on from saved edits has to remember them too."""
    arguments = (
        "sequential",
        *method,
        "limit=4",
        "protocol.batch_size=2",
        "protocol.holdout=1",
        "protocol.observe.generate=false",
    )
    assert cli(*arguments, "run_dir=whole", quick=True).code == 0
    for lines in (1, 2, 3):  # within a step, at a checkpoint, after the next step's edit
        kill_after(lines)
        with pytest.raises(Killed):
            cli(*arguments, "run_dir=cut", quick=True)
    ended = cli(*arguments, "run_dir=cut", quick=True)
    assert ended.code == 0
    assert exact(Path("cut")) == exact(Path("whole"))
    whole, cut = (json.loads(Path(run, "summary.json").read_text()) for run in ("whole", "cut"))
    assert cut["metrics"] == whole["metrics"]
    assert cut["checkpoints"] == whole["checkpoints"]


def test_a_finished_run_is_shown_again(finished, look):
    first, _ = finished
    again = look(*FINISHED, quick=True)
    assert again.out == first.out
    assert "nothing is edited again" in again.err
    shown = look("show", str(RUN))
    assert shown.out.splitlines() == [line for line in first.out.splitlines()[:-1] if not line.startswith("figure:")]


@pytest.mark.slow
def test_a_sample_is_asked_at_checkpoints(cli):
    cli(*FINISHED, "protocol.sample=3", "protocol.first=0", "protocol.observe.generate=false", quick=True)
    lines = json_lines(RUN / "results.jsonl")
    asked = {
        edits: [line["case_id"] for line in lines if line["when"] == "checkpoint" and line["edits"] == edits]
        for edits in (2, 6)
    }
    assert [len(asked[edits]) for edits in (2, 6)] == [2, 3]


def test_a_case_that_cannot_be_edited_is_left_out_of_every_checkpoint(cli):
    facts = [
        {"id": "long", "prompt": "so " * 200 + "{} plays the", "subject": "Ada", "target_new": "violin"},
        {"id": "fine", "prompt": "{} was born in", "subject": "Bo", "target_new": "Paris"},
    ]
    Path("facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    ended = cli(
        "sequential", *FT, "dataset=facts", "dataset.path=facts.jsonl", "protocol.batch_size=1", "run_dir=r", quick=True
    )
    assert ended.code == 5
    lines = json_lines(Path("r/results.jsonl"))
    assert [line["case_id"] for line in lines if line["when"] == "checkpoint"] == ["fine"]
    assert [line["case_id"] for line in lines if line["error"]] == ["long"]
    again = cli(
        "sequential", *FT, "dataset=facts", "dataset.path=facts.jsonl", "protocol.batch_size=1", "run_dir=r", quick=True
    )
    assert again.code == 5


def test_what_is_forgotten_later_shows_at_the_end_only():
    """A pure function of the lines: right after its edit the fact is known, at the end it is not."""

    def seen(nll: float) -> dict:
        probe = {
            "kind": "rewrite",
            "prompt": "p",
            "target": "new",
            "foil": "old",
            "target_nll": nll,
            "target_hits": [nll < 1],
        }
        rest = {"foil_nll": 1.0, "foil_hits": [nll > 1], "target_predicted": [0], "generated": None}
        return {"probes": [probe | rest], "texts": [], "perplexity": None}

    def line(when: str, edits: int, before: dict | None, after: dict) -> dict:
        return {
            "case_id": "a", "step": 0, "requests": [{}], "before": before, "after": after,
            "seconds": 1.0, "error": None, "when": when, "edits": edits, "phases": {"edit": 1.0},
        }  # fmt: skip

    about = dict.fromkeys(
        ("name", "source", "records_total", "records_dropped", "records_selected", "limit", "split", "ids_sha256")
    )
    manifest = {
        "method": "m", "model": "t", "dataset": about, "protocol": {"restored": False},
        "config": {"protocol": {}}, "seeds": {}, "versions": {},
    }  # fmt: skip
    lines = [
        line("after_edit", 1, seen(2.0), seen(0.5)),
        line("checkpoint", 1, None, seen(0.5)),
        line("checkpoint", 9, None, seen(2.0)),
    ]
    found = sequential_summary(manifest, lines)
    means = {side: entry["mean"] for side, entry in found["metrics"]["efficacy_success"].items()}
    assert means == {"before": 0.0, "after_edit": 100.0, "at_end": 0.0}
    assert [row["metrics"]["efficacy_success"]["mean"] for row in found["checkpoints"]] == [100.0, 0.0]
    assert found["seconds"] == {"edit": 3.0}


RUINOUS = ("method=ft", "method.steps=40", "method.lr=5.0e-2", "protocol.batch_size=1", "protocol.checkpoints=[1,2,4]")


@pytest.mark.slow
def test_a_run_that_destroys_its_model_can_be_stopped(cli, kill_after):
    arguments = ("sequential", *RUINOUS, "limit=4", "protocol.holdout=1", "run_dir=r", "protocol.stop_on_collapse=true")
    kill_after(4)  # the line about the model: the collapse is found out again
    with pytest.raises(Killed):
        cli(*arguments, quick=True)
    ended = cli(*arguments, quick=True)
    assert ended.code == 6
    assert "COLLAPSED by 1 fact:" in ended.words
    assert "the run was stopped there" in ended.words
    summary = json.loads(Path("r/summary.json").read_text())
    assert summary["stopped"]
    assert summary["n"] == 1
    assert cli(*arguments, quick=True).code == 6
    went_on = cli(*arguments[:-2], "run_dir=on", quick=True)
    assert went_on.code == 0
    assert "the run went on" in went_on.words


def test_checkpoints_beyond_the_facts_are_refused(cli):
    ended = cli("sequential", *FT, "limit=4", "protocol.checkpoints=[2,9]", quick=True)
    assert ended.code == 2
    assert "9 is beyond the 4 facts of this run" in ended.err
    assert not Path("runs").exists()
