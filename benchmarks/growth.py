"""How the cost of MEMIT grows with edits, width and layers.

Every point is a process of its own, so that peaks of memory are its own.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import torch
from common import LAYERS, clocked, facts, random_model

from edit_cli.editors.locate.memit import MEMIT, MEMITConfig
from edit_cli.lm.loading import ModelOptions
from edit_cli.statistics.corpora import EmbeddedText
from edit_cli.statistics.moments import MomentStore


@dataclass(frozen=True)
class Point:
    """What is edited. model: a directory, null for random weights.

    layers: those that are written, the last one holds the targets.
    """

    edits: int
    width: int = 256
    layers: list[int] = field(default_factory=lambda: LAYERS)
    model: str | None = None
    threads: int = 1


def measure(point: Point) -> dict[str, float]:
    """CPU and wall seconds of one edit call (statistics not counted), seconds by phase, peak memory of the process
    in MiB.
    """
    torch.set_num_threads(point.threads)
    lm = ModelOptions(name="trained", id=point.model, device="cpu").load() if point.model else random_model(point.width)
    lm.model.float()
    requests = facts(point.edits)
    with tempfile.TemporaryDirectory() as folder:
        config = MEMITConfig(
            layers=point.layers,
            covariance_weight=200.0,
            moments=MomentStore(corpus=EmbeddedText(), tokens=5000, cache_dir=folder),
        )
        editor = MEMIT(config, lm)
        editor.covariances(point.layers)
        _ = editor.contexts
        before = _peak()
        edit, (cpu, wall) = clocked(lambda: editor.edit(requests))
    seconds = {name: round(value, 3) for name, value in lm.monitor.seconds.items() if name != "statistics"}
    steps = sum(edit.info["steps"]) / len(edit.info["steps"])
    return {
        "edits": point.edits, "width": lm.layout.width, "layers": len(point.layers), "cpu_s": cpu, "wall_s": wall,
        "edits_per_s": point.edits / wall, "mean_steps": steps, "peak_mib": _peak(), "before_mib": before, **seconds,
    }  # fmt: skip


def _peak() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1024**2 if sys.platform == "darwin" else 1024)


def measure_apart(point: Point) -> dict[str, float]:
    """`measure` in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, point).result()
