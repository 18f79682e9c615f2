"""`show`: a run as it lies on disk; no model is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edit_cli.console import Screen
from edit_cli.errors import MissingError
from edit_cli.experiment.downstream import downstream_of
from edit_cli.metrics.sequence import AFTER_EDIT, CHECKPOINT
from edit_cli.report.kinds import REPORTS, report_of, summary_so_far
from edit_cli.report.tables import facts
from edit_cli.report.trace import fact_table
from edit_cli.runs.format import kind_of
from edit_cli.runs.record import RunRecord, read_run


def run(path: Path, case: str | None, as_json: bool) -> int:
    """Print the run's table, or one case."""
    record, screen = read_run(path), Screen()
    if (kind := kind_of(record.manifest)) not in REPORTS:
        raise MissingError(f"{path} holds a run of `{kind}`, which this version of edit-cli does not know")
    if record.status != "success":
        screen.note(
            "this run is still going on"
            if record.status == "started"
            else f"this run was not finished ({record.status})"
        )
    if case is not None:
        line = _case(record, case)
        if as_json:
            screen.json(line)
        else:
            screen.show(fact_table(line) if record.manifest["command"] == "trace" else facts.case(line, _most(record)))
        return 0
    summary = {**downstream_of(record.path), **summary_so_far(record)}
    screen.json(summary) if as_json else screen.show(report_of(record.manifest).table(summary, record.lines))
    return 0


def _case(record: RunRecord, case: str) -> dict[str, Any]:
    """The case's line; of a sequential run, with the answers at the last checkpoint that asked about it."""
    lines = [line for line in record.lines if line.get("case_id") == case]
    if not lines:
        known = list(dict.fromkeys(line["case_id"] for line in record.lines if "case_id" in line))
        some = ", ".join(known[:5]) + (", …" if len(known) > 5 else "")
        raise MissingError(f"{record.path} has no case {case}; there are {len(known):,}: {some}")
    own = next((line for line in lines if line.get("when", AFTER_EDIT) == AFTER_EDIT), lines[0])
    later = [line for line in lines if line.get("when") == CHECKPOINT]
    return {**own, "after": later[-1]["after"], "edits": later[-1]["edits"], "when": CHECKPOINT} if later else own


def _most(record: RunRecord) -> int:
    """Facts in place at the last checkpoint."""
    return max((line["edits"] for line in record.lines if line.get("when") == CHECKPOINT), default=0)
