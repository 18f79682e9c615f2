"""`calibrate`: where a model tells other wordings of a fact from other facts, and the radius that comes between
them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Len

from edit_cli.commands.job import Job, Outcome
from edit_cli.commands.parts import build_model, load_model, refuse_missing
from edit_cli.config.build import build, settings
from edit_cli.config.schema import Config, Natural
from edit_cli.console import ConsoleMonitor
from edit_cli.editors.memory.calibration import Side, separation
from edit_cli.errors import UsageError
from edit_cli.report.calibration import calibration_table, overrides
from edit_cli.requests import Case


@dataclass(frozen=True, kw_only=True)
class Places(Config):
    """Where keys are read."""

    layers: Annotated[list[Natural], Len(1)] | None = None
    """Layers in which keys are read, or null for all."""
    modules: Annotated[list[str], Len(1)] = field(default_factory=lambda: ["mlp_in", "mlp_out"])
    """Projections at which keys are read."""
    side: Side = "input"
    """Side of a projection on which keys are read: GRACE's are inputs, MELO's are outputs."""


def run(job: Job, monitor: ConsoleMonitor) -> Outcome:
    top = settings(job.config)
    places: Places = build(job.config, Places, partly=True)
    dataset = build(job.config.dataset).load(top.limit, monitor)
    cases = [
        case for case in dataset.cases if _prompts(case, "paraphrase") and _prompts(case, "neighborhood", "locality")
    ]
    if not cases:
        raise UsageError(
            f"dataset={dataset.name} has no fact with both other wordings and prompts about others: choose another one"
        )
    model = build_model(job)
    refuse_missing(job, model)
    lm = load_model(model, monitor)
    layers = places.layers if places.layers is not None else range(lm.layout.prompt_depth)
    for layer in layers:
        lm.layout.block(layer)
    facts = [case.requests[0].text for case in cases]
    reworded = [_prompts(case, "paraphrase") for case in cases]
    others = [_prompts(case, "neighborhood", "locality") for case in cases]
    found = []
    with monitor.phase("measure"), monitor.task("places", len(layers) * len(places.modules)) as advance:
        for layer in layers:
            for module in places.modules:
                found.append(separation(lm, facts, reworded, others, layer, module, places.side))
                advance(1)
    if not job.in_sweep:
        monitor.screen.show(calibration_table(lm.name, len(cases), found))
    return Outcome(0, overrides(found))


def _prompts(case: Case, *kinds: str) -> list[str]:
    return [probe.prompt for probe in case.probes if probe.kind in kinds]
