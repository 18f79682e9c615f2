"""Numbers, metrics and protocols in plain words, for readers who do not know the papers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edit_cli.metrics.registry import METRICS, Metric

ARROWS = {"higher": "↑", "lower": "↓", "neither": ""}

WHERE = {
    "efficacy": "edited prompt",
    "paraphrase": "rephrased prompt",
    "neighborhood": "other subjects",
    "attribute": "other subjects that had the new answer",
    "locality": "unrelated prompt",
    "portability": "prompt that follows from the edit",
}
WHAT = {
    "success": "new answer likelier than the old",
    "magnitude": "probability of new − old answer",
    "accuracy": "new answer is the top choice",
    "token_accuracy": "answer's tokens that are the top choice",
    "unchanged": "top choices as before",
    "generated_exact": "it writes just the answer",
    "generated_contains": "its reply contains the answer",
    "generated_unchanged": "it writes the same as before",
    "generated_length": "words of its reply",
}
KEPT = {  # of prompts that an edit must not touch
    "success": "their answer likelier than the new one",
    "magnitude": "probability of their − the new answer",
    "accuracy": "their answer is the top choice",
}
OTHERS = {
    "score": "harmonic mean of the three successes",
    "token_score": "harmonic mean of the three token accuracies",
    "generation_entropy": "variety of the words it writes; falls when it repeats itself",
    "reference_score": "likeness to texts about things with the new property",
    "perplexity": "how surprised it is by ordinary text",
}
SECTIONS = {
    "TEACHER-FORCED: how it rates given answers": ("success", "magnitude", "accuracy", "token_accuracy", "unchanged", "score"),
    "FREE-RUNNING: what it writes by itself": ("generated",),
    "THE MODEL AS A WHOLE": ("entropy", "reference", "perplexity"),
}


def plain(metric: str) -> str:
    """What a metric tells, in a few words."""
    if metric in OTHERS:
        return OTHERS[metric]
    group, _, measure = metric.partition("_")
    what = KEPT.get(measure) if group in ("neighborhood", "locality") else None
    return f"{WHERE.get(group, group)}: {what or WHAT.get(measure, METRICS[metric].definition)}"


def label(metric: Metric) -> str:
    """Name, unit and the direction of a good edit."""
    arrow = ARROWS[metric.better]
    return " ".join(part for part in (metric.label, f"({metric.unit})" if metric.unit else "", arrow) if part)


def section(metric: str) -> str:
    """Which part of the table a metric belongs to."""
    measure = metric.partition("_")[2] or metric
    for name, kinds in reversed(SECTIONS.items()):
        if any(kind in measure or kind in metric for kind in kinds):
            return name
    return next(iter(SECTIONS))


def number(value: float | None, digits: int = 1) -> str:
    """One decimal, thousands apart; a value that is not finite is told as such."""
    return "not finite" if value is None else f"{value:,.{digits}f}"


def with_interval(entry: Mapping[str, Any] | None) -> str:
    """`98.5 [95.2, 100]`: mean and 95 % interval."""
    if entry is None:
        return "–"
    ends = entry["ci95"]
    if ends is None or None in ends:
        return number(entry["mean"])
    low, high = (number(end, 0 if abs(end) >= 99.95 else 1) for end in ends)
    return f"{number(entry['mean'])} [{low}, {high}]"


def records(dataset: Mapping[str, Any]) -> str:
    """Which records were used, and out of how many."""
    used, total, limit = dataset["records_selected"], dataset["records_total"], dataset["limit"]
    share = f"{used:,} of {total:,} records" if used != total else f"all {total:,} records"
    return share + (f" (limit={limit})" if limit is not None and used != total else "")


def batches(protocol: Mapping[str, Any]) -> str:
    """How many facts were edited together, and what became of them."""
    size, count, restored = protocol["batch_size"], protocol["batches"], protocol["restored"]
    if count == 1:
        how = "all at once"
    elif size == 1:
        how = "one at a time"
    else:
        how = f"in batches of {size:,}"
    if not restored:
        return f"{how}; edits stay"
    return f"{how}; asked right after, then taken back" if count == 1 else f"{how}; asked after each, then taken back"


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f} s" if value < 10 else f"{value:,.0f} s"


def phases(spent: Mapping[str, float], shown: int = 6) -> str:
    """`value 11.2, ask after 4.0, …`"""
    told = [f"{phase} {value:.1f}" for phase, value in spent.items() if value >= 0.05]
    rest = sum(list(spent.values())[shown:])
    return ", ".join(told[:shown]) + (f", rest {rest:.1f}" if len(told) > shown else "")
