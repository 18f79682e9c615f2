"""`report`: a run, or several, as one page to be looked at, kept and printed; no model is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edit_cli.commands.compare_runs import places_of_runs
from edit_cli.console import Screen
from edit_cli.errors import MissingError, UsageError
from edit_cli.files.disk import require_place
from edit_cli.report.page.parts import Part
from edit_cli.report.page.run import page_of, part_of, write
from edit_cli.runs.run import read_run


def run(places: Sequence[str], out: Path) -> int:
    """Write the page of the runs that are named, each by its directory, a folder above it, or a pattern."""
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder: name a file in it, such as {out / 'report.html'}")
    require_place(out, f"--out {out}")
    screen, parts = Screen(), list[Part]()
    for path, named in places_of_runs(places).items():
        try:
            parts.append(part_of(read_run(path)))
        except MissingError as error:
            if named:
                raise
            screen.note(f"left out: {error}")
    if not parts:
        raise MissingError(f"{', '.join(places)}: no run that has finished a case")
    write(page_of(parts), out, f"--out {out}")
    screen.line(str(out))
    return 0
