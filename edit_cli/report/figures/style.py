"""What all figures share: a title that fits, lines that can be told apart even where they are equal, and two files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

from edit_cli.terminal import literal
from edit_cli.wording import many

LETTER = 0.085  # inches that a letter of a title takes, with something to spare
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
MARKERS = "osD^vP*X"
COLLAPSE = "#B22222"
KINDS = ("png", "svg")
# Okabe and Ito's palette without black and yellow: colors that people with any kind of color vision tell apart
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


def new(width: float, height: float, title: str) -> Any:
    """A figure of so many inches, the title in as many lines as it takes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(fitted(title, width), fontsize="medium")
    return figure


def fitted(title: str, width: float) -> str:
    """A title in as many lines as it takes in so many inches."""
    return literal(fill(title, max(int(width / LETTER), 20)))


def style(number: int, count: int) -> dict[str, Any]:
    """How the number-th of `count` lines is drawn: thinner than those below it and dashed in another way, so that they
    are seen beside it where their values are the same.
    """
    above = number / (count - 1) if count > 1 else 1.0
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
        "linewidth": 2.8 - 1.6 * above,
        "markersize": 5.5 - 2.5 * above,
    }


def legend_beside(plot: Any) -> None:
    """Names of the lines at the right of a panel, where they hide none of them."""
    if plot.get_legend_handles_labels()[1]:
        beside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
        plot.legend(**beside, fontsize="x-small", frameon=False, handlelength=3)


def whole_numbers(axis: Any) -> None:
    """Ticks at whole numbers alone, thousands apart."""
    axis.get_major_locator().set_params(integer=True)
    axis.set_major_formatter("{x:,.0f}")


def from_zero(plot: Any) -> None:
    """A y-axis that begins at 0, or below where values do, with room above the highest."""
    low, high = plot.dataLim.y0, plot.dataLim.y1
    if high > 0:
        plot.set_ylim(min(0.0, 1.05 * low), 1.05 * high)


def logarithmic(plot: Any) -> None:
    """A logarithmic y-axis with plain numbers beside it."""
    from matplotlib.ticker import LogLocator, NullLocator

    plot.set_yscale("log")
    plot.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    plot.yaxis.set_minor_locator(NullLocator())
    plot.yaxis.set_major_formatter("{x:g}")


def save(figure: Any, directory: Path, name: str) -> None:
    """NAME.png and NAME.svg, the same bytes whenever they are drawn."""
    for kind in KINDS:
        write(figure, directory / f"{name}.{kind}")


def write(figure: Any, file: Path) -> None:
    """One file, of the kind that its name says."""
    from matplotlib import rc_context

    metadata = {"Date": None} if file.suffix == ".svg" else {}
    with rc_context({"svg.hashsalt": "edit-cli"}):
        figure.savefig(file, dpi=150, metadata=metadata)


def about(summary: Mapping[str, Any]) -> str:
    """`memit on tiny-gpt2: counterfact, 200 facts`"""
    return f"{summary['method']} on {summary['model']}: {summary['dataset']['name']}, {many(summary['n'], 'fact')}"
