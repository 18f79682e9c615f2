"""What a comparison of runs can show: the metrics of edits, and what traces and trainings measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edit_cli.metrics.registry import Metric, metrics
from edit_cli.report.learning import MEANING, UNITS

TRACED = {
    metric.id: metric
    for metric in (
        Metric("clean", "P(answer), clean", "%", "neither", "before anything is corrupted", heading="clean"),
        Metric("corrupted", "P(answer), corrupted", "%", "neither", "with the subject corrupted", heading="corrupted"),
        Metric("total_effect", "Total effect", "points", "neither", "clean minus corrupted", heading="effect"),
        *(
            Metric(f"peak_{kind}", f"Largest effect, {kind}", "points", "neither",
                   "indirect effect at its best place", heading=kind)
            for kind in ("hidden", "mlp", "attn")
        ),
    )
}  # fmt: skip
TRAINED = {
    f"best_{name}": Metric(
        f"best_{name}",
        f"{name}, best step",
        UNITS.get(name, ""),
        "neither",
        meaning,
        heading=name,
        digits=1 if UNITS.get(name) in ("%", "points") else 3,
    )
    for name, meaning in MEANING.items()
}


def measures() -> dict[str, Metric]:
    """All of them by their ids, those of plug-ins included. Raises as `registry.metrics`."""
    return metrics() | TRACED | TRAINED


def measured(kind: str, summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """The summary with what the run measured as its "metrics", whatever kind of run it is."""
    if kind == "trace":
        found = summary["trace"] or {}
        names = {"clean": "high", "corrupted": "low", "total_effect": "total_effect"}
        entries = {name: found[part] for name, part in names.items() if part in found}
        entries |= {
            f"peak_{part}": {"mean": peak["mean"], "ci95": peak["ci95"], "n": summary["traced"]}
            for part, peak in summary["peaks"].items()
        }
        return {**summary, "metrics": {name: {"at_end": entry} for name, entry in entries.items()}}
    if kind == "train-editor":
        n = summary["protocol"].get("validation", 0)
        values = {f"best_{name}": value for name, value in summary["best"]["metrics"].items() if name in MEANING}
        entries = {name: {"at_end": {"mean": value, "ci95": None, "n": n}} for name, value in values.items()}
        cost = {"n": summary["protocol"]["cases"], "failed": 0, "seconds_per_edit": None}
        return {"peak_memory_bytes": {}, **summary, **cost, "metrics": entries}
    return summary
