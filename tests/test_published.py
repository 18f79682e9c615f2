"""Published tables: their shape, and numbers that hold together."""

from __future__ import annotations

import pytest
import yaml

from edit_cli.config import catalog
from edit_cli.errors import MissingError
from edit_cli.files.shapes import checked
from edit_cli.metrics.registry import METRICS
from edit_cli.metrics.scores import harmonic_mean
from edit_cli.report import published
from edit_cli.report.published import FOLDER, Shape, keys, read

ELSEWHERE = {"t5-3b", "phi-2"}  # models of papers that have no settings here


@pytest.mark.parametrize("key", keys())
def test_a_table_has_the_fields_that_its_reader_needs(key):
    table = read(key)
    told = table.told
    assert set(told["data_sets"]) <= set(catalog.names("dataset"))
    assert {row["model"] for row in told["rows"]} <= set(catalog.names("model")) | ELSEWHERE
    named = [(row["model"], row["method"]) for row in told["rows"]]
    assert len(set(named)) == len(named)
    assert told["same"] is True or told["same"].strip()
    for _, metric, mean, low, high, _ in table.rows(list(METRICS)):
        ends = [end for end in (low, mean, high) if end is not None]
        assert ends == sorted(ends)
        if METRICS[metric].unit == "%" and mean is not None:
            assert 0 <= mean <= 100


@pytest.mark.parametrize("key", ["rome-counterfact", "memit-counterfact-10k", "emmet-llama3-single"])
def test_scores_are_the_harmonic_means_of_their_parts(key):
    """Which a slip in copying would break."""
    checked_rows = 0
    for row in read(key).told["rows"]:
        values = {name: value[0] if isinstance(value, list | tuple) else value for name, value in row["values"].items()}
        if {"S", "ES", "PS", "NS"} <= values.keys():
            mean = harmonic_mean(values["ES"], values["PS"], values["NS"])
            assert mean == pytest.approx(values["S"], abs=0.15), (row["model"], row["method"])
            checked_rows += 1
    assert checked_rows >= 2


def test_values_are_in_the_unit_of_the_metric():
    found = {
        (name, metric): (mean, low, high)
        for name, metric, mean, low, high, _ in read("mend-fever").rows(["es_outer", "locality_drawdown"])
    }
    assert found["ENN on bert-base-uncased", "es_outer"] == (pytest.approx(99.0), None, None)
    assert found["MEND on bert-base-uncased", "es_outer"] == (None, pytest.approx(99.0), None)  # "above 0.99"
    assert found["MEND on bert-base-uncased", "locality_drawdown"] == (None, None, pytest.approx(0.1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"year": "2022"}, "year"),
        ({"rows": []}, "rows"),
        ({"same": False}, "same"),
        ({"rows": [{"model": "gpt2-xl", "method": "ROME", "cases": None, "values": {"EX": 1.0}}]}, "columns"),
        ({"rows": [{"model": "gpt2-xl", "method": "ROME", "cases": None, "values": {"ES": "about 5"}}]}, "ES"),
    ],
)
def test_a_table_of_another_shape_is_refused(change, told):
    content = yaml.safe_load((FOLDER / "rome-counterfact.yaml").read_text(encoding="utf-8"))
    with pytest.raises(MissingError, match=told):
        checked({**content, **change}, Shape, "file")


def test_a_column_of_another_metric_is_refused():
    content = yaml.safe_load((FOLDER / "rome-zsre.yaml").read_text(encoding="utf-8"))
    content["metrics"]["Efficacy"]["ours"] = "efficiency"
    with pytest.raises(MissingError, match="a metric of this program"):
        checked(content, Shape, "file")
    assert published.read("rome-zsre").told["metrics"]["Efficacy"]["ours"] == "efficacy_token_accuracy"
