"""Averages and intervals over cases."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from edit_cli.metrics.bootstrap import bootstrap, share_interval
from edit_cli.metrics.summarize import case_values, summarize


def probe(kind: str, success: bool, **rest) -> dict:
    target, foil = (1.0, 2.0) if success else (2.0, 1.0)
    return {"kind": kind, "prompt": "p", "target": "x", "foil": "y", "target_nll": target, "foil_nll": foil, **rest}


def case(
    index: int, rewrite: bool | None = True, paraphrase: bool | None = None, neighborhood: bool | None = None, **rest
) -> dict:
    wanted = {"rewrite": rewrite, "paraphrase": paraphrase, "neighborhood": neighborhood}
    seen = {
        "probes": [probe(kind, success) for kind, success in wanted.items() if success is not None],
        "texts": [],
        "perplexity": None,
    }
    return {"case_id": str(index), "step": index, "before": None, "after": seen, "error": None, **rest}


def test_only_metrics_and_sides_with_data_appear():
    summary = summarize([case(0), case(1)])
    assert set(summary) == {"efficacy_success", "efficacy_magnitude"}
    assert set(summary["efficacy_success"]) == {"after"}
    assert summarize([]) == {}


def test_n_counts_the_cases_that_have_the_metric():
    summary = summarize(
        [case(0, paraphrase=True), case(1), case(2, paraphrase=False), case(3, error="rejected"), case(4)]
    )
    assert summary["efficacy_success"]["after"]["n"] == 4
    assert summary["paraphrase_success"]["after"] | {"ci95": None} == {"mean": 50.0, "ci95": None, "n": 2}


def test_one_case_has_no_interval():
    assert summarize([case(0)])["efficacy_success"]["after"] == {"mean": 100.0, "ci95": None, "n": 1}


def test_all_of_a_hundred_is_not_certainty():
    low, high = summarize([case(i) for i in range(100)])["efficacy_success"]["after"]["ci95"]
    assert low == pytest.approx(100 * 0.025 ** (1 / 100)) and high == 100.0  # Clopper–Pearson in closed form
    low, high = summarize([case(i, rewrite=False) for i in range(100)])["efficacy_success"]["after"]["ci95"]
    assert low == 0.0 and high == pytest.approx(100 * (1 - 0.025 ** (1 / 100)))


def test_equal_values_that_are_no_share_have_no_interval():
    summary = summarize([case(i) for i in range(10)])
    assert (
        summary["efficacy_magnitude"]["after"]["ci95"] is None
        and summary["efficacy_success"]["after"]["ci95"][1] == 100.0
    )


def test_binomial_interval_is_for_unanimous_shares_only():
    assert share_interval(np.array([100.0, 0.0])) is None
    assert share_interval(np.array([50.0, 50.0])) is None
    assert share_interval(np.array([])) is None


def test_bootstrap_is_close_to_the_normal_approximation():
    rng = np.random.default_rng(3)
    hits = rng.random(2000) < 0.3
    entry = summarize([case(i, rewrite=bool(hit)) for i, hit in enumerate(hits)])["efficacy_success"]["after"]
    half = 1.96 * 100 * hits.std() / math.sqrt(len(hits))
    assert entry["mean"] == pytest.approx(100 * hits.mean())
    assert entry["ci95"] == pytest.approx([entry["mean"] - half, entry["mean"] + half], abs=0.15 * half)


def test_bootstrap_equals_resampling_by_gathering():
    """The product with draw counts is the mean of the drawn values: the same draws through scipy give the same
    interval.
    """
    values = np.random.default_rng(0).normal(size=50)
    drawn = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, vectorized=True, method="percentile", rng=np.random.default_rng(7)
    )
    assert bootstrap(values[:, None], seed=7)[:, 0] == pytest.approx(list(drawn.confidence_interval))


def test_seed_fixes_the_interval():
    lines = [case(i, rewrite=i % 3 == 0) for i in range(40)]
    assert summarize(lines, seed=1) == summarize(lines, seed=1)
    values = np.random.default_rng(0).normal(size=(40, 1))
    assert (bootstrap(values, seed=1) == bootstrap(values, seed=1)).all()
    assert (bootstrap(values, seed=1) != bootstrap(values, seed=2)).all()


def test_order_of_metrics_is_that_of_the_registry():
    summary = summarize([case(i, True, i > 0, i > 1) for i in range(4)])
    assert next(iter(summary)) == "efficacy_success" and list(summary)[-1] == "score"


def test_score_is_the_harmonic_mean_of_the_averages_not_the_average_of_harmonic_means():
    summary = summarize([case(0, True, True, False), case(1, True, False, True)])
    averages = [summary[f"{name}_success"]["after"]["mean"] for name in ("efficacy", "paraphrase", "neighborhood")]
    assert averages == [100.0, 50.0, 50.0]
    assert summary["score"]["after"]["mean"] == pytest.approx(60.0)  # every case by itself has 0


def test_score_is_zero_if_one_average_is():
    entry = summarize([case(i, True, True, False) for i in range(20)])["score"]["after"]
    assert entry["mean"] == 0.0 and entry["n"] == 20
    low, high = entry["ci95"]
    neighborhood = 100 * (1 - 0.025 ** (1 / 20))
    assert low == 0.0 and high == pytest.approx(3 / (1 / 100 + 1 / 100 + 1 / neighborhood))


def test_score_needs_all_three():
    assert "score" not in summarize([case(0, True, True), case(1, True, True)])


def test_score_interval_is_paired():
    """Cases that win one part and lose the other: resampled together the parts' errors cancel, apart they would not."""
    lines = [case(i, True, i % 2 == 0, i % 2 == 1) for i in range(200)]
    low, high = summarize(lines)["score"]["after"]["ci95"]
    mean = summarize(lines)["score"]["after"]["mean"]
    assert mean == pytest.approx(60.0)
    assert high < 60.6  # unpaired: about ± 3; upwards only the second order and the width of the certain part are left
    assert low < 60.0


def test_score_of_perfect_parts_is_not_certain():
    low, high = summarize([case(i, True, True, True) for i in range(50)])["score"]["after"]["ci95"]
    assert high == 100.0 and low == pytest.approx(100 * 0.025 ** (1 / 50))


def test_score_where_cases_lack_a_part_uses_the_averages_shown():
    lines = [case(i, True, i % 2 == 0, None if i < 5 else i % 3 == 0) for i in range(30)]
    summary = summarize(lines)
    averages = [summary[f"{name}_success"]["after"]["mean"] for name in ("efficacy", "paraphrase", "neighborhood")]
    entry = summary["score"]["after"]
    assert summary["neighborhood_success"]["after"]["n"] == 25 and entry["n"] == 30
    assert entry["mean"] == pytest.approx(3 / sum(1 / value for value in averages))
    assert entry["ci95"][0] < entry["mean"] < entry["ci95"][1]


def test_token_score_for_sets_without_foils():
    def answer(kind: str, hits: list[bool]) -> dict:
        return {
            "kind": kind,
            "prompt": "q",
            "target": "a",
            "foil": None,
            "target_nll": 1.0,
            "foil_nll": None,
            "target_hits": hits,
        }

    probes = [
        answer("rewrite", [True, True]),
        answer("paraphrase", [True, False]),
        answer("locality", [False, True, False, False]),
    ]
    summary = summarize(
        [{"case_id": "1", "step": 0, "before": None, "after": {"probes": probes, "texts": []}, "error": None}]
    )
    assert summary["token_score"]["after"]["mean"] == pytest.approx(3 / (1 / 100 + 1 / 50 + 1 / 25))
    assert "score" not in summary


def with_perplexity(index: int, step: int, nll: float | None) -> dict:
    line = case(index, step=step)
    line["after"]["perplexity"] = {"nll": nll, "tokens": 100}
    line["before"] = {"probes": [], "texts": [], "perplexity": {"nll": 200.0, "tokens": 100}}
    return line


def test_perplexity_is_averaged_over_steps():
    lines = [
        with_perplexity(0, 0, 200.0),
        with_perplexity(1, 0, 200.0),
        with_perplexity(2, 0, 200.0),
        with_perplexity(3, 1, 300.0),
    ]
    entry = summarize(lines)["perplexity"]["after"]
    assert entry["n"] == 2
    assert entry["mean"] == pytest.approx((math.exp(2) + math.exp(3)) / 2)
    assert entry["ci95"] == pytest.approx([math.exp(2), math.exp(3)])


def test_perplexity_of_one_step_or_one_model_has_no_interval():
    lines = [with_perplexity(0, 0, 250.0), with_perplexity(1, 0, 250.0)]
    assert summarize(lines)["perplexity"]["after"] == {"mean": pytest.approx(math.exp(2.5)), "ci95": None, "n": 1}
    lines = [with_perplexity(0, 0, 250.0), with_perplexity(1, 1, 260.0)]
    assert summarize(lines)["perplexity"]["before"] == {"mean": pytest.approx(math.exp(2)), "ci95": None, "n": 2}


def test_a_wrecked_model_gives_valid_json():
    summary = summarize([with_perplexity(0, 0, None), with_perplexity(1, 1, 250.0)])
    assert summary["perplexity"]["after"] == {"mean": None, "ci95": None, "n": 2}
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_entropy_and_reference_score_come_from_the_texts():
    lines = [case(i) for i in range(3)]
    for line, texts in zip(lines, (["a b c d"], ["x x x", "a b c d"], []), strict=True):
        line["after"]["texts"] = texts
    summary = summarize(lines, references={"0": ["bb cc dd"], "1": ["zz yy"]})
    four = 100 * (math.log2(3) + 2 * math.log2(2)) / 3
    assert summary["generation_entropy"]["after"]["n"] == 2
    assert summary["generation_entropy"]["after"]["mean"] == pytest.approx((four + four / 2) / 2)
    assert summary["reference_score"]["after"]["mean"] == 0.0 and summary["reference_score"]["after"]["n"] == 2
    assert "reference_score" not in summarize(lines)


def test_case_values_keep_the_place_of_failed_cases():
    values = case_values([case(0), case(1, error="rejected"), case(2, rewrite=False)])
    assert [value["after"].get("efficacy_success") for value in values] == [100.0, None, 0.0]


def test_ten_thousand_cases_stay_in_bounded_memory():
    """Resampling works in batches; the answer is that of the normal approximation."""
    values = np.random.default_rng(0).normal(50, 10, size=(10_000, 12))
    low, high = bootstrap(values, seed=0)
    assert high - low == pytest.approx(np.full(12, 2 * 1.96 * 10 / 100), rel=0.1)
