"""`evaluate`, `show`, `ls runs` and sweeps, on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Killed, exact, json_lines, observations

from edit_cli.experiment.protocol import EvaluateProtocol
from edit_cli.metrics.summarize import summarize
from edit_cli.monitor import Monitor

FT = ("method=ft", "method.steps=8", "method.lr=5.0e-4")
RUN = Path("runs/evaluate/counterfact/tiny-gpt2/ft")
FINISHED = ("evaluate", *FT, "limit=3")


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def test_a_run_ends_in_a_table_and_in_the_place_where_it_lies(finished, look):
    ended, _ = finished
    assert ended.code == 0
    assert ended.last == str(RUN)
    for told in (
        "ft on tiny-gpt2: 3 facts edited, one at a time",
        "3 of 1,100 records (limit=3)",
        "before",
        "after",
        "Time per edit",
    ):
        assert told in ended.out
    assert ended.out.index("TEACHER-FORCED") < ended.out.index("FREE-RUNNING")
    assert {path.name for path in RUN.iterdir()} >= {"manifest.json", "results.jsonl", "summary.json"}
    assert not Path("outputs").exists()
    assert not Path("multirun").exists()


def test_summary_follows_from_the_lines(cli):
    cli("evaluate", *FT, "limit=3", "protocol.batch_size=2", "protocol.order_seed=5", quick=True)
    found, lines = summary(RUN), json_lines(RUN / "results.jsonl")
    assert found["format"] == 2
    assert (found["command"], found["method"], found["model"]) == ("evaluate", "ft", "tiny-gpt2")
    assert (found["n"], found["failed"], found["edits"]) == (3, 0, 3)
    assert found["dataset"]["limit"] == 3
    assert found["dataset"]["records_total"] == 1100
    assert found["dataset"]["records_scored"] == 3
    assert found["protocol"]["batch_size"] == 2
    assert found["protocol"]["order_seed"] == 5
    assert found["metrics"]["efficacy_success"] == summarize(lines)["efficacy_success"]
    assert (
        found["metrics"]["efficacy_magnitude"]["after"]["mean"]
        > found["metrics"]["efficacy_magnitude"]["before"]["mean"]
    )
    assert found["seconds_per_edit"] == pytest.approx(sum(line["seconds"] for line in lines) / 3)
    assert set(found["peak_memory_bytes"]) == {"host", "device"}
    assert {"seed", "protocol.order_seed", "protocol.observe.seed"} <= set(found["seeds"])
    assert found["versions"]["torch"]
    assert [line["step"] for line in lines] == [0, 0, 1]
    assert [line["case_id"] for line in lines] != sorted((line["case_id"] for line in lines), key=int)


def test_batches_that_the_facts_do_not_fill_are_refused_and_a_smaller_last_one_is_named(cli):
    for more in ((), ("--dry-run",)):
        ended = cli("evaluate", *FT, "limit=2", "protocol.batch_size=25", *more, quick=True)
        assert (ended.code, len(ended.err.strip().splitlines()[-1:])) == (2, 1)
        line = ended.err.strip().splitlines()[-1]
        assert "protocol.batch_size=25: 2 facts are selected" in line and "protocol.batch_size=all" in line
    assert not RUN.exists()
    notes: list[str] = []
    monitor: Any = Monitor()
    monitor.note = notes.append
    for count in (2, 3):
        EvaluateProtocol(batch_size=2).require_facts(count, monitor)
    EvaluateProtocol(batch_size="all").require_facts(1, monitor)
    assert notes == ["the last batch holds 1 fact, the others 2 (protocol.batch_size)"]


def test_batches_do_not_see_each_other(cli):
    """Each batch is taken back before the next: a fact's answers are those that it has when it is edited alone."""
    cli("evaluate", *FT, "limit=2", "protocol.batch_size=1", quick=True)
    first, second = json_lines(RUN / "results.jsonl")
    alone = cli("evaluate", *FT, f"dataset.ids=[{second['case_id']}]", "run_dir=alone", quick=True)
    assert alone.code == 0
    assert observations(Path("alone"))[0]["after"] == observations(RUN)[1]["after"]
    assert first["before"]["perplexity"] == second["before"]["perplexity"]


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_bits_without_losing_or_repeating_a_case(cli, kill_after, size):
    arguments = ("evaluate", *FT, "limit=4", f"protocol.batch_size={size}")
    assert cli(*arguments, "run_dir=whole", quick=True).code == 0
    for lines in (1, 2):
        kill_after(lines)
        with pytest.raises(Killed):
            cli(*arguments, "run_dir=cut", quick=True)
        with open("cut/results.jsonl", "a") as file:
            file.write('{"case_id": "torn')
    assert len(json_lines_whole("cut/results.jsonl")) == 3
    ended = cli(*arguments, "run_dir=cut", quick=True)
    assert ended.code == 0
    assert "3 of 4 cases are there already" in ended.err
    assert exact(Path("cut")) == exact(Path("whole"))
    assert summary(Path("cut"))["metrics"] == summary(Path("whole"))["metrics"]


def json_lines_whole(path: str) -> list[str]:
    return Path(path).read_text().splitlines()[:-1]


def test_a_finished_run_is_shown_again_and_not_repeated(finished, look):
    written = (RUN / "results.jsonl").read_bytes()
    second = look(*FINISHED, quick=True)
    assert second.out.splitlines()[:20] == finished[0].out.splitlines()[:20]
    assert "nothing is edited again" in second.err
    assert (RUN / "results.jsonl").read_bytes() == written


def test_a_changed_configuration_is_refused_by_key(look):
    ended = look(*FINISHED, "method.lr=1.0e-4", "protocol.batch_size=2", quick=True)
    assert ended.code == 2
    assert "method.lr was 0.0005 and is 0.0001" in ended.err
    assert "protocol.batch_size" in ended.err


def test_another_configuration_has_a_place_beside_the_first_or_replaces_it(cli):
    assert cli("evaluate", *FT, "limit=1", "tag=other", quick=True).last == f"{RUN}-other"
    changed = ("evaluate", *FT, "limit=1", "method.lr=1.0e-4", "tag=other")
    assert cli(*changed, quick=True).code == 2
    assert cli(*changed, "overwrite=true", quick=True).code == 0
    assert json_lines(RUN.with_name("ft-other") / "results.jsonl")[0]["after"] is not None


def test_speed_settings_do_not_make_another_run(look):
    assert look(*FINISHED, "model.batch_tokens=512", quick=True).code == 0


def test_records_that_changed_under_the_same_name_are_another_run(cli):
    fact = {"prompt": "{} plays the", "subject": "Ada", "target_new": "violin"}
    Path("facts.jsonl").write_text(json.dumps(fact) + "\n")
    arguments = ("evaluate", *FT, "dataset=facts", "dataset.path=facts.jsonl")
    assert cli(*arguments, quick=True).code == 0
    Path("facts.jsonl").write_text(json.dumps(fact | {"target_new": "flute"}) + "\n")
    ended = cli(*arguments, quick=True)
    assert (ended.code, "data.sha256" in ended.err) == (2, True)


def test_a_case_that_cannot_be_edited_fails_alone(cli):
    facts = [
        {"id": "good", "prompt": "{} plays the", "subject": "Ada", "target_new": "violin", "target_true": "flute"},
        {"id": "long", "prompt": "so " * 200 + "{} plays the", "subject": "Ada", "target_new": "violin"},
        {"id": "fine", "prompt": "{} was born in", "subject": "Bo", "target_new": "Paris"},
    ]
    Path("facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    ended = cli(
        "evaluate", *FT, "dataset=facts", "dataset.path=facts.jsonl", "protocol.batch_size=all", "run_dir=r", quick=True
    )
    assert ended.code == 5
    assert ended.last == "r"
    assert "1 of 3 cases FAILED" in ended.out
    assert "case long failed: " in ended.err
    by_id = {line["case_id"]: line for line in json_lines(Path("r/results.jsonl"))}
    assert by_id["long"]["error"]
    assert by_id["long"]["after"] is None
    assert by_id["good"]["error"] is by_id["fine"]["error"] is None
    assert summary(Path("r"))["failed"] == 1
    assert summary(Path("r"))["edits"] == 2
    again = cli(
        "evaluate", *FT, "dataset=facts", "dataset.path=facts.jsonl", "protocol.batch_size=all", "run_dir=r", quick=True
    )
    assert again.code == 5


def test_errors_end_with_their_own_exit_codes(cli, monkeypatch):
    from edit_cli.editors.finetune.ft import FT as Editor

    def fail_with(error: BaseException):
        def edit(self, requests):
            raise error

        monkeypatch.setattr(Editor, "edit", edit)
        return cli("evaluate", *FT, "limit=1", "run_dir=r", quick=True)

    crashed = fail_with(ZeroDivisionError("unforeseen"))
    assert crashed.code == 1
    assert "ZeroDivisionError: unforeseen" in crashed.err
    assert "Traceback" not in crashed.err
    assert "Traceback" in Path("r/log.txt").read_text()
    assert json.loads(Path("r/manifest.json").read_text())["status"] == "failed"
    memory = fail_with(MemoryError())
    assert (memory.code, "protocol.batch_size" in memory.err) == (4, True)
    allocator = fail_with(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"))
    assert allocator.code == 4
    stopped = fail_with(KeyboardInterrupt())
    assert stopped.code == 130
    assert json.loads(Path("r/manifest.json").read_text())["status"] == "interrupted"


def test_saved_edits_are_the_ones_that_were_asked_about(cli):
    from embedded import embedded_lm

    from edit_cli.edits import store as edit_store

    assert cli("evaluate", *FT, "limit=2", "protocol.save_edits=true", quick=True).code == 0
    lines, lm = json_lines(RUN / "results.jsonl"), embedded_lm()
    for line in lines:
        (edit,) = edit_store.attach(RUN / "edits" / f"{line['step']:04d}", lm)
        probe = line["after"]["probes"][0]
        assert lm.loglikelihood([(probe["prompt"], probe["target"])])[0].nll == pytest.approx(
            probe["target_nll"], abs=1e-4
        )
        assert lm.detach() is edit


# --- show, ls runs
# -----------------------------------------------------------------------------------------------------------------


def test_show_tells_what_the_run_told(finished, look):
    assert look("show", str(RUN)).out.splitlines() == finished[0].out.splitlines()[:-1]
    assert json.loads(look("show", str(RUN), "--json").out) == summary(RUN)


def test_show_a_case_with_the_answers_before_and_after(look):
    line = json_lines(RUN / "results.jsonl")[1]
    shown = look("show", str(RUN), "--case", line["case_id"])
    request = line["requests"][0]
    assert f"→ {request['target_new']} instead of {request['target_true']}" in shown.out
    assert "neighborhood: " in shown.out
    assert json.loads(look("show", str(RUN), "--case", line["case_id"], "--json").out) == line
    missing = look("show", str(RUN), "--case", "nothing")
    assert (missing.code, "has no case nothing" in missing.err) == (3, True)


def test_show_an_unfinished_run(cli, kill_after):
    kill_after(1)
    with pytest.raises(Killed):
        cli("evaluate", *FT, "limit=3", quick=True)
    shown = cli("show", str(RUN))
    assert shown.code == 0
    assert "UNFINISHED: 1 of 3 cases so far" in shown.out


def test_ls_runs(look):
    (row,) = json.loads(look("ls", "runs", "--json").out)
    assert (row["path"], row["command"], row["status"], row["n"]) == (str(RUN), "evaluate", "success", 3)
    assert row["metrics"] == summary(RUN)["metrics"]
    assert "success" in look("ls", "runs").out


# --- sweeps
# ----------------------------------------------------------------------------------------------------------------------


def test_a_sweep_ends_in_one_table_over_its_runs(cli):
    few = ("limit=2", "method.steps=2", "protocol.observe.generate=false")
    ended = cli("evaluate", "-m", "method=ft,ft-l", "protocol.batch_size=1,2", *few, quick=True)
    assert ended.code == 0
    expected = [
        f"runs/evaluate/counterfact/tiny-gpt2/{method}-batch_size={size}"
        for method in ("ft", "ft-l")
        for size in (1, 2)
    ]
    assert ended.out.splitlines()[-4:] == expected
    assert ended.out.count("TEACHER-FORCED") == 0
    table = ended.out.partition("%:")[0]
    assert [line.split()[:2] for line in table.splitlines() if line.startswith("ft")] == [
        [m, f"batch_size={s}"] for m in ("ft", "ft-l") for s in (1, 2)
    ]
    assert all(summary(Path(run))["n"] == 2 for run in expected)


def test_a_failing_job_does_not_stop_the_others(cli):
    ended = cli("evaluate", "-m", "method=ft", "method.layers=[17],[0]", "limit=1", quick=True)
    assert ended.code == 2
    assert ended.err.count("error: layer 17") == 1
    assert ended.last.endswith("ft-layers=0")
    assert summary(Path(ended.last))["n"] == 1
    assert "failed" in ended.out
    assert "  layers=[17]: layer 17 does not exist" in ended.err
    (table,) = Path("runs/sweeps").glob("evaluate-*/table.md")
    (row,) = [line for line in table.read_text().splitlines() if line.startswith("| layers")]
    assert row.startswith("| layers=[0] | ")
    assert "layers=[17]: layer 17 does not exist" in table.read_text()
    rows = table.with_suffix(".csv").read_text()
    assert (
        f"layers=[0],,efficacy_success,{summary(Path(ended.last))['metrics']['efficacy_success']['after']['mean']},"
        in rows
    )


def test_jobs_in_processes_of_their_own_report_too(cli):
    ended = cli(
        "evaluate", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1", "method=ft", "limit=1,2", quick=True
    )
    assert ended.code == 0
    assert [summary(Path(run))["n"] for run in ended.out.splitlines()[-2:]] == [1, 2]


def test_commands_that_measure_nothing_can_be_swept_too(cli, cache_dir):
    ended = cli(
        "precompute-stats", "-m", "layers=[0],[1]", "stats.documents=40", f"cache_dir={cache_dir}", "model.device=cpu"
    )
    assert ended.code == 0
    assert set(ended.out.splitlines()) == {str(cache_dir / "stats" / "tiny-gpt2")}


def test_precompute_stats_tells_what_it_made(cli, cache_dir):
    ended = cli("precompute-stats", "layers=[1,0]", "stats.documents=40", f"cache_dir={cache_dir}", "model.device=cpu")
    assert ended.code == 0
    assert ended.last == str(cache_dir / "stats" / "tiny-gpt2")
    assert [line.split()[:3] for line in ended.out.splitlines() if line[:1] in "01" and line.strip()] == [
        ["0", "512", "40"],
        ["1", "512", "40"],
    ]
    assert list(Path(ended.last).glob("layer-00_*.safetensors"))


def test_layers_left_to_the_method_are_no_error(cli):
    """`method.layers=null` is LoRA's own "all of them"."""
    assert cli("evaluate", "method=lora", "method.layers=null", "method.steps=1", "limit=1", quick=True).code == 0
