"""The figure and the file of a comparison of runs."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edit_cli.metrics.registry import metrics as registered
from edit_cli.report import figures, words
from edit_cli.report.comparison import last_side
from edit_cli.report.curves import line, scale_perplexity
from edit_cli.terminal import literal

WIDE = 3  # panels side by side
FACTS = "facts"  # the x-axis of sequential runs


@dataclass(frozen=True)
class Point:
    """One mean of one run: at which place of the x-axis, the entry of the summary, and what the whole run cost."""

    line: str
    x: Any
    metric: str
    entry: Mapping[str, Any]
    cost: Mapping[str, str] = field(default_factory=dict)


def moments(summary: Mapping[str, Any], at: Any, over_facts: bool) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """(x, {metric: entry}) of a run: its end, or each of its checkpoints."""
    if over_facts:
        for row in summary["checkpoints"]:
            yield row["edits"], row["metrics"]
    else:
        yield at, {name: entry for name, sides in summary["metrics"].items() if (entry := last_side(sides))}


def write_table(points: Sequence[Point], x: str | None, path: Path) -> Path:
    """A line a point: run, x, metric, mean, interval, number of cases."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file)
        table.writerow(["run", x or "x", "metric", "mean", "low", "high", "n"])
        for point in points:
            low, high = point.entry["ci95"] or (None, None)
            table.writerow([point.line, point.x, point.metric, point.entry["mean"], low, high, point.entry["n"]])
    return path


def cost(summary: Mapping[str, Any]) -> dict[str, str]:
    """Time and memory of a run, as the table tells them."""
    seconds, peak = summary["seconds_per_edit"], summary["peak_memory_bytes"]
    spent = {} if seconds is None else {"seconds an edit": f"{seconds:.3f}"}
    return spent | {f"peak memory, {where}": f"{size / 2**30:.2f} GiB" for where, size in peak.items() if size}


def write_markdown(points: Sequence[Point], x: str | None, metrics: Sequence[str], path: Path) -> Path:
    """A row a run and place, a column a metric: "mean [low, high]"."""
    rows: dict[tuple[str, Any], dict[str, str]] = {}
    for point in points:
        row = rows.setdefault((point.line, str(point.x)), dict(point.cost))
        row[point.metric] = words.with_interval(point.entry)
    spent = list(dict.fromkeys(key for point in points for key in point.cost))
    heads = ["run", *([x] if x else []), *(_heading(metric) for metric in metrics), *spent]
    lines = [heads, ["---"] * len(heads)]
    for (name, place), row in rows.items():
        lines.append([name, *([place] if x else []), *(row.get(key, "–") for key in (*metrics, *spent))])
    path.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), "utf-8", "backslashreplace")
    return path


def _heading(metric: str) -> str:
    found = registered()[metric]
    return f"{found.label}, {found.unit}" if found.unit else found.label


def draw(points: Sequence[Point], x: str, metrics: Sequence[str], paths: Sequence[Path], title: str) -> Sequence[Path]:
    """The figure, in each of the `paths`: a panel a metric, a line a method, 95 % bands."""
    columns = min(len(metrics), 2 if len(metrics) == 4 else WIDE)
    rows = math.ceil(len(metrics) / columns)
    figure = figures.new(3.4 * columns + 0.6, 3.2 * rows + 0.3, title)
    plots = figure.subplots(rows, columns, squeeze=False).ravel()
    for empty in plots[len(metrics) :]:
        empty.remove()
    plots = plots[: len(metrics)]
    lines = list(dict.fromkeys(point.line for point in points))
    numbers = [point.x for point in points if isinstance(point.x, int | float) and not isinstance(point.x, bool)]
    numeric = len(numbers) == len(points)
    places = sorted({point.x for point in points}) if numeric else list(dict.fromkeys(str(point.x) for point in points))
    for plot, metric in zip(plots, metrics, strict=True):
        for number, name in enumerate(lines):
            mine = [p for p in points if p.line == name and p.metric == metric and p.entry["mean"] is not None]
            pairs = sorted(
                ((p.x if numeric else places.index(str(p.x)), p.entry) for p in mine), key=lambda pair: pair[0]
            )
            line(plot, pairs, name, number, len(lines))
        if numeric and places[0] > 0 and places[-1] / places[0] >= 30:
            plot.set_xscale("log")
        elif numeric and all(isinstance(place, int) for place in places):
            plot.xaxis.get_major_locator().set_params(integer=True)
        if not numeric:
            plot.set_xticks(range(len(places)), list(map(literal, places)), rotation=30, ha="right")
        unit = registered()[metric].unit
        plot.set(
            title=registered()[metric].label,
            xlabel="facts edited, all in place" if x == FACTS else literal(x),
            ylabel=unit,
        )
        if metric == "perplexity":
            scale_perplexity(plot, [p.entry["mean"] for p in points if p.metric == metric])
        if unit == "%":
            plot.set_ylim(-2, 102)
        plot.grid(alpha=0.3)
    plots[0].legend(fontsize="x-small", handlelength=3)
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths
