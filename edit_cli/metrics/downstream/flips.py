"""What an edit did to the items of a task: how many are right, and which have changed sides. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from edit_cli.files.shapes import Count, Seconds
from edit_cli.metrics.paired import paired_difference


class Item(TypedDict):
    """One item as it was answered. values: by metric; of most 1 (right) or 0."""

    task: str
    item: Count
    values: dict[str, float]


class State(TypedDict):
    """What a model said with so many facts edited. items: by the name of the task or group that was asked for."""

    edits: Count
    seconds: Seconds
    items: dict[str, list[Item]]


def compared(before: Sequence[Item], after: Sequence[Item], seed: int = 0) -> dict[str, dict[str, Any]]:
    """{metric: entry} over the items that both have.

    entry: n; before, after: means, in % where an item is right or not (share); change, ci95, p: of the paired
    difference; lost, gained: items that went from right to wrong, and from wrong to right (None where not share).
    """
    later = {(item["task"], item["item"]): item["values"] for item in after}
    found: dict[str, dict[str, Any]] = {}
    for metric in dict.fromkeys(metric for item in before for metric in item["values"]):
        pairs = [
            (item["values"][metric], theirs[metric])
            for item in before
            if metric in item["values"] and metric in (theirs := later.get((item["task"], item["item"]), {}))
        ]
        if not pairs:
            continue
        first, second = np.array(pairs, dtype=float).T
        share = bool(np.isin(first, (0.0, 1.0)).all() and np.isin(second, (0.0, 1.0)).all())
        scale = 100.0 if share else 1.0
        change = paired_difference(scale * second[:, None], scale * first[:, None], seed=seed)
        found[metric] = {
            "n": len(pairs),
            "share": share,
            "before": scale * float(first.mean()),
            "after": scale * float(second.mean()),
            "change": None if change is None else change.mean,
            "ci95": None if change is None else change.ci95,
            "p": None if change is None else change.p,
            "lost": int((first > second).sum()) if share else None,
            "gained": int((first < second).sum()) if share else None,
        }
    return found


def summary(states: Sequence[State]) -> list[dict[str, Any]]:
    """One entry a state but the first, which is the unedited model: {"edits", "seconds", "tasks": {name: {metric:
    entry}}}.
    """
    if not states or states[0]["edits"]:
        return []
    before, *rest = states
    return [
        {
            "edits": state["edits"],
            "seconds": state["seconds"],
            "tasks": {
                name: compared(items, state["items"][name])
                for name, items in before["items"].items()
                if name in state["items"]
            },
        }
        for state in rest
    ]
