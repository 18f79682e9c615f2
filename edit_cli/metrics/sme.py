"""Sequential model editing: success (SR), generalization (GR), edit retain (ER), train retain (TrainR), test retain
(TestR).

Definitions of T-Patcher (Huang et al., 2023, §3). Pure functions of a run's lines: a `turn` for each example of a fold,
and `kept` lines that say what the model still knew after so many edits (0: the unedited model). No model is run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edit_cli.metrics.scores import accuracy, generated_exact

TURN, KEPT = "turn", "kept"  # values of a line's `when`
RATES = ("SR", "GR", "ER", "TrainR", "TestR")
BEFORE = "GR before"

Line = Mapping[str, Any]


def right(probe: Mapping[str, Any]) -> bool:
    """Whether its own reply is the target or an alias (normalized exact match); without replies, whether its
    likeliest tokens are.
    """
    replied = generated_exact(probe)
    return bool(accuracy(probe) if replied is None else replied)


def solved(observation: Mapping[str, Any]) -> bool:
    """Whether every edited prompt of the case is answered with its target."""
    return all(right(probe) for probe in observation["probes"] if probe["kind"] == "rewrite")


def share(flags: Sequence[Any]) -> float | None:
    return sum(map(bool, flags)) / len(flags) if flags else None


def fold_rates(lines: Sequence[Line], edits: int | None = None) -> dict[str, float]:
    """The rates of one fold after its first `edits` edits (by default all); those that nothing was measured for are
    missing.

    GR pools the paraphrases of all edits. TrainR and TestR are accuracies over those of the unedited model.
    """
    done = [line for line in lines if line["when"] == TURN and line["mistake"] and not line["error"]]
    done = [line for line in done if edits is None or line["edits"] <= edits]
    found = {
        "SR": share([solved(line["after"]) for line in done]),
        "GR": share(_paraphrased(done, "after")),
        BEFORE: share(_paraphrased(done, "before")),
    }
    kept = {line["edits"]: line for line in lines if line["when"] == KEPT}
    last = kept.get(max((count for count in kept if count), default=0) if edits is None else edits)
    if last and last["edits"]:
        found["ER"] = share(last["edited"])
        if first := kept.get(0):
            for name, part in (("TrainR", "train"), ("TestR", "test")):
                now, base = share(last[part]), share(first[part])
                found[name] = now / base if now is not None and base else None
    return {name: value for name, value in found.items() if value is not None}


def _paraphrased(done: Sequence[Line], side: str) -> list[bool]:
    return [right(probe) for line in done for probe in line[side]["probes"] if probe["kind"] == "paraphrase"]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over folds (of the sample, n − 1; null for one fold)."""
    mean = math.fsum(values) / len(values)
    deviation = (
        math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)) if len(values) > 1 else None
    )
    return {"mean": mean, "std": deviation, "folds": len(values)}


def sme_rates(lines: Sequence[Line]) -> dict[str, Any]:
    """rates: {name: mean and deviation over folds}; folds: each fold's own rates and counts; course: [{edits, name:
    spread over folds}].

    Folds whose stream has not come to its end are left out of `rates`.
    """
    by_fold: dict[int, list[Line]] = {}
    for line in lines:
        by_fold.setdefault(line["fold"], []).append(line)
    folds = []
    for number, own in sorted(by_fold.items()):
        turns = [line for line in own if line["when"] == TURN]
        counts = {"examples": len(turns), "edits": sum(line["mistake"] and not line["error"] for line in turns)}
        folds.append({"fold": number, "finished": any(line.get("last") for line in own), **counts, **fold_rates(own)})
    over = [fold for fold in folds if fold["finished"]]
    rates = {
        name: spread(values) for name in (*RATES, BEFORE) if (values := [fold[name] for fold in over if name in fold])
    }
    course = []
    for edits in sorted({line["edits"] for line in lines if line["when"] == KEPT and line["edits"]}):
        there = [
            own for own in by_fold.values() if any(line["when"] == KEPT and line["edits"] == edits for line in own)
        ]
        reached = [fold_rates(own, edits) for own in there]
        named = {
            name: spread(values) for name in RATES if (values := [found[name] for found in reached if name in found])
        }
        course.append({"edits": edits, **named})
    return {"rates": rates, "folds": folds, "course": course}
