"""The end of a launch: the last line, or for a sweep one table over its runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edit_cli.config import catalog
from edit_cli.config.overrides import unquoted
from edit_cli.console import Screen
from edit_cli.distributed import follows
from edit_cli.experiment.job import Outcome
from edit_cli.report.comparison import Comparison
from edit_cli.runs.run import SUMMARY, read_run


def conclude(outcomes: Sequence[Outcome], is_sweep: bool) -> int:
    """Print where the results lie; the exit code is the worst of all jobs."""
    screen = Screen.of(int(follows()))
    if is_sweep:
        summaries = [_summary(outcome) for outcome in outcomes]
        if any(summary is not None for summary in summaries):
            screen.show(
                Comparison([(label(outcome), summary) for outcome, summary in zip(outcomes, summaries, strict=True)])
            )
    for outcome in outcomes:
        if outcome.run_dir is not None:
            screen.line(outcome.run_dir)
    return max((outcome.exit_code for outcome in outcomes), default=0)


def _summary(outcome: Outcome) -> dict[str, Any] | None:
    """What the job's run measured, if it is one that measures and came so far."""
    if outcome.run_dir is None or not (Path(outcome.run_dir) / SUMMARY).is_file():
        return None
    summary = read_run(outcome.run_dir).summary
    return summary if summary and "metrics" in summary else None


def label(outcome: Outcome) -> str:
    """What a job's run is told apart by, in short: `rome layers=[0]`."""
    parts = []
    for override in outcome.overrides:
        key, _, value = override.partition("=")
        value = unquoted(value)
        parts.append(value if key in catalog.GROUPS.values() else f"{key.rpartition('.')[2]}={value}")
    return " ".join(parts) or f"job {outcome.number}"
