"""Paired differences, held against scipy and closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from edit_cli.metrics.bootstrap import bootstrap
from edit_cli.metrics.columns import combined, matched, over_seeds
from edit_cli.metrics.paired import EXACT, Difference, corrected, holm, paired_difference
from edit_cli.metrics.scores import harmonic_mean


def pair(count: int, shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    drawn = np.random.default_rng(seed)
    return drawn.normal(shift, 1, (count, 1)), drawn.normal(0, 1, (count, 1))


def difference(*arrays: Any) -> Difference:
    found = paired_difference(*arrays)
    assert found is not None
    return found


def width(found: Difference) -> float:
    assert found.ci95 is not None
    return found.ci95[1] - found.ci95[0]


def test_few_cases_are_swapped_in_all_ways():
    ours, theirs = pair(EXACT - 3, 0.5)
    found = difference(ours, theirs)
    every = stats.permutation_test(
        ((ours - theirs)[:, 0],), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    assert found.p == pytest.approx(every.pvalue, abs=1e-12)
    assert (found.mean, found.pairs) == (pytest.approx((ours - theirs).mean()), EXACT - 3)


def test_of_hits_and_misses_it_is_the_exact_test_of_mcnemar():
    ours = np.array([[100.0]] * 9 + [[0.0]] * 2 + [[100.0]] * 40)
    theirs = np.array([[0.0]] * 9 + [[100.0]] * 2 + [[100.0]] * 40)
    assert difference(ours, theirs).p == pytest.approx(stats.binomtest(9, 11).pvalue, abs=1e-12)


def test_many_cases_agree_with_the_t_test():
    ours, theirs = pair(400, 0.15)
    found, t = difference(ours, theirs), stats.ttest_rel(ours[:, 0], theirs[:, 0])
    assert found.p == pytest.approx(t.pvalue, abs=0.01)
    assert found.ci95 == pytest.approx(tuple(t.confidence_interval(0.95)), abs=0.02)
    assert difference(ours, theirs) == found


def test_what_two_runs_share_does_not_widen_the_interval():
    """Cases differ much, the runs hardly: pairing sees it."""
    hard = np.random.default_rng(1).normal(0, 50, (200, 1))
    noise = np.random.default_rng(2).normal(1, 1, (200, 1))
    found = difference(hard + noise, hard)
    assert width(found) == pytest.approx(2 * 1.96 / np.sqrt(200), rel=0.15)
    assert found.p < 0.001


def test_nothing_differs():
    ours, _ = pair(20, 0.0)
    found = difference(ours, ours)
    assert (found.mean, found.ci95, found.p) == (0.0, None, 1.0)


def test_too_little_to_be_told():
    one = np.array([[1.0]])
    assert paired_difference(one, one) is None
    assert paired_difference(np.array([[1.0], [np.inf]]), np.zeros((2, 1))) is None


def test_a_score_is_swapped_with_its_parts():
    """By brute force over all ways to swap four cases."""
    drawn = np.random.default_rng(3)
    ours, theirs = drawn.uniform(20, 100, (4, 3)), drawn.uniform(0, 80, (4, 3))
    found = difference(ours, theirs, combined("score"))

    def gap(mask: int) -> float:
        swap = np.array([[mask >> case & 1] for case in range(4)], bool)
        a, b = np.where(swap, theirs, ours), np.where(swap, ours, theirs)
        return float(harmonic_mean(*a.mean(axis=0)) - harmonic_mean(*b.mean(axis=0)))

    assert found.mean == pytest.approx(gap(0))
    assert found.p == pytest.approx(np.mean([abs(gap(mask)) >= abs(gap(0)) - 1e-9 for mask in range(16)]))
    assert found.ci95 is not None and found.ci95[0] < found.mean < found.ci95[1]


def test_a_resample_without_a_value_takes_that_of_all():
    """Of 200 cases 6 were right before: one resample in four hundred has none of them, and loses nothing by that."""
    parts = np.zeros((200, 2))
    parts[:6, 0] = parts[:3, 1] = 1.0

    def lost(means: np.ndarray) -> np.ndarray:
        before, after = means[..., 0], means[..., 1]
        return np.where(before > 0, 100 * (1 - after / np.where(before > 0, before, 1)), np.nan)[..., None]

    low, high = bootstrap(parts, 0, lost)[:, 0]
    assert (low, high) == (0.0, 100.0)
    found = paired_difference(parts, np.roll(parts, 7, axis=0), lambda means: lost(means)[..., 0])
    assert found is not None and found.ci95 is not None


def test_holms_correction():
    """Steps of 4, 3, 2, 1 times the sorted values, none below the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
    found = difference(*pair(30, 0.9))
    assert 0 < found.p < 0.5
    assert [one.holm for one in corrected([found, found])] == pytest.approx([2 * found.p] * 2)


def test_cases_are_matched_by_name_and_averaged_over_seeds():
    seeds = over_seeds([{"a": (1.0,), "b": (3.0,)}, {"a": (2.0,)}])
    assert seeds == {"a": (1.5,), "b": (3.0,)}
    ours, theirs = matched({"a": (1.0,), "b": (2.0,), "c": (3.0,)}, {"c": (30.0,), "a": (10.0,)})
    assert (ours.tolist(), theirs.tolist()) == ([[1.0], [3.0]], [[10.0], [30.0]])
