"""What a sequence of edits did to a model, from the lines of its run: retention, forgetting, collapse (sequential
protocol, metrics §6.7).

Lines are told apart by `when`: each fact right after its own step, facts so far at a checkpoint, held-out records
there, and the model itself there. Pure functions: no model is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edit_cli.metrics.scores import perplexity
from edit_cli.metrics.summarize import case_values, summarize

AFTER_EDIT, CHECKPOINT, HELD_OUT, MODEL = "after_edit", "checkpoint", "held_out", "model"  # values of a line's `when`
SUCCESSES = ("efficacy_success", "paraphrase_success", "neighborhood_success")
THREE = (SUCCESSES, ("efficacy_accuracy", "paraphrase_accuracy", "locality_same_relation_accuracy"),
         ("efficacy_token_accuracy", "paraphrase_token_accuracy", "locality_token_accuracy"))  # fmt: skip
FORGOTTEN = (
    "efficacy_success",
    "efficacy_accuracy",
    "efficacy_token_accuracy",
    "paraphrase_success",
    "paraphrase_accuracy",
)
RETAINED = "efficacy_accuracy"  # what the forgetting matrix shows
COHORTS = 10

Line = Mapping[str, Any]
Row = dict[str, Any]


def checkpoint_rows(
    lines: Sequence[Line], first: int, references: Mapping[str, Sequence[str]] | None = None
) -> list[Row]:
    """One row a checkpoint.

    metrics: of all facts so far (or the sample). first: of the first `first` facts. latest: of the last step, right
    after it.
    forgetting: {metric: points by which the facts asked are worse than right after their own edits}. held_out: of
    records that are never edited, before and now. model: norms and drift.
    """
    own = [line for line in lines if line["when"] == AFTER_EDIT]
    before = {line["case_id"]: line["before"] for line in own}
    early = {line["case_id"] for line in own[:first]}
    rows = []
    for edits in sorted({line["edits"] for line in lines if line["when"] == CHECKPOINT}):
        here = [line for line in lines if line["edits"] == edits]
        asked = [{**line, "before": before.get(line["case_id"])} for line in here if line["when"] == CHECKPOINT]
        sampled = [line for line in asked if line.get("sampled", True)]
        held_out = [line for line in here if line["when"] == HELD_OUT]
        rows.append(
            {
                "edits": edits,
                "asked": len(sampled),
                "metrics": _after(sampled, references),
                "first": _after([line for line in asked if line["case_id"] in early]),
                "latest": _after([line for line in here if line["when"] == AFTER_EDIT]),
                "forgetting": forgetting(own, sampled),
                "held_out": {name: dict(sides) for name, sides in summarize(held_out).items()} if held_out else {},
                "model": next((line["model"] for line in here if line["when"] == MODEL), {}),
            }
        )
    return rows


def _after(lines: Sequence[Line], references: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:
    return (
        {name: sides["after"] for name, sides in summarize(lines, references).items() if "after" in sides}
        if lines
        else {}
    )


def forgetting(own: Sequence[Line], now: Sequence[Line]) -> dict[str, float]:
    """{metric: mean over the cases of `now` of (right after its own edit − now)}, in points."""
    then = {line["case_id"]: values["after"] for line, values in zip(own, case_values(own), strict=True)}
    lost: dict[str, list[float]] = {}
    for line, values in zip(now, case_values(now), strict=True):
        for metric in FORGOTTEN:
            if metric in values["after"] and metric in then.get(line["case_id"], {}):
                lost.setdefault(metric, []).append(then[line["case_id"]][metric] - values["after"][metric])
    return {metric: float(np.mean(points)) for metric, points in lost.items()}


def retention_matrix(lines: Sequence[Line]) -> dict[str, Any]:
    """When edited × when tested: {"metric", "edited": [[first fact, last fact]], "tested": [facts], "values": [[% or
    None]]}.

    Facts are put into at most COHORTS groups of steps that follow each other; a group has no value before it was
    edited.
    """
    own = [line for line in lines if line["when"] == AFTER_EDIT]
    steps = sorted({line["step"] for line in own})
    if not steps:
        return {}
    cohort_of = {
        step: number
        for number, part in enumerate(np.array_split(steps, min(COHORTS, len(steps))))
        for step in part.tolist()
    }
    count = max(cohort_of.values()) + 1
    member = {line["case_id"]: cohort_of[line["step"]] for line in own}
    ends = [max(line["edits"] for line in own if cohort_of[line["step"]] == number) for number in range(count)]
    asked = [line for line in lines if line["when"] == CHECKPOINT]
    tested = sorted({line["edits"] for line in asked})
    found: dict[tuple[int, int], list[float]] = {}
    for line, values in zip(asked, case_values(asked), strict=True):
        if RETAINED in values["after"] and line["case_id"] in member:
            found.setdefault((member[line["case_id"]], line["edits"]), []).append(values["after"][RETAINED])
    cells = [
        [float(np.mean(found[number, edits])) if (number, edits) in found else None for edits in tested]
        for number in range(count)
    ]
    edited = [[start + 1, end] for start, end in zip([0, *ends], ends, strict=False)]
    return {"metric": RETAINED, "edited": edited, "tested": tested, "values": cells}


def collapse(row: Row, start: float | None, below: float, factor: float) -> str | None:
    """Why the model counts as destroyed at this checkpoint, or None.

    start: perplexity of the unedited model. below: % that the mean of efficacy, paraphrase and neighborhood success
    must reach.
    factor: how many times the unedited model's perplexity is too much (2: tokens of plain text are half as likely).
    """
    parts = [row["metrics"][name]["mean"] for name in SUCCESSES if name in row["metrics"]]
    if len(parts) > 1 and np.mean(parts) < below:
        return f"the mean of efficacy, paraphrase and neighborhood success is {np.mean(parts):.1f} %, below {below:g} %"
    if start is not None and "perplexity" in row["metrics"]:
        now = row["metrics"]["perplexity"]["mean"]
        if now is None or now > factor * start:
            told = "not finite" if now is None else f"{now:,.1f}"
            return f"perplexity is {told}, more than {factor:g} times the {start:,.1f} of the unedited model"
    return None


def first_collapse(rows: Sequence[Row], lines: Sequence[Line], below: float, factor: float) -> dict[str, Any] | None:
    """{"edits", "reason"} of the first checkpoint that finds the model destroyed (see `collapse`)."""
    start = next((value for line in lines if (value := perplexity(line, "before")) is not None), None)
    for row in rows:
        reason = collapse(row, start, below, factor)
        if reason:
            return {"edits": row["edits"], "reason": reason}
    return None


def area(rows: Sequence[Row]) -> float | None:
    """Mean of the success of a fact, of its other wordings and of what must stay over the course of the edits, % (the
    area under its curve
    over its width), by the first of `THREE` that all checkpoints have."""
    names = next(
        (names for names in THREE if rows and all(name in row["metrics"] for row in rows for name in names)), None
    )
    if names is None:
        return None
    points = [(row["edits"], float(np.mean([row["metrics"][name]["mean"] for name in names]))) for row in rows]
    if len(points) < 2:
        return points[0][1]
    counts, values = zip(*points, strict=True)
    return float(np.trapezoid(values, counts) / (counts[-1] - counts[0]))
