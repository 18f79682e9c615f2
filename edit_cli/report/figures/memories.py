"""The figure of `inspect`: layer by layer what fires keys, what values promote, and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edit_cli.report.figures import style

NAME = "memories"


def draw(summary: Mapping[str, Any], directory: Path) -> list[str]:
    """Write memories.png and memories.svg: triggers, removals, agreement, composition, refinement, in five panels."""
    layers = summary["layers"]
    if not layers:
        return []
    title = f"{summary['model']}: feed-forward layers as memories, {summary['dataset']['name']}"
    figure = style.new(11, 5.6, title)
    plots = figure.subplots(2, 3, sharex=True).flatten()
    _lines(plots[0], layers, "keys by what their triggers share, %", {
        "end alike (shallow)": lambda layer: layer["shallow"],
        "share a word (semantic)": lambda layer: layer["semantic"],
    })  # fmt: skip
    _lines(plots[1], layers, "coefficient without one token, %", {
        f"without the {which}" if which != "random" else "without one at random": _removed(which)
        for which in ("last", "first", "random")
    })  # fmt: skip
    _lines(plots[2], layers, "value's top token is the trigger's next, %", {
        "keys that fire": lambda layer: layer["agreement"],
        "by chance": lambda layer: layer["chance"],
    })  # fmt: skip
    _lines(plots[3], layers, "a layer's output, %", {
        "memories that are active": lambda layer: layer["composition"]["active"],
        "top token is one memory's": lambda layer: layer["composition"]["alone"],
    })  # fmt: skip
    _lines(plots[4], layers, "whose top token the sum has, %", {
        name: (lambda layer, kind=kind: layer["refinement"][kind])
        for kind, name in (
            ("residual", "the residual's"), ("layer", "the layer's"), ("agreement", "both"), ("composition", "neither")
        )
    })  # fmt: skip
    _lines(plots[5], layers, "residual's top token is the answer, %", {
        "before this layer": lambda layer: layer["refinement"]["final"],
        "from here on": lambda layer: layer["refinement"]["settled"],
    })  # fmt: skip
    for plot in plots[3:]:
        plot.set_xlabel("layer")
    style.whole_numbers(plots[0].xaxis)
    style.save(figure, directory, NAME)
    return [NAME]


def _removed(which: str) -> Any:
    return lambda layer: layer["removed"] and layer["removed"][which]


def _lines(plot: Any, layers: Sequence[Mapping[str, Any]], title: str, series: Mapping[str, Any]) -> None:
    for number, (name, of) in enumerate(series.items()):
        points = [(layer["layer"], 100 * of(layer)) for layer in layers if of(layer) is not None]
        if points:
            plot.plot(*zip(*points, strict=True), label=name, **style.style(number, len(series)))
    plot.set_title(title, fontsize="small")
    plot.grid(alpha=0.3)
    if plot.get_legend_handles_labels()[1]:
        plot.legend(fontsize="x-small", frameon=False)
