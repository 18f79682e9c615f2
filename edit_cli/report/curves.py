"""The curve of a sequential run, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edit_cli.report import words
from edit_cli.report.sequence import curve_series

NAME = "curve"


def draw(summary: Mapping[str, Any], directory: Path) -> None:
    """Write curve.png and curve.svg: success and what is kept, with 95 % bands, and perplexity, over the number of facts."""
    from matplotlib.figure import Figure

    perplexity = [(row["edits"], row["metrics"]["perplexity"]) for row in summary["checkpoints"] if "perplexity" in row["metrics"]]
    figure = Figure(figsize=(7, 6 if perplexity else 4), layout="constrained")
    axes = figure.subplots(2 if perplexity else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 1] if perplexity else [1])[:, 0]
    for name, points in curve_series(summary).items():
        _line(axes[0], points, name)
    title = f"{summary['method']} on {summary['model']}: {summary['dataset']['name']}, {words.batches(summary['protocol'])}"
    axes[0].set(ylim=(-2, 102), ylabel="%, with 95 % bands", title=title)
    if axes[0].lines:
        axes[0].legend(loc="lower left", fontsize="small")
    if perplexity:
        _line(axes[1], perplexity, "perplexity")
        axes[1].set(ylabel="perplexity")
    axes[-1].set_xlabel("facts edited, all still in place")
    for plot in axes:
        plot.grid(alpha=0.3)
    for kind in ("png", "svg"):
        figure.savefig(directory / f"{NAME}.{kind}", dpi=150)


def _line(plot: Any, points: list[tuple[int, Mapping[str, Any]]], name: str) -> None:
    finite = [(count, entry) for count, entry in points if entry["mean"] is not None]
    counts = [count for count, _ in finite]
    (line,) = plot.plot(counts, [entry["mean"] for _, entry in finite], marker="o", markersize=3, label=name)
    bands = [(count, *entry["ci95"]) for count, entry in finite if entry["ci95"] and None not in entry["ci95"]]
    if bands:
        plot.fill_between(*zip(*bands, strict=True), alpha=0.12, color=line.get_color(), linewidth=0)
