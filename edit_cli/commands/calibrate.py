"""`calibrate`: where a model tells other wordings of a fact from other facts, and the radius that comes between
them.
"""

from __future__ import annotations

from functools import partial

from edit_cli.console import ConsoleMonitor
from edit_cli.editors.memory.calibration import separation
from edit_cli.errors import UsageError
from edit_cli.experiment.job import Job, Outcome
from edit_cli.experiment.plan import Plan
from edit_cli.experiment.setup import load_model, refuse_missing
from edit_cli.report.calibration import calibration_table, overrides
from edit_cli.requests import Case


def run(job: Job, monitor: ConsoleMonitor) -> Outcome:
    top, model = job.config.settings, job.config.model
    dataset = job.config.dataset.load(top.limit, monitor)
    cases = [
        case for case in dataset.cases if _prompts(case, "paraphrase") and _prompts(case, "neighborhood", "locality")
    ]
    if not cases:
        raise UsageError(
            f"dataset={dataset.name} has no fact with both other wordings and prompts about others: choose another one"
        )
    refuse_missing(job, model)
    lm = load_model(model, monitor)
    layers = top.layers if top.layers is not None else range(lm.layout.prompt_depth)
    for layer in layers:
        lm.layout.block(layer)
    facts = [case.requests[0].text for case in cases]
    reworded = [_prompts(case, "paraphrase") for case in cases]
    others = [_prompts(case, "neighborhood", "locality") for case in cases]
    found = []
    with monitor.phase("measure"), monitor.task("places", len(layers) * len(top.modules)) as advance:
        for layer in layers:
            for module in top.modules:
                found.append(separation(lm, facts, reworded, others, layer, module, top.side))
                advance(1)
    if not job.in_sweep:
        monitor.screen.show(calibration_table(lm.name, len(cases), found))
    return Outcome(0, overrides(found))


def _prompts(case: Case, *kinds: str) -> list[str]:
    return [probe.text for probe in case.probes if probe.kind in kinds]


def plan(job: Job, monitor: ConsoleMonitor) -> Plan:
    """What `run` would do, before it costs anything."""
    plan = Plan(job)
    dataset = job.config.dataset.load(job.config.settings.limit, monitor)
    plan.facts(dataset.cases, dataset.source)
    plan.needs(partial(refuse_missing, job, job.config.model))
    outline = plan.model()
    if outline is not None:
        layers, modules = job.config.settings.layers, job.config.settings.modules
        count = len(layers) if layers is not None else outline.layout.prompt_depth
        plan.say("measured", f"at {count} layers, {', '.join(modules)} of each")
    if (work := plan.work) is not None:
        texts = {probe.text for case in dataset.cases for probe in case.probes}
        tokens = sum(work.length(text) for text in texts) * count * len(modules) / 2
        work.add("reading keys", work.passes(tokens, 0, tokens / work.batch_tokens))
        work.bytes["reading keys"] = work.states(work.batch_tokens)
    return plan
