"""What each case of a run contributes to its metrics at the end of the run, to be paired with that of another run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from edit_cli.metrics.paired import Combine, first
from edit_cli.metrics.published import AGGREGATES
from edit_cli.metrics.registry import SCORES, SME
from edit_cli.metrics.scores import harmonic_mean, is_scored
from edit_cli.metrics.sequence import AFTER_EDIT, CHECKPOINT
from edit_cli.metrics.sme import sme_rates
from edit_cli.metrics.summarize import case_values

Line = Mapping[str, Any]
Column = dict[str, tuple[float, ...]]  # {case: the parts that it contributes}


def final_lines(kind: str, lines: Sequence[Line]) -> list[Line]:
    """One line a case, with the answers at the end of the run; of sequences, of the facts (or the sample) that the
    last checkpoint asked about.
    """
    if kind != "sequential":
        return list(lines)
    before = {line["case_id"]: line["before"] for line in lines if line["when"] == AFTER_EDIT}
    asked = [line for line in lines if line["when"] == CHECKPOINT and line.get("sampled", True)]
    last = max((line["edits"] for line in asked), default=0)
    return [{**line, "before": before.get(line["case_id"])} for line in asked if line["edits"] == last]


def case_columns(
    kind: str, lines: Sequence[Line], metrics: Collection[str], fold_seed: Any = None
) -> dict[str, Column]:
    """{metric: column} for those of `metrics` that cases have by themselves (perplexity is the model's, consistency
    needs the reference texts of the data).

    Of `sme`, folds stand for cases; those of another cut (`fold_seed`) are others.
    """
    if kind == "sme":
        folds = [fold for fold in sme_rates(lines)["folds"] if fold["finished"]]
        return {
            metric: {f"{fold_seed}/{fold['fold']}": (100.0 * fold[SME[metric].label],) for fold in folds}
            for metric in metrics
            if metric in SME and folds and all(SME[metric].label in fold for fold in folds)
        }
    if kind in ("trace", "inspect", "train-editor"):
        return _traced(lines, metrics) if kind == "trace" else {}
    lines = final_lines(kind, lines)
    if "generation_entropy" not in metrics:  # it takes long
        lines = [{**line, "after": line["after"] and {**line["after"], "texts": []}, "before": line["before"] and
                  {**line["before"], "texts": []}} for line in lines]  # fmt: skip
    found: dict[str, Column] = {}
    for line, sides in zip(lines, case_values(lines), strict=True):
        for metric in metrics:
            if metric in AGGREGATES:
                parts = AGGREGATES[metric].parts(line) if is_scored(line) else None
            else:
                names, after = SCORES.get(metric, (metric,)), sides["after"]
                parts = tuple(after[name] for name in names) if all(name in after for name in names) else None
            if parts is not None:
                found.setdefault(metric, {})[line["case_id"]] = parts
    return found


def _traced(lines: Sequence[Line], metrics: Collection[str]) -> dict[str, Column]:
    known = {line["case_id"]: line for line in lines if line["known"]}
    each: dict[str, Callable[[Line], float]] = {
        "clean": lambda line: 100.0 * line["high"],
        "corrupted": lambda line: 100.0 * line["low"],
        "total_effect": lambda line: 100.0 * (line["high"] - line["low"]),
    }
    return {name: {case: (of(line),) for case, line in known.items()} for name, of in each.items() if name in metrics}


def combined(metric: str) -> Combine:
    """From the means of a metric's parts to the metric."""
    if metric in SCORES:
        return lambda means: harmonic_mean(*np.moveaxis(means, -1, 0))
    return AGGREGATES[metric].of if metric in AGGREGATES else first


def over_seeds(columns: Sequence[Column]) -> Column:
    """Each case's mean over the runs that have it."""
    cases = dict.fromkeys(case for column in columns for case in column)
    return {
        case: tuple(np.mean([column[case] for column in columns if case in column], axis=0).tolist()) for case in cases
    }


def matched(ours: Column, theirs: Column) -> tuple[np.ndarray, np.ndarray]:
    """(cases, parts) of each of the two over the cases that both have, in the same order."""
    cases = [case for case in ours if case in theirs]
    return np.array([ours[case] for case in cases], float), np.array([theirs[case] for case in cases], float)
