"""The figures of a sequential run, as PNG and SVG: its course, and what is forgotten when."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from edit_cli.report import words
from edit_cli.report.figures import style
from edit_cli.report.sequence import curve_series
from edit_cli.terminal import literal

COURSE, FORGETTING = "curve", "forgetting"
TINTS = "viridis"
NEAR = 1.02  # ratio of perplexities below which they count as equal
FAR = 20  # ratio of perplexities from which on they are drawn on a logarithmic scale

Panel = tuple[str, float, Callable[[Any], None]]  # label of the y-axis, height, what draws it


def draw(summary: Mapping[str, Any], directory: Path) -> list[str]:
    """Write the figures that the summary has data for; their names without suffix."""
    drawn = {COURSE: _course(summary), FORGETTING: _forgetting(summary)}
    for name, figure in drawn.items():
        if figure is not None:
            style.save(figure, directory, name)
    return [name for name, figure in drawn.items() if figure is not None]


def _course(summary: Mapping[str, Any]) -> Any:
    """Success and what is kept, with 95 % bands; perplexity; weights and drift; cost of a step.

    All over the number of facts.
    """
    panels = [panel for panel in _panels(summary) if panel is not None]
    title = f"{style.about(summary)}, {words.batches(summary['protocol'])}"
    title += "; bands: 95 % intervals over facts" + ("; dotted: collapsed" if summary["collapse"] else "")
    figure = style.new(8, 1.7 + sum(height for _, height, _ in panels), title)
    axes = figure.subplots(
        len(panels), 1, sharex=True, squeeze=False, height_ratios=[height for _, height, _ in panels]
    )[:, 0]
    for plot, (label, _, paint) in zip(axes, panels, strict=True):
        paint(plot)
        plot.set_ylabel(label)
        plot.grid(alpha=0.3)
        style.legend_beside(plot)
        if summary["collapse"]:
            plot.axvline(summary["collapse"]["edits"], color=style.COLLAPSE, linestyle=":", linewidth=1.2)
    axes[0].set(ylim=(-2, 102))
    axes[-1].set_xlabel("facts edited, all still in place")
    style.whole_numbers(axes[-1].xaxis)
    return figure


def _panels(summary: Mapping[str, Any]) -> list[Panel | None]:
    rows = summary["checkpoints"]
    perplexity = [(row["edits"], row["metrics"]["perplexity"]) for row in rows if "perplexity" in row["metrics"]]
    weights = [(row["edits"], row["model"]) for row in rows if row["model"].get("weights")]
    drift = [(row["edits"], 100 * row["model"]["drift"]) for row in rows if row["model"].get("drift") is not None]

    def shares(plot: Any) -> None:
        series = curve_series(summary)
        for number, (name, points) in enumerate(series.items()):
            line(plot, points, name, number, len(series))

    def norms(plot: Any) -> None:
        modules = list(weights[-1][1]["weights"]) if weights else []
        for number, module in enumerate(modules):
            points = [
                (edits, 100 * model["weights"][module]["change"])
                for edits, model in weights
                if module in model["weights"]
            ]
            name = f"weight of {literal(_short(module))}"
            plot.plot(*zip(*points, strict=True), label=name, **style.style(number, len(modules)))
        if drift:
            plot.plot(
                *zip(*drift, strict=True), marker=".", color="black", linestyle="--", label="last states", linewidth=1
            )
        style.from_zero(plot)

    def fluency(plot: Any) -> None:
        line(plot, perplexity, "edited")
        start = summary["metrics"].get("perplexity", {}).get("before", {}).get("mean")
        if start:
            plot.axhline(start, color="gray", linestyle=":", linewidth=1.2, label="unedited")
        scale_perplexity(plot, [start, *(entry["mean"] for _, entry in perplexity)])

    def seconds(plot: Any) -> None:
        facts, each = zip(*summary["cost"], strict=True)
        plot.plot(facts, each, linewidth=0.6, color=style.COLORS[0], alpha=0.4, label="each step")
        plot.plot(facts, _running_median(each), linewidth=1.4, color=style.COLORS[0], label="running median")
        # a pause of the machine must not flatten the rest
        plot.set_ylim(0, 1.5 * sorted(each)[int(0.98 * (len(each) - 1))] or None)

    return [
        ("%", 3, shares),
        ("perplexity", 1.2, fluency) if perplexity else None,
        ("moved by, %", 1.6, norms) if weights or drift else None,
        ("seconds a fact", 1.2, seconds) if summary["cost"] else None,
    ]


def scale_perplexity(plot: Any, values: Sequence[float | None]) -> None:
    """A logarithmic scale where perplexities are far apart; those that are not known, such as infinite ones, do not
    count.
    """
    known = [value for value in values if value]
    low, high = min(known, default=1), max(known, default=1)
    if high > FAR * low:
        plot.set_yscale("log")
    elif high < NEAR * low:  # what differs by less is not drawn as if it differed much
        middle = (low + high) / 2
        plot.set_ylim(middle / NEAR, middle * NEAR)


def _running_median(values: Sequence[float]) -> list[float]:
    """Of as many values around each as are a twentieth of all, two at least on each side."""
    reach = max(len(values) // 40, 2)
    return [median(values[max(place - reach, 0) : place + reach + 1]) for place in range(len(values))]


def _short(module: str) -> str:
    """The number of the block and the last name: `3 c_proj`."""
    parts = module.split(".")
    return " ".join([*[part for part in parts if part.isdigit()][:1], parts[-1]])


def _forgetting(summary: Mapping[str, Any]) -> Any:
    """When edited × when tested: which facts are still known."""
    found = summary["retention"]
    if not found or len(found["tested"]) < 2 or len(found["edited"]) < 2:
        return None
    figure = style.new(
        max(1.6 + 0.55 * len(found["tested"]), 4.5),
        2.2 + 0.42 * len(found["edited"]),
        f"{style.about(summary)}: edited facts that are still the top choice, %",
    )
    plot = figure.subplots()
    cells = [[float("nan") if value is None else value for value in row] for row in found["values"]]
    image = plot.imshow(cells, vmin=0, vmax=100, cmap=TINTS, aspect="auto")
    for y, row in enumerate(found["values"]):
        for x, value in enumerate(row):
            if value is not None:
                plot.text(
                    x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if value < 60 else "black"
                )
    plot.set_xticks(range(len(found["tested"])), [f"{edits:,}" for edits in found["tested"]], rotation=45, ha="right")
    plot.set_yticks(range(len(found["edited"])), [_span(first, last) for first, last in found["edited"]])
    plot.set(xlabel="tested after so many facts", ylabel="edited as fact")
    figure.colorbar(image, ax=plot, label="%")
    return figure


def _span(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,}–{last:,}"


def line(
    plot: Any, points: Sequence[tuple[Any, Mapping[str, Any]]], name: str, number: int = 0, count: int = 1
) -> None:
    """The number-th of `count` lines of means with bands, of (place, entry of a summary); means that are not finite
    are left out.
    """
    finite = [(place, entry) for place, entry in points if entry["mean"] is not None]
    places, means = [place for place, _ in finite], [entry["mean"] for _, entry in finite]
    (drawn,) = plot.plot(places, means, label=literal(name), **style.style(number, count))
    bands = [(place, *ends) for place, entry in finite if (ends := _band(entry)) and None not in ends]
    if bands:
        plot.fill_between(*zip(*bands, strict=True), alpha=0.12, color=drawn.get_color(), linewidth=0)


def _band(entry: Mapping[str, Any]) -> Sequence[float | None] | None:
    """The 95 % interval of a mean, or one standard deviation to either side where it is over several seeds."""
    spread = entry.get("sd")
    return entry["ci95"] if spread is None else (entry["mean"] - spread, entry["mean"] + spread)
