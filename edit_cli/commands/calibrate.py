"""`calibrate`: where a model tells other wordings of a fact from other facts, and the radius that comes between
them.
"""

from __future__ import annotations

from edit_cli.commands.job import Job, Outcome
from edit_cli.commands.parts import load_model
from edit_cli.config import build, plain_containers, settings
from edit_cli.console import ConsoleMonitor
from edit_cli.editors.calibration import separation
from edit_cli.errors import UsageError
from edit_cli.report.calibration import calibration_table, overrides
from edit_cli.requests import Case

SIDES = ("input", "output")


def run(job: Job, monitor: ConsoleMonitor) -> Outcome:
    top = settings(job.config)
    asked = plain_containers(job.config)
    modules, side = asked["modules"], asked["side"]
    if not isinstance(modules, list) or not modules:
        raise UsageError(f"modules={modules}: give a list of names, such as [mlp_in,mlp_out]")
    if side not in SIDES:
        raise UsageError(f"side={side}: choose input or output")
    dataset = build(job.config.dataset).load(top.limit, monitor)
    cases = [
        case for case in dataset.cases if _prompts(case, "paraphrase") and _prompts(case, "neighborhood", "locality")
    ]
    if not cases:
        raise UsageError(
            f"dataset={dataset.name} has no fact with both other wordings and prompts about others: choose another one"
        )
    lm = load_model(build(job.config.model), monitor)
    layers = asked["layers"] if asked["layers"] is not None else range(lm.layout.prompt_depth)
    facts = [case.requests[0].text for case in cases]
    reworded = [_prompts(case, "paraphrase") for case in cases]
    others = [_prompts(case, "neighborhood", "locality") for case in cases]
    found = []
    with monitor.phase("measure"), monitor.task("places", len(layers) * len(modules)) as advance:
        for layer in layers:
            for module in modules:
                found.append(separation(lm, facts, reworded, others, layer, module, side))
                advance(1)
    if not job.in_sweep:
        monitor.screen.show(calibration_table(lm.name, len(cases), found))
    return Outcome(0, overrides(found))


def _prompts(case: Case, *kinds: str) -> list[str]:
    return [probe.prompt for probe in case.probes if probe.kind in kinds]
