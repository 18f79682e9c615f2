"""Distances between keys as a table, and the settings that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from edit_cli.report.comparison import right_aligned
from edit_cli.report.tables.texts import Text
from edit_cli.wording import many

if TYPE_CHECKING:
    from edit_cli.editors.memory.calibration import Separation

NOTE = (
    "Distances between states at the last token of prompts. paraphrase: a fact in other words, half and 95 % of them"
    " nearer than this. others: other subjects, 5 % and half of them nearer. told apart: how often another wording is"
    " nearer than another subject, 50 % is chance. radius: where most other wordings lie within it and fewest others"
    " within twice of it. served, touched: shares of the two."
)


def calibration_table(model: str, facts: int, found: Sequence[Separation]) -> RenderableType:
    """One line a place, the best one marked."""
    table = right_aligned(
        "layer", "module", "key norm", "paraphrase", "others", "told apart", "radius", "served", "touched"
    )
    for place in found:
        near, far = (
            place.reworded.quantile(place.reworded.new_tensor([0.5, 0.95])),
            place.others.quantile(place.others.new_tensor([0.05, 0.5])),
        )
        table.add_row(
            f"{'* ' if place is best(found) else ''}{place.layer}",
            place.module,
            f"{place.norm:.3g}",
            f"{near[0]:.3g} – {near[1]:.3g}",
            f"{far[0]:.3g} – {far[1]:.3g}",
            f"{100 * place.auc:.1f} %",
            f"{place.radius:.3g}",
            f"{100 * (place.reworded <= place.radius).float().mean():.0f} %",
            f"{100 * (place.others <= 2 * place.radius).float().mean():.0f} %",
        )
    title = Text(f"How far {model} keeps other wordings and other subjects from {many(facts, 'fact')}", style="bold")
    return Group(title, Text(), table, Text(NOTE, style="dim"))


def best(found: Sequence[Separation]) -> Separation:
    """Where the two are told apart best."""
    return max(found, key=lambda place: place.auc)


def overrides(found: Sequence[Separation]) -> str:
    """Settings of a method with a codebook, as they are written on the command line."""
    place = best(found)
    return f"method.layer={place.layer} method.module={place.module} method.radius={place.radius:.3g}"
