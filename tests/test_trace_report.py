"""From traces to effects, proposal, table and figure; and the command from end to end."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from edit_cli.datasets import KnownFacts
from edit_cli.report.figures import heatmap
from edit_cli.report.trace import fact_table, trace_summary, trace_table
from edit_cli.tracing.averages import effects, peak, propose

ROLES = ["subject_first", "subject_last", "further", "further", "last"]


def line(name: str, mlp: list[float], low: float = 0.1, high: float = 0.9, roles: list[str] = ROLES) -> dict:
    """A traced fact; `mlp`: score of each layer at the last subject token."""
    scores = [[low] * len(mlp) for _ in roles]
    scores[roles.index("subject_last")] = mlp
    request = {"prompt": "{} lives in", "subject": "Ada", "target_true": "Oslo"}
    tokens = ["A", "da", " li", "ves", " in"][: len(roles)]
    about = {"case_id": name, "request": request, "known": True, "says": None, "error": None, "tokens": tokens}
    return {
        **about,
        "roles": roles,
        "answer": " Oslo",
        "high": high,
        "low": low,
        "scores": {"mlp": scores},
        "noise_std": 0.5,
    }


def unknown(name: str, error: str | None = None) -> dict:
    request = {"prompt": "{} lives in", "subject": "Bo", "target_true": "Oslo"}
    return {"case_id": name, "request": request, "known": False, "says": None if error else " Rome", "error": error}


def manifest(facts: int, window: int = 2) -> dict:
    about = {"name": "facts", "source": "FILE", "limit": None, "split": None, "ids_sha256": "0", "records_total": facts}
    return {
        "model": "tiny",
        "dataset": {**about, "records_dropped": 0, "records_selected": facts},
        "protocol": {"facts": facts},
        "config": {"protocol": {"window": window, "proposed_layers": 5, "copies": 10, "noise_std": None}},
        "seeds": {},
        "versions": {},
    }


def shown(what) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(what)
    return console.export_text()


def test_effects_are_means_over_facts_in_percent():
    lines = [
        line("1", [0.1, 0.5, 0.2]),
        line("2", [0.3, 0.7, 0.2], low=0.2),
        line("3", [0.2, 0.6, 0.1], roles=["subject_last", "last"]),
    ]
    found = effects(lines)
    assert found["low"]["mean"] == pytest.approx(100 * 0.4 / 3) and found["high"]["n"] == 3
    assert found["total_effect"]["mean"] == pytest.approx(100 * 2.3 / 3)
    at = found["indirect_effect"]["mlp"]
    np.testing.assert_allclose(at["subject_last"]["mean"], [100 * 0.2 / 3, 100 * 1.4 / 3, 100 * 0.1 / 3])
    assert all(
        low <= mean <= high
        for mean, (low, high) in zip(at["subject_last"]["mean"], at["subject_last"]["ci95"], strict=True)
    )
    assert at["further"]["n"] == 2 and at["further"]["mean"] == pytest.approx([0, 0, 0])
    assert "subject_middle" not in at  # no fact has one
    assert effects(lines[:1])["indirect_effect"]["mlp"]["subject_last"]["ci95"] is None


def test_tokens_of_one_role_count_once_a_fact():
    """Two further tokens in one fact, one in the other: each fact's own mean first."""
    two, one = line("1", [0.1]), line("2", [0.1], roles=["subject_last", "further", "last"])
    two["scores"]["mlp"][2], two["scores"]["mlp"][3], one["scores"]["mlp"][1] = [0.3], [0.5], [0.9]
    assert effects([two, one])["indirect_effect"]["mlp"]["further"]["mean"] == pytest.approx([100 * (0.3 + 0.8) / 2])


def indirect(means: list[float], low: float = 1.0) -> dict:
    return {"mlp": {"subject_last": {"mean": means, "ci95": [[low, mean] for mean in means], "n": 9}}}


def chosen(effects: dict[str, Any], window: int) -> list[int]:
    found = propose(effects, window=window, count=5)
    assert found is not None
    return found["layers"]


def test_proposal():
    hill = [float(-abs(layer - 17)) for layer in range(48)]
    assert peak(indirect(hill)["mlp"]["subject_last"])["layer"] == 17
    assert chosen(indirect(hill), window=10) == [13, 14, 15, 16, 17]
    assert chosen(indirect(hill), window=3) == [16, 17, 18]  # the window itself
    low = [float(-abs(layer - 1)) for layer in range(6)]
    assert chosen(indirect(low), window=10) == [0, 1]
    assert propose(indirect(low), window=2, count=5) == {"layer": 1, "mean": 0.0, "ci95": [1.0, 0.0], "layers": [0, 1]}
    assert propose(indirect(hill, low=-0.1), window=10, count=5) is None  # may be zero
    assert propose({"hidden": indirect(hill)["mlp"]}, window=10, count=5) is None


def test_summary_counts_every_fact_and_names_layers():
    lines = [line(str(i), [0.1, 0.5 + i / 100, 0.2]) for i in range(4)] + [
        unknown("4"),
        unknown("5", "names no subject"),
    ]
    summary = trace_summary(manifest(7), lines)
    assert [summary[name] for name in ("facts", "n", "traced", "not_known", "failed")] == [7, 6, 4, 1, 1]
    assert summary["peaks"]["mlp"]["layer"] == 1 and summary["peaks"]["mlp"]["role"] == "subject_last"
    assert summary["protocol"]["noise_std"] == 0.5
    assert json.loads(json.dumps(summary)) == summary
    text = shown(trace_table(summary))
    for told in (
        "method.layers=[0,1]",
        "method.layers=[1]",
        "UNFINISHED: 6 of 7",
        "1 of 7 facts left out",
        "41.5 [",
    ):
        assert told in text
    nothing = trace_summary(manifest(1), [unknown("4")])
    assert (
        nothing["trace"] is None and nothing["proposal"] is None and "nothing to trace" in shown(trace_table(nothing))
    )


def test_single_fact_is_shown_token_by_token():
    text = shown(fact_table(line("1", [0.1, 0.5, 0.2])))
    assert "Ada lives in → Oslo" in text and "last subject token" in text and "40.0 (1)" in text
    assert "' Rome'" in shown(fact_table(unknown("4")))
    assert "no subject" in shown(fact_table(unknown("5", "no subject")))


def test_figure(tmp_path):
    heatmap.draw(trace_summary(manifest(2), [line("1", [0.1, 0.5, 0.2]), line("2", [0.1, 0.6, 0.2])]), tmp_path)
    assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "heatmap.svg").read_text()
    assert "<svg" in svg and svg.count("<image") >= 1


def test_known_facts(tmp_path):
    good = {
        "known_id": 3,
        "subject": "Ada",
        "attribute": "Oslo",
        "template": "{} lives in",
        "prompt": "Ada lives in the city of",
    }
    rows = [good, {**good, "known_id": 4, "prompt": "Bo lives in"}, {**good, "known_id": 5, "attribute": ""}]
    (tmp_path / "known.json").write_text(json.dumps(rows))
    data = KnownFacts(name="known_facts", path=str(tmp_path / "known.json")).load()
    assert data.ids == ("3",)
    (request,) = data.cases[0].requests
    assert request.text == "Ada lives in the city of" and request.subject_span == (0, 3)
    assert request.target_true == request.target_new == "Oslo"
    assert [drop.field for drop in data.dropped] == ["prompt", "attribute"]
