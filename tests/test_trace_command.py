"""`edit-cli trace` from end to end on the embedded model."""

from __future__ import annotations

import json

import pytest

from edit_cli.cli import help as help_texts
from edit_cli.cli import main as cli

SMALL = ["protocol.kinds=[mlp]", "protocol.copies=2"]


def edit_cli(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.argv", ["edit-cli", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, printed.out, printed.err


@pytest.fixture
def facts(tmp_path):
    """Two facts of the world that the model knows, one that it does not, one that says nothing of what is true."""
    from embedded import world

    known = [case.requests[0] for case in world()[:2]]
    rows = [{"prompt": r.prompt, "subject": r.subject, "target_new": "x", "target_true": r.target_true} for r in known]
    rows += [{**rows[0], "target_true": "zebra"}, {key: rows[0][key] for key in ("prompt", "subject", "target_new")}]
    (tmp_path / "facts.json").write_text(json.dumps(rows))
    return tmp_path / "facts.json"


def without_times(line: dict) -> dict:
    return {key: value for key, value in line.items() if key != "phases"}


def test_trace_writes_a_run_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys, facts):
    arguments = ["trace", "dataset=facts", f"dataset.path={facts}", f"run_dir={tmp_path / 'run'}", *SMALL]
    code, out, err = edit_cli(monkeypatch, capsys, *arguments)
    assert code == 5 and "case 3 failed: names no expected answer" in err  # traced, but not all
    assert "Causal trace of tiny-gpt2: 2 facts" in out and "1 of 4 facts left out" in out
    assert "2 known facts: up to" in err and "restored states, each in 2 corrupted runs; about" in err
    run = tmp_path / "run"
    lines = [json.loads(text) for text in (run / "results.jsonl").read_text().splitlines()]
    by_id = {line["case_id"]: line for line in lines}
    traced = by_id["0"]
    assert (
        len(traced["tokens"]) == len(traced["roles"]) == len(traced["scores"]["mlp"])
        and len(traced["scores"]["mlp"][0]) == 6
    )
    assert 0 <= traced["low"] < traced["high"] <= 1
    assert by_id["2"]["known"] is False and by_id["2"]["says"].strip() == by_id["0"]["request"]["target_true"]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["traced"], summary["not_known"], summary["failed"]) == (2, 1, 1)
    assert (run / "heatmap.png").exists() and (run / "heatmap.svg").exists()

    (run / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if line["case_id"] != "1"))
    assert edit_cli(monkeypatch, capsys, *arguments)[0] == 5
    again = {
        name: json.loads(text)
        for text in (run / "results.jsonl").read_text().splitlines()
        for name in [json.loads(text)["case_id"]]
    }
    assert without_times(again["1"]) == without_times(by_id["1"])  # with the same noise, in the same company

    assert edit_cli(monkeypatch, capsys, "show", str(run))[1].startswith("Causal trace of tiny-gpt2")
    assert "last subject token" in edit_cli(monkeypatch, capsys, "show", str(run), "--case", "0")[1]


def test_the_limit_counts_facts_that_the_model_knows(tmp_path, monkeypatch, capsys, facts):
    """Of records that it mostly does not know, few would be left to trace."""
    first, second, wrong, _ = json.loads(facts.read_text())
    facts.write_text(json.dumps([wrong, first, {**wrong, "target_true": "yak"}, second, first]))
    arguments = ["trace", "dataset=facts", f"dataset.path={facts}", "limit=2", f"run_dir={tmp_path / 'run'}", *SMALL]
    code, out, err = edit_cli(monkeypatch, capsys, *arguments)
    assert code == 0 and "2 facts at most: averages over fewer than 20 say little" in err
    assert "Causal trace of tiny-gpt2: 2 facts" in out and "2 of 4 facts left out" in out
    lines = [json.loads(text) for text in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert {line["case_id"]: line["known"] for line in lines} == {"0": False, "1": True, "2": False, "3": True}
    assert "all facts are there already" in edit_cli(monkeypatch, capsys, *arguments)[2]


def test_data_without_true_answers_is_refused(tmp_path, monkeypatch, capsys, facts):
    facts.write_text(json.dumps(json.loads(facts.read_text())[3:]))
    code, _, err = edit_cli(
        monkeypatch, capsys, "trace", "dataset=facts", f"dataset.path={facts}", f"run_dir={tmp_path / 'run'}"
    )
    assert code == 2 and "target_true" in err and len(err.strip().splitlines()) == 1


def test_help_and_wrong_settings(tmp_path, monkeypatch, capsys):
    assert "method=NAME" not in help_texts.command("trace") and "known_facts" in help_texts.command("trace")
    code, _, err = edit_cli(monkeypatch, capsys, "trace", "protocol.windw=3", f"run_dir={tmp_path / 'run'}")
    assert code == 2 and "did you mean protocol.window?" in err
    code, _, err = edit_cli(monkeypatch, capsys, "trace", "protocol.kinds=[mpl]", f"run_dir={tmp_path / 'run'}")
    assert code == 2 and "protocol.kinds" in err and "[hidden, mlp, attn]" in err
