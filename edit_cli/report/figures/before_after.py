"""The figure of a run that edits: every share before and after the edit, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edit_cli.report import words
from edit_cli.report.figures import style
from edit_cli.terminal import literal

NAME = "before_after"
SIDES = ("before", "after")


def draw(summary: Mapping[str, Any], directory: Path) -> list[str]:
    """Write before_after.png and before_after.svg: a row a metric in %, means with 95 % intervals over facts."""
    rows = _rows(summary["metrics"])
    if not rows:
        return []
    title = f"{style.about(summary)}, {words.batches(summary['protocol'])}; bars: 95 % intervals over facts"
    figure = style.new(7.5, 1.3 + 0.26 * len(rows) + 0.02 * len(rows), title)
    plot = figure.subplots()
    for number, side in enumerate(SIDES):
        places, entries = [], []
        for place, (_, sides) in enumerate(rows):
            if (entry := sides.get(side)) and entry["mean"] is not None:
                places.append(place + (number - 0.5) * 0.28)
                entries.append(entry)
        means = [entry["mean"] for entry in entries]
        ends = [
            [end if end is not None else entry["mean"] for end in entry["ci95"] or (None, None)] for entry in entries
        ]
        reach = [[mean - low for mean, (low, _) in zip(means, ends, strict=True)],
                 [high - mean for mean, (_, high) in zip(means, ends, strict=True)]]  # fmt: skip
        look = {"marker": style.MARKERS[number], "color": style.COLORS[number], "linestyle": "none", "markersize": 5}
        fill = {"markerfacecolor": "white"} if side == "before" else {}
        plot.errorbar(means, places, xerr=reach, label=side, capsize=2, elinewidth=1.2, **look, **fill)
    plot.set_yticks(range(len(rows)), [literal(name) for name, _ in rows])
    plot.set(xlim=(-2, 102), ylim=(len(rows) - 0.4, -0.6), xlabel="%")
    plot.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower right", ncols=2, fontsize="small", frameon=False)
    style.save(figure, directory, NAME)
    return [NAME]


def _rows(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(what a row is called, its entries) of the shares that a table shows, in its order."""
    return [
        (row.label, found[row.id])
        for _, groups in words.sections(found)
        for _, rows in groups
        for row in rows
        if row.unit == "%"
    ]
