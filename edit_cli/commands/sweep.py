"""The end of a launch: the last line, or for a sweep one table over its runs."""

from __future__ import annotations

from collections.abc import Sequence

from edit_cli.commands.job import Outcome
from edit_cli.console import Screen
from edit_cli.report.comparison import comparison
from edit_cli.results import read_run


def conclude(outcomes: Sequence[Outcome], is_sweep: bool) -> int:
    """Print where the results lie; the exit code is the worst of all jobs."""
    screen = Screen()
    if is_sweep and outcomes:
        records = [None if outcome.run_dir is None else read_run(outcome.run_dir) for outcome in outcomes]
        screen.show(comparison([(" ".join(outcome.overrides) or "-", record) for outcome, record in zip(outcomes, records, strict=True)]))
        for outcome in outcomes:
            if outcome.error:
                screen.error(f"{' '.join(outcome.overrides)}: {outcome.error}")
    for outcome in outcomes:
        if outcome.run_dir is not None:
            screen.line(outcome.run_dir)
    return max((outcome.exit_code for outcome in outcomes), default=0)
