"""`compare`: runs side by side, as a table, a file and a figure."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

FT = ("method=ft", "method.steps=5", "protocol.observe.generate=false")


def csv_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache_dir) -> Path:
    """Runs of several sizes, one sequential one, and one of another command."""
    from conftest import invoke

    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for size in (1, 2, "all"):
            tag = ["tag=alone"] if size == 1 else []
            invoke(
                cache_dir,
                "evaluate",
                *FT,
                "limit=3",
                f"protocol.batch_size={size}",
                f"run_dir=b{size}",
                *tag,
                quick=True,
            )
        invoke(
            cache_dir,
            "sequential",
            *FT,
            "limit=2",
            "protocol.batch_size=1",
            "protocol.holdout=1",
            "run_dir=seq",
            quick=True,
        )
        invoke(cache_dir, "trace", "limit=1", "run_dir=trace", "model.device=cpu")
    return folder


@pytest.fixture
def compare(runs, monkeypatch, cache_dir, tmp_path):
    from conftest import invoke

    monkeypatch.chdir(runs)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *arguments: invoke(cache_dir, "compare", *arguments)


@pytest.mark.slow
def test_a_setting_on_the_axis(compare, tmp_path):
    out = tmp_path / "figure"
    ended = compare(
        "b1",
        "b2",
        "ball",
        "--x",
        "protocol.batch_size",
        "--out",
        str(out),
        "--metrics",
        "efficacy_success,neighborhood_success",
    )
    assert ended.code == 0
    assert [line for line in ended.out.splitlines() if line.startswith("ft batch_size=")]
    rows = csv_rows(f"{out}.csv")
    assert [(row["protocol.batch_size"], row["metric"]) for row in rows] == [
        (size, metric) for size in ("1", "2", "3") for metric in ("efficacy_success", "neighborhood_success")
    ]
    summary = json.loads(Path("b2/summary.json").read_text())
    assert float(rows[2]["mean"]) == summary["metrics"]["efficacy_success"]["after"]["mean"]
    assert Path(f"{out}.png").stat().st_size > 5000
    assert "<svg" in Path(f"{out}.svg").read_text()


def test_the_table_in_markdown(compare, tmp_path):
    """Beside the figure, and its name may have dots."""
    assert (
        compare(
            "b1", "b2", "--x", "protocol.batch_size", "--out", str(tmp_path / "v1.2"), "--metrics", "efficacy_success"
        ).code
        == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v1.2.csv", "v1.2.md", "v1.2.png", "v1.2.svg"]
    heads, rule, *rows, _, note = (tmp_path / "v1.2.md").read_text().splitlines()
    assert note.startswith("[low, high]: 95 % interval")
    assert heads.startswith("| run | protocol.batch_size | Efficacy success, % | seconds an edit | peak memory, host |")
    assert set(rule) <= set("|- ")
    assert [row.split(" | ")[:2] for row in rows] == [["| ft", "1"], ["| ft", "2"]]
    summary = json.loads(Path("b2/summary.json").read_text())
    assert rows[1].split(" | ")[2].startswith(f"{summary['metrics']['efficacy_success']['after']['mean']:.1f} [")


def test_runs_can_be_called_by_their_tags(compare, tmp_path):
    assert compare("b1", "b2", "--by", "tag", "--anyway", "--out", str(tmp_path / "tagged")).code == 0
    rows = csv_rows(tmp_path / "tagged.csv")
    assert {row["run"] for row in rows} == {"alone", "ft"}  # a run without a tag has its method's name


def test_checkpoints_on_the_axis(compare, tmp_path):
    ended = compare("seq", "--out", str(tmp_path / "course"))
    assert ended.code == 0
    rows = csv_rows(tmp_path / "course.csv")
    assert [row["facts"] for row in rows if row["metric"] == "efficacy_success"] == ["1", "2"]


def test_traces_are_compared(compare):
    ended = compare("trace", "--format", "csv")
    assert ended.code == 0
    summary = json.loads(Path("trace/summary.json").read_text())
    found = {row["metric"]: float(row["mean"]) for row in csv.DictReader(ended.out.splitlines())}
    assert found["total_effect"] == summary["trace"]["total_effect"]["mean"]
    assert found["peak_mlp"] == summary["peaks"]["mlp"]["mean"]


def test_lines_can_be_told_apart_by_a_setting(compare):
    ended = compare("b1", "b2", "--by", "method.steps", "--anyway")
    assert ended.code == 0
    assert ended.out.count("ft steps=5") == 2
    assert ended.out.index("batch_size 1") < ended.out.index("batch_size 2")  # each in a table of its own


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("b1", "--x", "protocol.batchsize"), 2, "did you mean protocol.batch_size"),
        (("b1", "b2"), 2, "these runs are not alike: protocol.batch_size is 1 (b1) and 2 (b2)"),
        (("b1", "seq"), 2, "these runs are not alike: command is evaluate (b1) and sequential (seq)"),
        (("b1", "--against", "b3"), 2, "--against b3: no run lies there or is called so; there are ft"),
        (("b1", "--published", "rome"), 2, "did you mean rome-zsre"),
        (("b1", "--format", "html"), 2, "--format html: choose csv, markdown, latex"),
        (("b1", "--format", "csv", "--out", "t.tex"), 2, "name it .csv"),
        (("b*x",), 3, "b*x matches nothing"),
        (("b1", "--metrics", "efficacy"), 2, "did you mean efficacy_success"),
        (("b1", "--x", "facts"), 2, "--x facts needs runs of `sequential`"),
        (("b1", "trace"), 2, "these runs are not alike: command is evaluate (b1) and trace (trace)"),
        (("nowhere",), 3, "nowhere holds no run"),
        ((), 2, "Missing argument"),
    ],
)
def test_what_cannot_be_compared_is_told_in_a_line(compare, arguments, code, told):
    ended = compare(*arguments)
    assert ended.code == code
    assert told in ended.err
    assert "Traceback" not in ended.err
