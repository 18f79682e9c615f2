"""95 % intervals: percentile bootstrap over cases (datasets-and-metrics §6.8), exact binomial where that says
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
Interval = tuple[float, float]


def mean_of_rows(values: np.ndarray) -> np.ndarray:
    """Column means of (cases, metrics), over the cases that have the metric (the others hold NaN)."""
    present = ~np.isnan(values)
    return np.where(present, values, 0.0).sum(axis=0) / present.sum(axis=0)


def bootstrap(values: np.ndarray, seed: int, combine: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
    """Percentile intervals (2, metrics) of the column means of (cases, metrics); every resample takes whole rows.

    `combine` maps means (resamples, metrics) to what the intervals are wanted of (resamples, k): paired by
    construction. A resample in which no case has a metric takes the mean over all cases for it, and one of which
    `combine` has no value (NaN) that of all cases.
    """
    from scipy import stats

    count = len(values)
    present = ~np.isnan(values)
    filled, weights, overall = np.where(present, values, 0.0), present.astype(float), mean_of_rows(values)
    of_all = overall if combine is None else combine(overall[None])

    def statistic(drawn: np.ndarray, axis: int) -> np.ndarray:
        """drawn: case indices (resamples, cases).

        Means are products with how often each case was drawn: no gathering.
        """
        drawn = np.atleast_2d(drawn)
        rows = np.arange(len(drawn))[:, None] * count
        times = (
            np.bincount((drawn + rows).ravel(), minlength=len(drawn) * count).reshape(len(drawn), count).astype(float)
        )
        totals = times @ weights
        means = np.where(totals > 0, times @ filled / np.maximum(totals, 1.0), overall)
        found = means if combine is None else combine(means)
        return np.where(np.isnan(found), of_all, found).T

    interval = stats.bootstrap(
        (np.arange(count),),
        statistic,
        n_resamples=RESAMPLES,
        batch=max(1, min(RESAMPLES, 2_000_000 // count)),
        vectorized=True,
        axis=-1,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return np.stack([interval.low, interval.high])


def share_interval(values: np.ndarray) -> Interval | None:
    """Clopper–Pearson interval of a percentage that is 0 in all cases or 100 in all; None for any other sample.

    Resampling such a sample always gives the same mean, and so an interval of width 0, however few the cases.
    """
    if not len(values) or values[0] not in (0.0, 100.0) or np.any(values != values[0]):
        return None
    return _exact(len(values) if values[0] else 0, len(values))


@cache
def _exact(hits: int, count: int) -> Interval:
    """Clopper–Pearson; a table asks for the same few again and again."""
    from scipy import stats

    interval = stats.binomtest(hits, count).proportion_ci(LEVEL, method="exact")
    return 100.0 * float(interval.low), 100.0 * float(interval.high)


def finite(value: float) -> float | None:
    """The number for JSON, which has no infinity: None stands for one that is not finite."""
    return float(value) if math.isfinite(value) else None
