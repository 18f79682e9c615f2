"""From traces to effects: means over facts with 95 % intervals, and the layers that they speak for.

Pure functions, all in percent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edit_cli.metrics.bootstrap import bootstrap, finite, mean_of_rows
from edit_cli.tracing.facts import ROLES, window_at

LOOKUP = "subject_last"  # where facts are looked up, and where the locate-then-edit methods write
Line = Mapping[str, Any]


def effects(lines: Sequence[Line], seed: int = 0) -> dict[str, Any]:
    """Averages over traced facts (`high`, `low`, `scores`, `roles` of each line).

    {"high", "low", "total_effect": entry, "indirect_effect": {kind: {role: {"mean", "ci95", "n"}}}}, where the latter's
    mean has a number a layer and ci95 a pair a layer. Tokens that share a role are averaged within their fact first, so
    facts count alike. An interval over fewer than two facts is None.
    """
    high, low = (100 * np.array([line[name] for line in lines]) for name in ("high", "low"))
    found: dict[str, Any] = {
        name: _entries(values[:, None], seed, single=True)
        for name, values in (("high", high), ("low", low), ("total_effect", high - low))
    }
    found["indirect_effect"] = {}
    for kind in lines[0]["scores"]:
        by_role = {role: np.stack([_of_role(line, kind, role) for line in lines]) for role in ROLES}
        found["indirect_effect"][kind] = {
            role: _entries(values[~np.isnan(values[:, 0])], seed)
            for role, values in by_role.items()
            if not np.isnan(values[:, 0]).all()
        }
    return found


def peak(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The layer of the largest effect, with that effect: {"layer", "mean", "ci95"}."""
    layer = int(np.argmax(entry["mean"]))
    return {"layer": layer, "mean": entry["mean"][layer], "ci95": entry["ci95"][layer] if entry["ci95"] else None}


def propose(indirect: Mapping[str, Any], window: int, count: int) -> dict[str, Any] | None:
    """Layers to edit: the window of MLP layers with the largest effect at the subject's last token; of a window wider
    than `count`,
    the `count` layers that end at its center, as MEMIT's published layers 13 to 17 of GPT-2 XL end at ROME's layer 17.

    {"layers", "layer": the center, "mean", "ci95"}, or None where the trace has no such effect that differs from zero.
    """
    entry = indirect.get("mlp", {}).get(LOOKUP)
    best = peak(entry) if entry else None
    if best is None or best["ci95"] is None or best["ci95"][0] <= 0:
        return None
    begin, end = window_at(best["layer"], window, len(entry["mean"]))
    if end - begin > count:
        begin, end = max(0, best["layer"] - count + 1), best["layer"] + 1
    return {**best, "layers": list(range(begin, end))}


def _of_role(line: Line, kind: str, role: str) -> np.ndarray:
    """Indirect effect of every layer (layers,), mean over the fact's tokens of this role; NaN where it has none."""
    scores = np.array(line["scores"][kind])
    chosen = [index for index, own in enumerate(line["roles"]) if own == role]
    return 100 * (scores[chosen].mean(0) - line["low"]) if chosen else np.full(scores.shape[1], math.nan)


def _entries(values: np.ndarray, seed: int, single: bool = False) -> dict[str, Any]:
    """Mean and interval of each column of (facts, columns); `single`: of the only one."""
    means = [finite(mean) for mean in mean_of_rows(values)]
    ends = [[finite(low), finite(high)] for low, high in bootstrap(values, seed).T] if len(values) > 1 else None
    return {"mean": means[0] if single else means, "ci95": (ends and ends[0]) if single else ends, "n": len(values)}
