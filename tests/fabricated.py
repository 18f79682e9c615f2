"""Finished runs with given answers, made without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edit_cli.report import learning
from edit_cli.report.sequence import sequential_summary
from edit_cli.report.summary import summary_of
from edit_cli.runs.run import Run


def probe(kind: str, hit: bool) -> dict[str, Any]:
    """A prompt that is answered with the new object or with the old one."""
    right, wrong = (0.1, 3.0) if hit else (3.0, 0.1)
    return {
        "kind": kind, "prompt": f"A {kind} prompt", "target": "new", "foil": "old",
        "target_nll": right, "target_hits": [hit], "target_predicted": [1 if hit else 2],
        "foil_nll": wrong, "foil_hits": [not hit], "generated": " new." if hit else " old.",
    }  # fmt: skip


def observation(hits: Sequence[bool]) -> dict[str, Any]:
    """Of a case: its edited prompt, one paraphrase, one neighbor."""
    kinds = ("rewrite", "paraphrase", "neighborhood")
    return {"probes": list(map(probe, kinds, hits)), "texts": [], "perplexity": None}


def finished_run(
    path: Path,
    cases: Mapping[str, Sequence[bool]],
    method: str = "memit",
    seed: int = 0,
    command: str = "evaluate",
    ids: str = "a" * 64,
    by_itself: int | None = None,
    **config: Any,
) -> Path:
    """A run of `method` with {case: what is answered rightly after the edit}; config: other settings.

    by_itself: facts that the method edits together where nobody says how many.
    """
    protocol = {
        "batch_size": 1 if by_itself is None else "auto",
        "order_seed": None,
        "observe": {"generate": True, "max_new_tokens": 20, "seed": seed},
    }
    settings = {
        "seed": seed, "model": {"name": "m", "id": "m", "dtype": "float32"}, "method": {"steps": 5},
        "data": {"sha256": "d" * 64, "ids_sha256": ids}, **config,
        "protocol": {**protocol, **config.get("protocol", {})},
    }  # fmt: skip
    about = {
        "name": "counterfact", "source": "made up", "records_total": 100, "records_dropped": 0,
        "records_selected": len(cases), "limit": None, "split": None, "ids_sha256": ids,
    }  # fmt: skip
    size = by_itself or settings["protocol"]["batch_size"]
    evaluated = "right after each step, and at checkpoints" if command == "sequential" else "after each batch"
    details = {
        "method": method, "model": settings["model"]["name"], "dataset": about, "seeds": {"seed": seed}, "processes": 1,
        "protocol": {"batch_size": size, "batches": -(-len(cases) // size), "evaluated": evaluated},
    }  # fmt: skip
    request = {"prompt": "{} is", "subject": "S", "target_new": "new", "target_true": "old"}
    key = ("case_id",) if command != "sequential" else ("when", "edits", "case_id")
    with Run.open(path, command, settings, key=key, details=details, made_with={"versions": {}}) as run:
        for step, (case, hits) in enumerate(cases.items()):
            line = {
                "case_id": case, "step": step, "requests": [request], "before": observation([False] * 3),
                "after": observation(hits), "seconds": 0.5, "error": None,
            }  # fmt: skip
            run.append(line if command != "sequential" else {**line, "when": "after_edit", "edits": step + 1})
        if command == "sequential":  # asked again at the end, when the first fact is forgotten
            for step, (case, hits) in enumerate(cases.items()):
                now = observation([False] * 3 if step == 0 else hits)
                line = {"case_id": case, "step": step, "requests": [request], "before": None, "after": now}
                run.append({**line, "seconds": None, "error": None, "when": "checkpoint", "edits": len(cases)})
        make = sequential_summary if command == "sequential" else summary_of
        run.write_summary(make(run.manifest, run.lines()))
    return path


def finished_training(path: Path, loss: float, seed: int = 0) -> Path:
    """A training that came to that loss."""
    config = {"seed": seed, "model": {"name": "m"}, "method": {"rank": 8}}
    about = {
        "name": "world", "source": "made up", "records_total": 100, "records_dropped": 0, "records_selected": 20,
        "limit": None, "split": None, "ids_sha256": "a" * 64,
    }  # fmt: skip
    details = {
        "method": "mend", "model": "m", "dataset": about, "seeds": {"seed": seed},
        "protocol": {"cases": 20, "validation": 4},
    }  # fmt: skip
    with Run.open(
        path, "train-editor", config, key=("step", "kind"), details=details, made_with={"versions": {}}
    ) as run:
        run.append({"step": 2, "kind": "validation", "loss": loss, "es": 50.0})
        run.write_summary(learning.summary_of(run.manifest, run.lines()))
    return path
