"""A comparison of runs as tables (screen, CSV, Markdown, LaTeX) and as a figure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from edit_cli.metrics.paired import Difference
from edit_cli.report import words
from edit_cli.report.comparison import last_side
from edit_cli.report.figures import style
from edit_cli.report.figures.curves import line, scale_perplexity
from edit_cli.report.measures import measures
from edit_cli.report.tables.sheets import Block, Sheet
from edit_cli.terminal import literal

WIDE = 3  # panels side by side
PANEL = 3.4  # inches of width that a panel takes
BESIDE = 0.7  # of which stand beside the axes
FACTS = "facts"  # the x-axis of sequential runs
COLUMNS = (
    "metric mean low high n sd seeds conditions reference difference difference_low difference_high p p_holm pairs"
    " published"
).split()


@dataclass(frozen=True)
class Point:
    """One mean of one run, or of runs that differ in their seeds alone.

    line: what it is called. x: the place on the x-axis. entry: that of the summary; of several seeds with "sd" and
    "seeds" too. cost: what the whole run took. conditions: what else sets it apart from other runs, where unlike ones
    are listed together. difference: from the reference.
    """

    line: str
    x: Any
    metric: str
    entry: Mapping[str, Any]
    cost: Mapping[str, str] = field(default_factory=dict)
    conditions: str = ""
    difference: Difference | None = None

    @property
    def named(self) -> str:
        """The line among unlike ones."""
        return f"{self.line} ({self.conditions})" if self.conditions else self.line


def moments(summary: Mapping[str, Any], at: Any, over_facts: bool) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """(x, {metric: entry}) of a run: its end, or each of its checkpoints."""
    if over_facts:
        for row in summary["checkpoints"]:
            yield row["edits"], row["metrics"]
    else:
        yield at, {name: entry for name, sides in summary["metrics"].items() if (entry := last_side(sides))}


def pooled(entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """One entry of those of several seeds: their mean and the standard deviation between seeds (n − 1)."""
    if len(entries) == 1:
        return entries[0]
    means = [entry["mean"] for entry in entries]
    finite = None not in means
    return {
        "mean": fmean(means) if finite else None,
        "ci95": None,
        "n": min(entry["n"] for entry in entries),
        "sd": stdev(means) if finite else None,
        "seeds": len(entries),
    }


def cost(summaries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Time (mean over seeds) and memory (largest) of a run, as the table tells them."""
    seconds = [summary["seconds_per_edit"] for summary in summaries if summary["seconds_per_edit"] is not None]
    spent = {"seconds an edit": f"{fmean(seconds):.3f}"} if seconds else {}
    places = dict.fromkeys(where for summary in summaries for where in summary["peak_memory_bytes"])
    peak = {where: max(summary["peak_memory_bytes"].get(where) or 0 for summary in summaries) for where in places}
    return spent | {f"peak memory, {where}": f"{size / 2**30:.2f} GiB" for where, size in peak.items() if size}


# --- tables ----------------------------------------------------------------------------------------------------------


def csv_text(points: Sequence[Point], x: str | None, reference: str, published: Sequence[Sequence[Any]]) -> str:
    """A line a point, then those of published numbers: (run, metric, value, low, high, citation)."""
    rows: list[list[Any]] = [["run", x or "x", *COLUMNS]]
    for point in points:
        entry, found = point.entry, point.difference
        told = [entry["mean"], *(entry["ci95"] or (None, None)), entry["n"], entry.get("sd"), entry.get("seeds", 1)]
        paired = [found.mean, *(found.ci95 or (None, None)), found.p, found.holm, found.pairs] if found else [None] * 6
        rows.append(
            [point.line, point.x, point.metric, *told, point.conditions, reference if found else None, *paired, None]
        )
    for name, *numbers, citation in published:
        rows.append([name, None, *numbers, *[None] * (len(COLUMNS) - 5), citation])
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def means(points: Sequence[Point], x: str | None, metrics: Sequence[str], short: bool = False) -> Sheet:
    """A row a run and place, a column a metric: `mean [low, high]`, of several seeds `mean ± sd`; runs under different
    conditions in blocks. short: with the headings of the screen, whose places stand in the names.
    """
    several = any(point.entry.get("seeds", 1) > 1 for point in points)
    spent = list(dict.fromkeys(key for point in points for key in point.cost))
    blocks: dict[str, dict[tuple[str, Any], dict[str, str]]] = {}
    for point in points:
        row = blocks.setdefault(point.conditions, {}).setdefault((point.line, str(point.x)), dict(point.cost))
        row["seeds"] = str(point.entry.get("seeds", 1))
        row[point.metric] = mean(point.entry, measures()[point.metric].decimals)
    at = [x] if x and not short else []
    heads = ["run", *at, *(["seeds"] if several else []), *(heading(name, short) for name in metrics), *spent]
    keys = [*(["seeds"] if several else []), *metrics, *spent]
    told = []
    for label, rows in blocks.items():
        cells = [[name, *([place] if at else []), *(row.get(key, "–") for key in keys)]
                 for (name, place), row in rows.items()]  # fmt: skip
        told.append(Block(label, cells))
    return Sheet("", heads, told)


def differences(
    points: Sequence[Point], x: str | None, metrics: Sequence[str], reference: str, short: bool = False
) -> Sheet:
    """A row a run that is paired with the reference: `+3.1 [1.2, 5.0] p=0.003`, p corrected by Holm's method."""
    rows: dict[tuple[str, Any], dict[str, str]] = {}
    for point in points:
        if point.difference is not None and point.metric in metrics:
            row = rows.setdefault((point.named, str(point.x)), {})
            row[point.metric] = difference(point.difference, measures()[point.metric].decimals)
    at = [x] if x and not short else []
    body = [
        [name, *([place] if at else []), *(row.get(metric, "–") for metric in metrics)]
        for (name, place), row in rows.items()
    ]
    shown = ["run", *at, *(heading(name, short) for name in metrics)]
    return Sheet(f"Difference from {reference} over the same cases", shown, [Block("", body)])


def mean(entry: Mapping[str, Any], digits: int) -> str:
    if entry.get("seeds", 1) == 1:
        return words.with_interval(entry, digits)
    return f"{words.number(entry['mean'], digits)} ± {words.number(entry['sd'], digits)}"


def difference(found: Difference, digits: int) -> str:
    """`+3.1 [1.2, 5.0] p=0.003`"""
    value = f"{found.mean:+,.{digits}f}"
    ends = "" if found.ci95 is None else " [{}, {}]".format(*(words.number(end, digits) for end in found.ci95))
    p = found.p if found.holm is None else found.holm
    return f"{value}{ends} {'p<0.001' if p < 0.0005 else f'p={p:.3f}'}"


def heading(metric: str, short: bool = False) -> str:
    found = measures()[metric]
    if short:
        return found.heading or found.label.replace(" ", "\n")
    return f"{found.label}, {found.unit}" if found.unit else found.label


def draw(points: Sequence[Point], x: str, metrics: Sequence[str], paths: Sequence[Path], title: str) -> Sequence[Path]:
    """The figure, in each of the `paths`: a panel a metric, a line a method, 95 % bands."""
    columns = min(len(metrics), 2 if len(metrics) == 4 else WIDE)
    rows = math.ceil(len(metrics) / columns)
    figure = style.new(PANEL * columns + 0.6, 3.2 * rows + 0.3, title)
    plots = figure.subplots(rows, columns, squeeze=False).ravel()
    for empty in plots[len(metrics) :]:
        empty.remove()
    plots = plots[: len(metrics)]
    lines = list(dict.fromkeys(point.named for point in points))
    numbers = [point.x for point in points if isinstance(point.x, int | float) and not isinstance(point.x, bool)]
    numeric = len(numbers) == len(points)
    names = list(dict.fromkeys(str(point.x) for point in points))
    for plot, metric in zip(plots, metrics, strict=True):
        for number, name in enumerate(lines):
            mine = [p for p in points if p.named == name and p.metric == metric and p.entry["mean"] is not None]
            pairs = sorted(
                ((p.x if numeric else names.index(str(p.x)), p.entry) for p in mine), key=lambda pair: pair[0]
            )
            line(plot, pairs, name, number, len(lines))
        if numeric and min(numbers) > 0 and max(numbers) / min(numbers) >= 30:
            plot.set_xscale("log")
        elif numeric and all(isinstance(number, int) for number in numbers):
            style.whole_numbers(plot.xaxis)
        if not numeric:
            plot.set_xticks(range(len(names)), list(map(literal, names)), rotation=30, ha="right")
        unit = measures()[metric].unit
        plot.set_title(style.fitted(measures()[metric].label, PANEL - BESIDE), fontsize="medium")
        plot.set(
            xlabel="facts edited, all in place" if x == FACTS else literal(x),
            ylabel=unit,
        )
        if metric == "perplexity":
            scale_perplexity(plot, [p.entry["mean"] for p in points if p.metric == metric])
        if unit == "%":
            plot.set_ylim(-2, 102)
        plot.grid(alpha=0.3)
    handles, names = plots[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=4, fontsize="x-small", handlelength=3, frameon=False
    )
    for path in paths:
        style.write(figure, path)
    return paths
