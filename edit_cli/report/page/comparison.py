"""Several runs side by side, as a part of a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from edit_cli.report import compare
from edit_cli.report.compare import Point
from edit_cli.report.comparison import COMPARED, LOST, meaning, unbroken
from edit_cli.report.measures import TRACED, TRAINED, measures
from edit_cli.report.page.parts import Block, Cell, Figure, Grid, Note, Rows, Section, mark
from edit_cli.report.page.pictures import picture
from edit_cli.report.tables.sheets import Sheet


def section(ends: Sequence[Point], metrics: Sequence[str], sheets: Sequence[Sheet], notes: Sequence[str],
            drawn: Sequence[Figure] = ()) -> Section:  # fmt: skip
    """The ends of the runs with their intervals; differences and published numbers; a figure where there is an axis.

    sheets: what stands below the means.
    """
    blocks: list[Block] = [_means(ends, metrics), *map(Note, [*_meaning(metrics), *notes])]
    return Section(
        "Comparison", [*blocks, *(grid_of(sheet) for sheet in sheets if sheet.filled or sheet.notes), *drawn]
    )


def figure(points: Sequence[Point], x: str | None, metrics: Sequence[str], title: str) -> list[Figure]:
    """The means along the axis, if there is one."""
    if x is None or not points:
        return []
    with TemporaryDirectory(prefix="edit-cli-") as folder:
        (file,) = compare.draw(points, x, metrics, [Path(folder) / "comparison.svg"], title)
        return [picture(file, f"The runs along {x}; bands: 95 % intervals over cases.")]


def grid_of(sheet: Sheet) -> Grid:
    """A table of texts."""
    blocks = [Rows(block.label, [[Cell(_kept(text)) for text in row] for row in block.rows]) for block in sheet.filled]
    return Grid(list(map(unbroken, sheet.heads)), blocks, sheet.title, sheet.notes, range(1, len(sheet.heads)))


def _means(ends: Sequence[Point], metrics: Sequence[str]) -> Grid:
    """A row a run; what is a share is drawn, too."""
    spent = list(dict.fromkeys(key for point in ends for key in point.cost))
    seeds = ["seeds"] if any(point.entry.get("seeds", 1) > 1 for point in ends) else []
    rows: dict[str, dict[str, dict[str, Cell]]] = {}
    for point in ends:
        row = rows.setdefault(point.conditions, {}).setdefault(point.line, {"run": Cell(point.line)})
        row |= {key: Cell(text) for key, text in point.cost.items()}
        row["seeds"] = Cell(str(point.entry.get("seeds", 1)))
        text = compare.mean(point.entry, measures()[point.metric].decimals)
        marks = mark(1, point.entry) if measures()[point.metric].unit == "%" else []
        row[point.metric] = Cell(_kept(text), point.entry["mean"], marks=marks)
    keys = ["run", *seeds, *metrics, *spent]
    blocks = [
        Rows(label, [[row.get(key, Cell("–", tone="quiet")) for key in keys] for row in lines.values()])
        for label, lines in rows.items()
    ]
    heads = ["run", *seeds, *(unbroken(compare.heading(name, True)) for name in metrics), *spent]
    return Grid(heads, blocks, right=range(1, len(keys)))


def _kept(text: str) -> str:
    """A cell whose interval, and what stands behind its ±, is never parted at the end of a line."""
    return text.replace(", ", ",\N{NO-BREAK SPACE}").replace("± ", "±\N{NO-BREAK SPACE}")


def _meaning(metrics: Sequence[str]) -> list[str]:
    """What the headings mean."""
    known = [name for name in metrics if name in (*COMPARED, *LOST)]
    others = [
        f"{unbroken(compare.heading(name, True))}: {measures()[name].definition}"
        for name in metrics
        if name in TRACED | TRAINED
    ]
    return [*([meaning(known, "s/edit", "cases")] if known else []), *([". ".join(others) + "."] if others else [])]
