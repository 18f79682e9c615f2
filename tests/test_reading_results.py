"""`edit_cli.read`: a run as tables, as docs/reading-results.md has it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from fabricated import finished_run

import edit_cli
from edit_cli.errors import MissingError
from edit_cli.report.published import keys
from edit_cli.report.tables.frames import MEANS, OBSERVED, VALUES

PAGE = Path(__file__).parent.parent / "docs" / "reading-results.md"
CASES = {"a": (True, True, True), "b": (False, True, True), "c": (True, False, True)}


@pytest.fixture
def run(tmp_path) -> Path:
    return finished_run(tmp_path / "run", CASES)


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished_run(tmp_path / "runs/evaluate/counterfact/tiny-gpt2/memit", CASES)
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    shown: list[pandas.DataFrame] = []
    exec(code, {"print": shown.append})
    edited, related, means = shown
    assert edited["case_id"].tolist() == ["a", "b", "c"]
    assert edited["success"].tolist() == [1.0, 0.0, 1.0]
    assert edited["generated"].tolist() == [" new.", " old.", " new."]
    assert related.shape == (2, 2)
    assert means.set_index("label")["mean"]["Efficacy success"] == pytest.approx(200 / 3)
    written = pandas.read_parquet("cases.parquet")
    pandas.testing.assert_frame_equal(written, edit_cli.read("runs/evaluate/counterfact/tiny-gpt2/memit").cases)


def test_every_column_is_told_on_the_page():
    text = PAGE.read_text()
    observed, values, means = re.split(r"^## `", text, flags=re.MULTILINE)[1:4]
    for part, columns in ((observed, OBSERVED), (values, VALUES), (means, MEANS)):
        assert [name for name in columns if f"`{name}`" not in part] == []
    assert [key for key in keys() if f"`{key}`" not in text] == []


def test_means_of_the_values_are_those_of_the_summary(run):
    frames = edit_cli.read(run)
    after = frames.values.query("moment == 'after'").groupby("metric")["value"].mean()
    means = frames.metrics.query("moment == 'after'").set_index("metric")["mean"]
    assert len(after) > 10
    for metric, value in after.items():
        assert value == pytest.approx(means[metric]), metric
    assert frames.summary is not None and frames.summary["n"] == 3
    assert frames.manifest["method"] == "memit"


def test_a_sequence_has_every_moment(tmp_path):
    frames = edit_cli.read(finished_run(tmp_path / "run", CASES, command="sequential"))
    when = frames.cases.query("moment == 'after'").groupby("when").size().to_dict()
    assert when == {"after_edit": 9, "checkpoint": 9}
    asked = frames.values.query("metric == 'efficacy_success' and moment == 'after'").set_index(["when", "case_id"])
    assert asked["value"]["after_edit"].to_dict() == {"a": 100.0, "b": 0.0, "c": 100.0}
    assert asked["value"]["checkpoint"].to_dict() == {"a": 0.0, "b": 0.0, "c": 100.0}
    kept = frames.values.query("metric == 'neighborhood_generated_unchanged'").set_index(["when", "case_id"])["value"]
    assert kept["checkpoint"].to_dict() == {"a": 100.0, "b": 0.0, "c": 0.0}  # against what it wrote before all edits
    ends = frames.metrics.query("moment == 'checkpoint' and metric == 'efficacy_success'")
    assert (ends["edits"].tolist(), ends["mean"].tolist()) == ([3], [pytest.approx(100 / 3)])
    assert list(frames.cases.columns) == list(OBSERVED)


def test_facts_that_are_asked_beside_the_sample_are_told_apart(tmp_path):
    run = finished_run(tmp_path / "run", CASES, command="sequential")
    file = run / "results.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if line["when"] == "checkpoint":
            line["sampled"] = line["case_id"] == "c"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ends = edit_cli.read(run).values.query("when == 'checkpoint' and metric == 'efficacy_success' and sampled")
    assert ends["value"].tolist() == [100.0]


def test_an_unfinished_run_has_its_cases(run):
    (run / "summary.json").unlink()
    frames = edit_cli.read(run)
    assert len(frames.cases) == 18
    with pytest.raises(MissingError, match="has no summary yet"):
        _ = frames.metrics


def test_without_pandas_it_is_said_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingError, match=r"pip install 'edit-cli\[tables\]'"):
        _ = edit_cli.read(run).cases


def test_what_is_no_run(tmp_path):
    with pytest.raises(MissingError, match="holds no run"):
        edit_cli.read(tmp_path)
    with pytest.raises(AttributeError, match="raed"):
        _ = edit_cli.raed


def test_the_package_alone_is_light():
    code = "import sys, edit_cli; print(sorted({'pandas', 'numpy', 'torch', 'rich', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
