"""`report`: a run, or several, as one page to be looked at, kept and printed; no model is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edit_cli.commands.compare import compared
from edit_cli.commands.compare_runs import finished, places_of_runs
from edit_cli.console import Screen
from edit_cli.errors import MissingError, UsageError
from edit_cli.files.disk import require_own, require_place
from edit_cli.files.paths import expanded
from edit_cli.report import published
from edit_cli.report.page import comparison
from edit_cli.report.page.parts import Part, Section
from edit_cli.report.page.run import page_of, part_of, write
from edit_cli.runs.record import MANIFEST, RunRecord, read_run


def run(places: Sequence[str], out: Path, against: str | None = None, tables: str | None = None) -> int:
    """Write the page of the runs that are named, each by its directory, a folder above it, or a pattern.

    Args:
        places: directories of runs, folders of them, or patterns.
        out: the page.
        against: directory or name of the run that the others are paired with.
        tables: keys of published tables, with commas.
    """
    beside = [published.read(key) for key in tables.split(",")] if tables else []
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder: name a file in it, such as {out / 'report.html'}")
    require_place(out, f"--out {out}")
    require_own(out, f"--out {out}", "(?i)<!doctype html")
    screen, parts, records = Screen(), list[Part](), list[RunRecord]()
    reference = [against] if against is not None and (expanded(against) / MANIFEST).exists() else []
    for path, named in places_of_runs([*places, *reference]).items():
        try:
            record = read_run(path)
            parts.append(part_of(record))
            records.append(record)
        except MissingError as error:
            if named:
                raise
            screen.note(f"left out: {error}")
    if not parts:
        raise MissingError(f"{', '.join(places)}: no run that has finished a case")
    write(page_of(parts, comparison=_side_by_side(records, against, beside, screen)), out, f"--out {out}")
    screen.line(str(out))
    return 0


def _side_by_side(
    records: Sequence[RunRecord], against: str | None, beside: Sequence[published.Table], screen: Screen
) -> Section | None:
    """As `compare` has it; unlike runs are listed apart. None where there is nothing to compare.

    Raises:
        UsageError: there is no such reference, or nothing to put beside published numbers.
    """
    comparable = list[RunRecord]()
    for record in records if len(records) > 1 or beside else ():
        try:
            comparable.append(finished(record.path))
        except (MissingError, UsageError) as error:
            screen.note(f"not in the comparison: {error}")
    if len(comparable) < 2 and not (comparable and beside):
        if against is not None or beside:
            raise UsageError("there are no runs to compare: give several finished ones of the same kind")
        return None
    done = compared(comparable, against=against, anyway=True, beside=beside)
    below = done.sheets(done.ends, done.shown, True)[1:]
    return comparison.section(
        done.ends, done.shown, below, done.notes, comparison.figure(done.points, done.x, done.drawn, done.about)
    )
