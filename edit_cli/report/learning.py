"""What a training found: its curves as PNG and SVG, and the numbers of its best step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from edit_cli.report import words
from edit_cli.report.figures import style
from edit_cli.report.summary import header
from edit_cli.report.tables.run import plain_table
from edit_cli.report.tables.texts import Text
from edit_cli.terminal import literal
from edit_cli.wording import many

NAME = "curves"
APART = ("step", "kind", "phases")
UNITS = {"es": "%", "drawdown": "points", "nll": "nats", "kl": "nats", "base": "nats", "bound": "nats"}
MARKERS = {"train": None, "validation": "o"}
MEANING = {
    "loss": "what is minimized",
    "nll": "negative log-likelihood of the new answer after rephrased prompts, nats",
    "kl": "KL divergence (before ‖ after) where answers must stay, nats",
    "es": "rephrased prompts that get the new answer, %",
    "drawdown": "accuracy lost where answers must stay, points",
    "base": "KL divergence (original ‖ trained model) where answers must stay, before any edit, nats",
    "bound": "that the KL divergence is to stay below",
    "multiplier": "of what the KL divergence is above its bound",
    "shift": "largest change of a weight matrix, relative to it (Frobenius norms)",
    "gradient": "norm of the gradient before clipping",
}


def summary_of(
    manifest: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    references: Mapping[str, Sequence[str]] | None = None,
    seconds: Mapping[str, float] | None = None,
    *,
    found: Mapping[str, Any] | None = None,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """summary.json of a training. series: {kind: {name: [[step, value]]}}.

    best: what the kept network reached on validation edits.

    found: {"step", "metrics"} of the kept network; without it, of the best one so far.
    """
    if found is None:
        validated = [line for line in lines if line["kind"] == "validation" and line.get("loss") is not None]
        best = min(validated, key=lambda line: line["loss"], default={"step": 0})
        told = {name: value for name, value in best.items() if name not in APART and value is not None}
        found = {"step": best["step"], "metrics": told}
    series: dict[str, dict[str, list[list[float]]]] = {}
    for line in sorted(lines, key=lambda line: line["step"]):
        for name, value in line.items():
            if name not in APART and value is not None:
                series.setdefault(line["kind"], {}).setdefault(name, []).append([line["step"], value])
    about = manifest["dataset"]
    return {
        **header(manifest, [], seconds),
        "dataset": {name: about[name] for name in ("name", "source", "records_selected", "split", "ids_sha256")},
        "protocol": manifest["protocol"],
        "best": dict(found),
        "checkpoint": checkpoint,
        "series": series,
    }


def table(summary: Mapping[str, Any]) -> RenderableType:
    """The kept network on validation edits."""
    found = summary["best"]["metrics"]
    rows = plain_table("on validation edits", "", "", right=(1,))
    for name, value in found.items():
        rows.add_row(name, number(value), Text(MEANING.get(name, ""), style="dim"))
    seconds = ", ".join(f"{phase} {words.seconds(spent)}" for phase, spent in summary["seconds"].items())
    return Group(
        heading(summary),
        Text(),
        rows,
        Text(seconds, style="dim"),
    )


def heading(summary: Mapping[str, Any]) -> Text:
    """Method, model, records, the best step."""
    text = Text(
        f"{summary['method']} trained for {summary['model']} on {summary['dataset']['name']},"
        f" {many(summary['protocol']['cases'], 'case')}",
        style="bold",
    )
    text.append(f"\nbest at step {summary['best']['step']:,}", style="not bold")
    return text


def number(value: float) -> str:
    return words.number(value) if abs(value) >= 1 else f"{value:.3g}"


def draw(summary: Mapping[str, Any], directory: Path) -> list[str]:
    """curves.png and curves.svg: one panel a number, training and validation in each."""
    names = list(dict.fromkeys(name for kind in summary["series"].values() for name in kind))
    rows = -(-len(names) // 2)
    data = f"{summary['dataset']['name']}, {many(summary['protocol']['cases'], 'case')}"
    validated = f"validated on {summary['protocol']['validation']:,} more"
    title = f"{summary['method']} on {summary['model']}: {data}, {validated}; dotted: the step that is kept"
    figure = style.new(9, 1 + 1.8 * rows, title)
    axes = figure.subplots(rows, 2, sharex=True, squeeze=False).flatten()
    for plot, name in zip(axes, names, strict=False):
        for color, (kind, marker) in zip(style.COLORS, MARKERS.items(), strict=False):
            if name in summary["series"].get(kind, {}):
                plot.plot(
                    *zip(*summary["series"][kind][name], strict=True),
                    label=kind,
                    color=color,
                    marker=marker,
                    linewidth=1,
                    markersize=4,
                )
        plot.axvline(summary["best"]["step"], color="gray", linestyle=":", linewidth=1)
        unit = UNITS.get(name)
        plot.set_title(literal(f"{name}, {unit}" if unit else name), fontsize="small")
        plot.grid(alpha=0.3)
        if name in ("loss", "nll", "kl", "gradient"):
            style.logarithmic(plot)
    for plot in axes[len(names) :]:
        plot.set_axis_off()
    for plot in axes[max(len(names) - 2, 0) : len(names)]:
        plot.tick_params(labelbottom=True)
    axes[0].legend(fontsize="x-small")
    style.whole_numbers(axes[0].xaxis)
    figure.supxlabel("optimizer steps", fontsize="small")
    style.save(figure, directory, NAME)
    return [NAME]
