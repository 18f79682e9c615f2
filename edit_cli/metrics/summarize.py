"""Aggregates over cases with 95 % intervals: from lines of results.jsonl to the `metrics` of summary.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import numpy as np

from edit_cli.errors import UsageError
from edit_cli.metrics.bootstrap import bootstrap, finite, mean_of_rows, share_interval
from edit_cli.metrics.published import AGGREGATES, published_values
from edit_cli.metrics.registry import SCORES, Metric, metrics, of_plugins
from edit_cli.metrics.scores import Side, generation_entropy, harmonic_mean, is_scored, perplexity, probe_values
from edit_cli.metrics.text import EntropyMeter, ReferenceScorer

Line = Mapping[str, Any]
Entry = dict[str, Any]
SIDES: tuple[Side, ...] = get_args(Side)


def case_values(
    lines: Iterable[Line], references: Mapping[str, Sequence[str]] | None = None
) -> list[dict[Side, dict[str, float]]]:
    """For each line, {side: {metric id: value}}: all metrics that one case has by itself, in the units of the registry.

    Failed cases get empty sides. `references`: {case id: its reference texts}.
    """
    lines, meter, scorer = list(lines), EntropyMeter(), ReferenceScorer(references or {})
    own = of_plugins()
    table: list[dict[Side, dict[str, float]]] = [{side: {} for side in SIDES} for _ in lines]
    for side in SIDES:
        sampled = []
        for index, line in enumerate(lines):
            if not is_scored(line):
                continue
            values = probe_values(line, side)
            table[index][side] = values | published_values(line, side, values)
            for metric in own.values():
                if (value := _own(metric, line, side)) is not None:
                    table[index][side][metric.id] = value
            entropy = generation_entropy(line, side, meter)
            if entropy is not None:
                table[index][side]["generation_entropy"] = entropy
                sampled.append(index)
        cosines = scorer(
            [lines[index]["case_id"] for index in sampled], [lines[index][side]["texts"] for index in sampled]
        )
        for index, cosine in zip(sampled, cosines, strict=True):
            if cosine is not None:
                table[index][side]["reference_score"] = 100.0 * cosine
    return table


def _own(metric: Metric, line: Line, side: Side) -> float | None:
    """The value of a plug-in's metric. Raises UsageError where it comes to none."""
    assert metric.of is not None
    try:
        value = metric.of(line, side)
        return None if value is None else float(value)
    except Exception as error:
        raise UsageError(
            f"the metric {metric.id} of a plug-in failed on case {line.get('case_id')}, {side} the edit:"
            f" {type(error).__name__}: {error}; what was observed is kept, the same command makes the table again"
        ) from error


def summarize(
    lines: Iterable[Line], references: Mapping[str, Sequence[str]] | None = None, seed: int = 0
) -> dict[str, dict[Side, Entry]]:
    """{metric id: {"before": entry, "after": entry}} in the registry's order; only metrics and sides that have data.

    entry: {"mean", "ci95": [low, high], "n": cases that have the metric}. A mean that is not finite (the perplexity of
    a wrecked model) is None; so is the interval of a single case, or of equal values other than 0 % and 100 %. Lines
    with an error are left out.
    """
    lines = list(lines)
    values, known = case_values(lines, references), metrics()
    columns = {
        (metric, side): np.array([case[side].get(metric, math.nan) for case in values])
        for metric in known
        for side in SIDES
        if any(metric in case[side] for case in values)
    }
    entries = _means(columns, seed)
    for metric, parts in SCORES.items():
        for side in SIDES:
            if all((part, side) in columns for part in parts):
                entries[metric, side] = _score(
                    [columns[part, side] for part in parts], [entries[part, side] for part in parts], seed
                )
    for metric, aggregate in AGGREGATES.items():
        rows = [row for line in lines if is_scored(line) and (row := aggregate.parts(line)) is not None]
        if rows and not np.isnan(aggregate.of(np.array(rows).mean(axis=0))):
            entries[metric, "after"] = _aggregate(np.array(rows), aggregate.of, seed)
    for side in SIDES:
        steps = {
            line.get("step", 0): value
            for line in lines
            if is_scored(line) and (value := perplexity(line, side)) is not None
        }
        if steps:
            entries["perplexity", side] = _perplexity(np.array(list(steps.values())), seed)
    summary: dict[str, dict[Side, Entry]] = {}
    for metric in known:
        sides = {side: entries[metric, side] for side in SIDES if (metric, side) in entries}
        if sides:
            summary[metric] = sides
    return summary


def _means(columns: Mapping[tuple[str, Side], np.ndarray], seed: int) -> dict[tuple[str, Side], Entry]:
    """Means with intervals. Metrics that the same cases have are resampled together, each group over its own cases."""
    groups: dict[bytes, list[tuple[str, Side]]] = {}
    known = metrics()
    for key, column in columns.items():
        groups.setdefault(np.isnan(column).tobytes(), []).append(key)
    entries = {}
    for keys in groups.values():
        present = ~np.isnan(columns[keys[0]])
        values = np.stack([columns[key][present] for key in keys], axis=1)
        finite_ones = np.isfinite(values).all(axis=0)
        bounds = bootstrap(np.where(finite_ones, values, 0.0), seed) if len(values) > 1 else None
        for index, key in enumerate(keys):
            interval = None if bounds is None or not finite_ones[index] else (bounds[0][index], bounds[1][index])
            # resampling always gives the same: no evidence of certainty
            if interval is not None and np.ptp(values[:, index]) == 0:
                interval = share_interval(values[:, index]) if known[key[0]].unit == "%" else None
            entries[key] = _entry(values[:, index].mean(), interval, len(values))
    return entries


def _score(columns: Sequence[np.ndarray], parts: Sequence[Entry], seed: int) -> Entry:
    """Harmonic mean of three averages, by paired resampling of the cases that have any of them.

    Where all cases agree on a part (an efficacy of 100 % is common), resampling knows no doubt about it; the interval
    is then widened to what the score would be at the ends of that part's own interval.
    """
    values = np.stack(columns, axis=1)
    values = values[~np.isnan(values).all(axis=1)]
    means = mean_of_rows(values)
    if len(values) < 2:
        return _entry(harmonic_mean(*means), None, len(values))
    low, high = bootstrap(values, seed, lambda drawn: harmonic_mean(*drawn.T)[:, None])[:, 0]
    certain = [
        share_interval(column[~np.isnan(column)]) if part["n"] > 1 else None
        for column, part in zip(columns, parts, strict=True)
    ]
    if any(certain):
        ends = [(mean, mean) if interval is None else interval for mean, interval in zip(means, certain, strict=True)]
        low = min(low, harmonic_mean(*(end[0] for end in ends)))
        high = max(high, harmonic_mean(*(end[1] for end in ends)))
    return _entry(harmonic_mean(*means), (low, high), len(values))


def _aggregate(parts: np.ndarray, of: Callable[[np.ndarray], np.ndarray], seed: int) -> Entry:
    """A function of the means of parts (cases, parts), by resampling of whole cases."""
    whole = np.isfinite(parts).all() and len(parts) > 1
    interval = bootstrap(parts, seed, lambda drawn: of(drawn)[:, None])[:, 0] if whole else None
    return _entry(of(parts.mean(axis=0)), interval, len(parts))


def _perplexity(values: np.ndarray, seed: int) -> Entry:
    """Over steps. Equal values are one model that was asked several times, not a sample."""
    sample = len(values) > 1 and np.isfinite(values).all() and np.ptp(values) > 0
    interval = bootstrap(values[:, None], seed)[:, 0] if sample else None
    return _entry(values.mean(), interval, len(values))


def _entry(mean: Any, interval: Any, n: int) -> Entry:
    return {
        "mean": finite(float(mean)),
        "ci95": None if interval is None else [finite(float(end)) for end in interval],
        "n": n,
    }
