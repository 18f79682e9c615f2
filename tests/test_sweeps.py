"""Sweeps: a record of what became of each job, from which the rest goes on."""

from __future__ import annotations

import csv
import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from edit_cli.cli import hydra_launch
from edit_cli.errors import MissingError, UsageError
from edit_cli.experiment import execute as execution
from edit_cli.experiment.devices import CLAIMED, VISIBLE, claim, take_one
from edit_cli.experiment.job import Outcome
from edit_cli.experiment.sweep import Sweep

SWEEP = ("evaluate", "-m", "method=lookup", "limit=1,2")


class Jobs:
    """Stands in for the commands: jobs end as they are told to, and are remembered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ends: dict[int, Outcome | type[BaseException]]) -> None:
        self.ends, self.limits = ends, []  # type: ignore[var-annotated]
        monkeypatch.setattr(execution, "execute", self)

    def __call__(self, composed):
        self.limits.append(composed.node.limit)
        end = self.ends.get(composed.node.limit, Outcome())
        if isinstance(end, Outcome):
            return end
        raise end


def record() -> tuple[Path, list[dict]]:
    (folder,) = Path("runs/sweeps").iterdir()
    return folder, [json.loads(line) for line in (folder / "jobs.jsonl").read_text().splitlines()]


def test_failed_jobs_are_listed_with_the_command_that_runs_only_them_again(cli, monkeypatch):
    first = Jobs(monkeypatch, {2: Outcome(3, error="no such file")})
    ended = cli(*SWEEP)
    assert (ended.code, first.limits) == (3, [1, 2])
    told = ended.err.splitlines()
    assert told[:2] == ["1 job of 2 came to no result:", "  limit=2: no such file (exit code 3)"]
    again = shlex.split(told[2].removeprefix("only these again: "))
    assert again == ["edit-cli", *SWEEP, "--retry-failed"]

    second = Jobs(monkeypatch, {})
    ended = cli(*again[1:])
    assert (second.limits, ended.code) == ([2], 0)
    assert "came to no result" not in ended.err
    folder, lines = record()
    assert [line["number"] for line in lines if line.get("exit_code") is not None] == [0, 1, 1]
    assert json.loads((folder / "sweep.json").read_text())["jobs"] == [["limit=1"], ["limit=2"]]


def test_an_interrupted_sweep_says_how_far_it_came_and_the_same_command_runs_the_rest(cli, monkeypatch):
    first = Jobs(monkeypatch, {2: KeyboardInterrupt})
    ended = cli(*SWEEP)
    assert (ended.code, first.limits) == (130, [1, 2])
    assert "1 of 2 jobs of this sweep are complete" in ended.err
    rest = Jobs(monkeypatch, {})
    assert (cli(*SWEEP).code, rest.limits) == (0, [1, 2])  # every job looks by itself what is left of it


def test_a_sweep_that_only_looks_leaves_no_record(cli, monkeypatch):
    jobs = Jobs(monkeypatch, {})
    assert cli("evaluate", "-m", "limit=1", "--dry-run").code == 0
    assert jobs.limits == [1]
    assert not Path("runs/sweeps").exists()


def test_retry_failed_goes_with_m(cli):
    assert cli("evaluate", "limit=1", "--retry-failed").error.startswith("error: --retry-failed goes with -m")


# --- the record


def sweep(root: Path, *overrides: str) -> Sweep:
    return Sweep.of("evaluate", ("-m", *overrides), overrides, [["limit=1"], ["limit=2"], ["limit=3"]], root)


def test_what_need_not_run_again_is_told_by_the_last_line_of_each_job(tmp_path):
    one = sweep(tmp_path, "limit=1,2,3")
    with pytest.raises(UsageError, match="there is no such sweep in .*/sweeps; give the command that began it"):
        one.retried()
    for number, outcome in enumerate((Outcome(2, error="wrong"), Outcome(5, "runs/some-failed"))):
        one.begin(number, [f"limit={number + 1}"])
        one.end(replace(outcome, number=number, overrides=(f"limit={number + 1}",)))
    assert one.retried() == {1}  # of which the same cases would fail again
    assert one.missing(one.outcomes()) == [2]
    one.begin(1, ["limit=2"])
    assert [outcome.error for outcome in one.outcomes()] == ["wrong", "it began and did not end"]
    assert one.retried() == set()


def test_the_same_settings_are_the_same_sweep_however_its_jobs_are_launched(tmp_path):
    folder = sweep(tmp_path, "limit=1,2,3").folder
    assert sweep(tmp_path, "limit=1,2,3", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2").folder == folder
    assert sweep(tmp_path, "limit=1,2,3", "seed=1").folder != folder


def test_a_line_that_was_being_written_when_the_sweep_was_killed_is_taken_off(tmp_path):
    one = sweep(tmp_path, "limit=1,2,3")
    one.begin(0, ["limit=1"])
    with open(one.folder / "jobs.jsonl", "a") as file:
        file.write('{"exit_code": 0, "run_')
    again = sweep(tmp_path, "limit=1,2,3")
    again.end(Outcome(0, number=0, overrides=("limit=1",)))
    assert [outcome.exit_code for outcome in again.outcomes()] == [0]


def test_a_damaged_record_is_named_with_its_line(tmp_path):
    one = sweep(tmp_path, "limit=1,2,3")
    one.begin(0, ["limit=1"])
    (one.folder / "jobs.jsonl").write_text('{"number": "one", "overrides": []}\n')
    with pytest.raises(MissingError, match=r"jobs\.jsonl, line 1 is damaged: number"):
        one.outcomes()


@pytest.mark.slow
def test_a_file_that_was_missing_is_retried_and_the_table_has_all_jobs(cli):
    fact = {"prompt": "{} plays the", "subject": "Jormia Stenenen", "target_new": "organ"}
    Path("one.jsonl").write_text(json.dumps(fact) + "\n")
    words = ("evaluate", "-m", "method=lookup", "dataset=facts", "dataset.path=one.jsonl,two.jsonl", "limit=1")
    ended = cli(*words, quick=True)
    assert ended.code == 3
    assert "1 job of 2 came to no result" in ended.err
    finished = Path("runs/evaluate/facts/tiny-gpt2/lookup-path=one.jsonl/summary.json")
    written = finished.stat().st_mtime_ns
    Path("two.jsonl").write_text(json.dumps(fact | {"target_new": "harp"}) + "\n")
    ended = cli(*words, "--retry-failed", quick=True)
    assert ended.code == 0
    assert finished.stat().st_mtime_ns == written
    assert [Path(line).name for line in ended.out.splitlines()[-2:]] == [
        "lookup-path=one.jsonl",
        "lookup-path=two.jsonl",
    ]
    folder, _ = record()
    with open(folder / "table.csv", newline="") as file:
        means = {row["run"]: row["mean"] for row in csv.DictReader(file) if row["metric"] == "efficacy_generated_exact"}
    assert means == {"path=one.jsonl": "100.0", "path=two.jsonl": "100.0"}
    assert "| path=two.jsonl | " in (folder / "table.md").read_text()


def test_submitit_says_what_to_install(cli):
    try:
        import hydra_plugins.hydra_submitit_launcher  # noqa: F401
    except ImportError:
        ended = cli("evaluate", "-m", "hydra/launcher=submitit_local", "limit=1,2")
        assert ended.code == 2
        assert "pip install 'edit-cli[submitit]'" in ended.error and len(ended.err.splitlines()) == 1


def test_what_there_is_to_look_at_is_told_before_jobs_run_elsewhere(cli, monkeypatch):
    monkeypatch.setattr(hydra_launch, "_hand_over", lambda *_: None)
    monkeypatch.setattr(hydra_launch, "find_spec", lambda _: True)
    told = cli("evaluate", "-m", "hydra/launcher=submitit_slurm", "runs_dir=mine", "limit=1,2").err
    assert "2 jobs by submitit_slurm: their screens are in mine/.sweep/.submitit" in told
    assert "mine/sweeps/evaluate-" in told and "jobs.jsonl" in told
    assert "screens" not in cli("evaluate", "-m", "limit=1,2").err


# --- jobs side by side


def test_each_worker_takes_a_device_of_its_own(tmp_path):
    assert [claim(tmp_path, ["2", "5"]) for _ in range(3)] == ["2", "5", None]


def test_a_worker_keeps_its_device_from_job_to_job(tmp_path, monkeypatch):
    monkeypatch.setenv(VISIBLE, "4,7")
    monkeypatch.setenv(CLAIMED, "")  # so that it is taken back
    monkeypatch.delenv(CLAIMED)
    for _ in range(2):
        take_one(tmp_path)
        assert os.environ[VISIBLE] == "4"


def kills_itself(composed):
    if composed.node.limit == 2:
        os.kill(os.getpid(), 9)
    return Outcome()


@pytest.mark.slow
def test_a_worker_that_dies_is_a_job_that_failed(cli, monkeypatch):
    monkeypatch.setattr(execution, "execute", kills_itself)
    ended = cli(*SWEEP, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert ended.code == 1
    assert "a process of this sweep was lost" in ended.err
    assert "  limit=2: it began and did not end (exit code 1)" in ended.err.splitlines()
    rest = Jobs(monkeypatch, {})
    assert cli(*SWEEP, "--retry-failed").code == 0  # however its jobs are launched
    assert 2 in rest.limits


@pytest.mark.slow
def test_jobs_of_submitit_are_gathered(cli):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'edit-cli[submitit]'")
    ended = cli("evaluate", "-m", "hydra/launcher=submitit_local", "method=lookup", "limit=1,2", quick=True)
    assert ended.code == 0
    assert [Path(line).name for line in ended.out.splitlines()[-2:]] == ["lookup-limit=1", "lookup-limit=2"]
