"""The end of a run: its summary, its table, and how it went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edit_cli.console import ConsoleMonitor
from edit_cli.experiment.job import Job, Outcome
from edit_cli.experiment.run_directory import ReadOnlyRun
from edit_cli.experiment.tracking import SILENT, Tracking
from edit_cli.runs.run import Run

SOME_FAILED = 5
NAMED = 5  # failed cases that are named one by one

Lines = list[dict[str, Any]]
Summary = dict[str, Any]


def conclude(
    job: Job,
    run: Run | ReadOnlyRun,
    monitor: ConsoleMonitor,
    summarise: Callable[[Lines], Summary],
    table: Callable[[Summary, Lines], Any],
    draw: Callable[[Summary, Path], Sequence[str]] = lambda summary, folder: (),
    code: Callable[[Summary], int] = lambda summary: 0,
    in_sweeps: bool = False,
    tracking: Tracking = SILENT,
) -> Outcome:
    """Write summary.json and figures, and show the table; a sweep shows one for all its runs instead.

    draw: names of the figures, without suffix. code: an exit code that comes before those of failed cases. in_sweeps:
    the table is shown there, too. tracking: is told the means at the end.
    """
    if not isinstance(run, Run):
        return Outcome(0, str(run.path))
    lines = run.lines()
    with monitor.phase("score"):
        summary = summarise(lines)
    run.write_summary(summary)
    tracking.end(summary)
    drawn = draw(summary, run.path)
    if in_sweeps or not job.in_sweep:
        monitor.screen.show(table(summary, lines))
        for name in drawn:
            monitor.screen.line(f"figure: {run.path / name}.png")
    ended = outcome(run, [line for line in lines if line["error"]], monitor)
    return replace(ended, exit_code=code(summary) or ended.exit_code)


def outcome(run: Run, failed: Lines, monitor: ConsoleMonitor) -> Outcome:
    """Exit code and place; failed cases are named with their reasons."""
    for line in failed[:NAMED]:
        monitor.note(f"case {line['case_id']} failed: {line['error']}")
    if len(failed) > NAMED:
        monitor.note(f"… and {len(failed) - NAMED:,} more failed; all reasons are in {run.path / 'results.jsonl'}")
    return Outcome(SOME_FAILED if failed else 0, str(run.path))


def with_page(ended: Outcome, monitor: ConsoleMonitor) -> Outcome:
    """The outcome, after the run's page has been written."""
    from edit_cli.report.page.run import write_own

    assert ended.run_dir is not None  # commands that keep no run have been refused
    monitor.screen.line(f"page: {write_own(Path(ended.run_dir))}")
    return ended
