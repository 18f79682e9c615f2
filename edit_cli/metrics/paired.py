"""Two runs over the same cases: paired differences with 95 % intervals and p-values. Pure functions of arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edit_cli.metrics.bootstrap import bootstrap

FLIPS = 9_999  # random swaps of the two runs' cases
EXACT = 13  # so many differing cases at most have all their swaps counted
CHUNK = 2_000_000  # swaps × cases that are held at a time
TEST = (
    "paired permutation test over cases: for each case the two runs are swapped or not, in all ways where at most"
    f" {EXACT} cases differ, else in {FLIPS:,} random ones"
)

Combine = Callable[[np.ndarray], np.ndarray]  # means (…, parts) to the metric (…)


@dataclass(frozen=True)
class Difference:
    """ci95: None where resampling says nothing (all differences are equal). holm: `p` corrected for all comparisons
    that it is told with, once these are known. pairs: cases that both runs have.
    """

    mean: float
    ci95: tuple[float, float] | None
    p: float
    pairs: int
    holm: float | None = None


def first(means: np.ndarray) -> np.ndarray:
    """The metric that is a mean itself."""
    return means[..., 0]


def paired_difference(
    ours: np.ndarray, theirs: np.ndarray, combine: Combine = first, seed: int = 0
) -> Difference | None:
    """`combine` of the mean over cases of `ours` minus that of `theirs`, (cases, parts) each, a row a case.

    The interval is a percentile bootstrap that takes whole pairs, the p-value (two-sided) is that of `TEST`. None for
    fewer than two cases and for values that are not finite.
    """
    if len(ours) < 2 or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return None
    parts = ours.shape[1]
    observed = float(combine(ours.mean(axis=0)) - combine(theirs.mean(axis=0)))
    if not np.isfinite(observed):
        return None
    ends = None
    if np.ptp(ours - theirs, axis=0).any():
        drawn = bootstrap(
            np.hstack([ours, theirs]),
            seed,
            lambda means: (combine(means[:, :parts]) - combine(means[:, parts:]))[:, None],
        )[:, 0]
        ends = (float(drawn[0]), float(drawn[1])) if np.isfinite(drawn).all() else None
    return Difference(observed, ends, _p_value(ours, theirs, combine, observed, seed), len(ours))


def _p_value(ours: np.ndarray, theirs: np.ndarray, combine: Combine, observed: float, seed: int) -> float:
    gap = theirs - ours
    gap = gap[(gap != 0).any(axis=1)]  # swapping the other cases changes nothing
    exact = len(gap) <= EXACT
    ways = 2 ** len(gap) if exact else FLIPS
    rng, tolerance = np.random.default_rng(seed), 1e-9 * max(1.0, abs(observed))
    size, extreme = max(1, CHUNK // max(1, len(gap))), 0
    for start in range(0, ways, size):
        numbers = np.arange(start, min(start + size, ways))
        swapped = (
            numbers[:, None] >> np.arange(len(gap)) & 1
            if exact
            else rng.integers(0, 2, (len(numbers), len(gap)), dtype=np.int8)
        )
        moved = swapped.astype(float) @ gap
        found = combine((ours.sum(axis=0) + moved) / len(ours)) - combine((theirs.sum(axis=0) - moved) / len(ours))
        extreme += int((np.abs(found) >= abs(observed) - tolerance).sum())
    return extreme / ways if exact else (extreme + 1) / (ways + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method: the chance of any false discovery is bounded."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.asarray(p_values, dtype=float)[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return corrected.tolist()


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The same, each with its p-value corrected for their number."""
    return [
        replace(one, holm=value) for one, value in zip(differences, holm([one.p for one in differences]), strict=True)
    ]
