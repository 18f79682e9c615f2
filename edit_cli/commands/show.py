"""`show`: a run as it lies on disk; no model is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edit_cli.commands.parts import chosen_case
from edit_cli.console import Screen
from edit_cli.jsonfiles import to_json
from edit_cli.report import facts
from edit_cli.report.sequence import AFTER_EDIT, CHECKPOINT, sequential_summary, sequential_table
from edit_cli.report.summary import summary_of
from edit_cli.report.tables import evaluation
from edit_cli.results import RunRecord, read_run


def run(path: Path, case: str | None, as_json: bool) -> int:
    """Print the run's table, or one case."""
    record, screen = read_run(path), Screen()
    if record.status != "success":
        screen.note(f"this run is {record.status}" if record.status != "started" else "this run is still going on")
    if case is not None:
        line = chosen_case(record, case)
        screen.line(to_json(line, indent=1)) if as_json else screen.show(facts.case(line))
        return 0
    summary = record.summary or _so_far(record)
    screen.line(to_json(summary, indent=1)) if as_json else screen.show(_table(record, summary))
    return 0
