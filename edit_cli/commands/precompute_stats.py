"""`precompute-stats`: second moments of the keys of some layers, in one pass over the text, stored for every later
run.
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import OmegaConf

from edit_cli.commands.job import Job, Outcome
from edit_cli.commands.parts import build_model, load_model, refuse_missing
from edit_cli.config.build import build, settings
from edit_cli.console import ConsoleMonitor
from edit_cli.errors import UsageError
from edit_cli.report.moments import moments_table
from edit_cli.statistics.moments import MomentStore


@dataclass
class Layers:
    """Keys of `precompute-stats`."""

    layers: list[int]


def run(job: Job, monitor: ConsoleMonitor) -> Outcome:
    top = settings(job.config)
    if top.run_dir is not None:
        raise UsageError(
            "run_dir: second moments go to the cache, where every run finds them; put that elsewhere by cache_dir=DIR"
        )
    layers = _layers(job)
    store: MomentStore = build(job.config.stats)
    model = build_model(job)
    refuse_missing(job, model)
    store.require(model.name, layers)
    lm = load_model(model, monitor, job.team)
    for layer in layers:
        lm.layout.block(layer)
    moments = store.collect(lm, layers)
    if not job.in_sweep:
        monitor.screen.show(moments_table(lm.name, store.corpus.label, moments))
    return Outcome(0, str(moments[0].path.parent))


def _layers(job: Job) -> list[int]:
    """Those given, else those that the method uses on this model."""
    config, method = job.config, job.choices["method"]
    if OmegaConf.is_interpolation(config, "layers"):
        if "moments" not in config.method:
            raise UsageError(f"method={method} needs no second moments: choose another method, or give layers=[3,4]")
        if OmegaConf.is_missing(config.method, "layers"):
            raise UsageError(
                f"layers has no value, because nothing is published for {method} on this model: give layers=[3,4]"
            )
    layers = build(config, Layers, partly=True).layers
    if not layers:
        raise UsageError("layers=[]: give a list of whole numbers, such as [3,4]")
    return sorted(layers)
