"""Second moments as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from edit_cli.report import words
from edit_cli.report.comparison import right_aligned
from edit_cli.report.tables.run import prose
from edit_cli.report.tables.texts import Text

if TYPE_CHECKING:
    from edit_cli.statistics.moments import Moment

NOTE = (
    "condition: how nearly singular the matrix is, the larger the worse. first token: share of its trace that comes"
    " from the first token of each document; near 100 % means that it says little about all other tokens."
)


def moments_table(model: str, corpus: str, moments: Sequence[Moment]) -> RenderableType:
    """One line a layer."""
    table = right_aligned("layer", "width", "documents", "tokens", "condition", "first token", "took")
    for moment in moments:
        share = moment.position0_share
        table.add_row(
            str(moment.layer),
            f"{len(moment.matrix):,}",
            "–" if moment.documents is None else f"{moment.documents:,}",
            f"{moment.tokens:,}",
            f"{moment.condition():.1e}",
            "–" if share is None else f"{100 * share:.1f} %",
            "was there" if moment.cached else words.seconds(moment.seconds),
        )
    return Group(
        Text(f"Second moments of the keys of {model}, from {corpus}", style="bold"),
        Text(),
        table,
        prose(NOTE),
    )
