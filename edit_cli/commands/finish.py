"""The end of every run that measures: summary, table, exit code."""

from __future__ import annotations

from collections.abc import Mapping

from edit_cli.commands.job import Job, Outcome
from edit_cli.console import ConsoleMonitor
from edit_cli.datasets import Dataset
from edit_cli.report.summary import summary_of
from edit_cli.report.tables import evaluation
from edit_cli.runs.run import Run

SOME_FAILED = 5
NAMED = 5  # failed cases that are named one by one


def conclude(job: Job, run: Run, dataset: Dataset, seconds: Mapping[str, float], monitor: ConsoleMonitor) -> Outcome:
    """Write summary.json and show the table (a sweep shows one for all its runs instead)."""
    if not job.team.is_main:
        return Outcome(0, str(run.path))
    references = {case.id: case.references for case in dataset.cases if case.references}
    lines = run.lines()
    with monitor.phase("score"):
        summary = summary_of(run.manifest, lines, references, seconds)
    run.write_summary(summary)
    if not job.in_sweep:
        monitor.screen.show(evaluation(summary))
    return outcome(run, [line for line in lines if line["error"]], monitor)


def outcome(run: Run, failed: list[dict], monitor: ConsoleMonitor) -> Outcome:
    """Exit code and place; failed cases are named with their reasons."""
    for line in failed[:NAMED]:
        monitor.note(f"case {line['case_id']} failed: {line['error']}")
    if len(failed) > NAMED:
        monitor.note(f"… and {len(failed) - NAMED:,} more failed; all reasons are in {run.path / 'results.jsonl'}")
    return Outcome(SOME_FAILED if failed else 0, str(run.path))
