"""summary.json: what a run found, in numbers.

A pure function of its lines and its manifest, so it can be made again at any time.
"""

from __future__ import annotations

import resource
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from edit_cli.edits.diagnosis import told
from edit_cli.metrics.forms import line_in
from edit_cli.metrics.scores import is_scored
from edit_cli.metrics.summarize import summarize

Line = Mapping[str, Any]
NOT_ALWAYS = ("known", "forms")  # of a data set: where only known facts are edited, or not all is plain text
ABOUT_DATA = ("name", "source", "records_total", "records_dropped", "records_selected", "limit", "split", "ids_sha256")


def summary_of(
    manifest: Mapping[str, Any],
    lines: Sequence[Line],
    references: Mapping[str, Sequence[str]] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """summary.json of a run that edits and takes back; `lines` are one a case.

    references: {case id: reference texts}, for the consistency score. seconds: by phase, in addition to those in the
    lines.
    """
    about = manifest["dataset"]
    edited = [line for line in lines if line["seconds"] is not None]
    edits = sum(len(line["requests"]) for line in edited)
    return {
        **header(manifest, lines, seconds),
        "dataset": {
            **{key: about[key] for key in ABOUT_DATA},
            **{key: about[key] for key in NOT_ALWAYS if key in about},
            "records_scored": sum(map(is_scored, lines)),
        },
        "n": len(lines),
        "failed": sum(not is_scored(line) for line in lines),
        "edits": edits,
        "protocol": {
            **manifest["protocol"],
            **{k: v for k, v in manifest["config"]["protocol"].items() if k != "batch_size"},
        },
        "diagnosis": told(list({line["step"]: line["diagnosis"] for line in lines if line.get("diagnosis")}.values())),
        "metrics": summarize(lines, references) if any(map(is_scored, lines)) else {},
        **_side_by_side(about, lines),
        "seconds_per_edit": sum(line["seconds"] for line in edited) / edits if edits else None,
    }


def header(
    manifest: Mapping[str, Any], lines: Sequence[Line], seconds: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """What every summary.json says of how its run was made."""
    return {
        **{name: manifest[name] for name in ("method", "model") if manifest.get(name) is not None},
        "seconds": total_seconds(lines, seconds),
        "peak_memory_bytes": peak_memory(),
        "processes": manifest.get("processes", 1),
        "seeds": manifest["seeds"],
        "versions": manifest["versions"],
    }


def _side_by_side(about: Mapping[str, Any], lines: Sequence[Line]) -> dict[str, Any]:
    """Of a run that asks in several forms, the metrics of what is asked in each; `metrics` are those of the first."""
    asked = (about.get("forms") or {}).get("asked", ())
    if len(asked) < 2 or not any(map(is_scored, lines)):
        return {}
    names = [None, *asked[1:]]
    return {"asked": {form: summarize([_probes_alone(line_in(line, name)) for line in lines])
                      for form, name in zip(asked, names, strict=True)}}  # fmt: skip


def _probes_alone(line: Line) -> Line:
    """Without what tells of the model as a whole."""
    sides = {side: line[side] and {**line[side], "texts": [], "perplexity": None} for side in ("before", "after")}
    return {**line, **sides}


def total_seconds(lines: Sequence[Line], more: Mapping[str, float] | None = None) -> dict[str, float]:
    """Seconds by phase, longest first."""
    total: dict[str, float] = defaultdict(float)
    for phases in (*(line.get("phases", {}) for line in lines), more or {}):
        for phase, spent in phases.items():
            total[phase] += spent
    return {phase: round(spent, 3) for phase, spent in sorted(total.items(), key=lambda item: -item[1])}


def peak_memory() -> dict[str, int | None]:
    """Bytes that this process (the main one, of several) had at most: of the host, and of the accelerator if torch
    uses one.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    torch = sys.modules.get("torch")
    device = torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else None
    return {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "device": device}
