"""The page of one run, and the part of it on a page of several."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edit_cli.files.disk import telling
from edit_cli.report.kinds import summary_so_far
from edit_cli.report.page.made import made
from edit_cli.report.page.parts import Block, Page, Part, Section, extremes
from edit_cli.report.page.pictures import pictures
from edit_cli.report.page.render import html
from edit_cli.report.page.results import found
from edit_cli.report.sequence import collapse_line
from edit_cli.runs.format import kind_of
from edit_cli.runs.record import RunRecord, read_run

NAME = "report.html"  # in the directory of a run that writes its own page


def part_of(record: RunRecord) -> Part:
    """What a page tells of a run.

    Raises:
        MissingError: the run has no finished case yet, or is of a kind that this version does not know.
    """
    kind, summary = kind_of(record.manifest), summary_so_far(record)
    told = found(kind, summary, record.lines)
    title, *lines = told.lines
    drawn = pictures(kind, summary, record.path)
    cases = _cases(told.items)
    sections = [*told.sections, *([Section("Figures", drawn)] if drawn else []), *cases, made(record.manifest, summary)]
    return Part(title, str(record.path), lines, told.tiles, _warnings(record, summary), sections)


def _cases(items: Any) -> list[Section]:
    if items is None or not items.items:
        return []
    blocks: list[Block] = [items]
    most = extremes(items)
    worst = [Section(f"Worst and best {items.several}", [most])] if most else []
    return [*worst, Section(f"All {items.several}", blocks)]


def _warnings(record: RunRecord, summary: Mapping[str, Any]) -> list[str]:
    """What a reader must know before any number."""
    told = []
    if record.status == "started":
        told.append("This run is still going on: the page tells what there was when it was made.")
    elif record.status != "success":
        told.append(f"This run was not finished ({record.status}).")
    if summary.get("collapse"):
        told.append(collapse_line(summary))
    return told


def page_of(parts: Sequence[Part], **more: Any) -> Page:
    """A page of these runs."""
    from edit_cli import __version__

    title = parts[0].title if len(parts) == 1 else f"{len(parts)} runs"
    times = Counter(part.title for part in parts)
    parts = [
        replace(part, title=f"{part.title} ({Path(part.place).name})") if times[part.title] > 1 else part
        for part in parts
    ]
    return Page(title, parts, made=f"edit-cli {__version__}", **more)


def write(page: Page, file: Path, what: object = None) -> None:
    """Write the page: whole, or not at all. what: the setting that names the file.

    Raises:
        MissingError: the disk does not take it.
    """
    text = html(page)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with telling(what or file):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def write_own(run: Path) -> Path:
    """The page of a finished run in its directory."""
    file = run / NAME
    write(page_of([part_of(read_run(run))]), file)
    return file
