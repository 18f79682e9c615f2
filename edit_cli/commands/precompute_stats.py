"""`precompute-stats`: second moments of the keys of some layers, in one pass over the text, stored for every later
run.
"""

from __future__ import annotations

from functools import partial

from edit_cli.console import ConsoleMonitor
from edit_cli.experiment.job import Job, Outcome
from edit_cli.experiment.plan import Plan
from edit_cli.experiment.setup import load_model, refuse_missing
from edit_cli.report.tables.moments import moments_table


def run(job: Job, monitor: ConsoleMonitor) -> Outcome:
    model, store, layers = job.config.model, job.config.stats, sorted(job.config.settings.layers)
    refuse_missing(job, model, dense="a second moment of keys")
    store.require(model.name, layers)
    lm = load_model(model, monitor, job.process_group)
    for layer in layers:
        lm.layout.block(layer)
    moments = store.collect(lm, layers)
    if not job.in_sweep:
        monitor.screen.show(moments_table(lm.name, store.corpus.label, moments))
    return Outcome(0, str(moments[0].path.parent))


def plan(job: Job, monitor: ConsoleMonitor) -> Plan:
    """What `run` would do, before it costs anything."""
    plan, store = Plan(job), job.config.stats
    plan.needs(partial(refuse_missing, job, job.config.model, dense="a second moment of keys"))
    plan.needs(partial(store.require, job.config.model.name, sorted(job.config.settings.layers)))
    plan.model()
    plan.moments(store, sorted(job.config.settings.layers))
    return plan
