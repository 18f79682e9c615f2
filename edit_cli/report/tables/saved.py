"""Tables of saved edits, and of what they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from edit_cli.edits.low_rank import LowRank
from edit_cli.report.tables.facts import arrow
from edit_cli.report.tables.run import plain_table
from edit_cli.report.tables.texts import Text
from edit_cli.wording import many, size

SHOWN = 3  # facts of an edit


def adapter_table(parts: Mapping[str, LowRank]) -> RenderableType:
    """A line a matrix: the rank of its factors, and what they miss of the edit."""
    table = plain_table("matrix", "rank", "relative error", right=(1, 2))
    for module, part in parts.items():
        table.add_row(Text(module), f"{part.factors.rank:,}", part.told)
    return table


def edits_table(rows: Sequence[Mapping[str, Any]], every: bool = False) -> RenderableType:
    """A line an edit, with its facts by number: the first ones, or all."""
    if not rows:
        return Text("no saved edits")
    table = plain_table("edit", "id", "kind", "method", "model", "size", "on", "facts", right=(5,))
    for row in rows:
        if row["error"]:
            table.add_row(Text(row["path"]), "", Text(row["error"], style="bold red"))
            continue
        shown = len(row["facts"]) if every else SHOWN
        facts = [f"{number} {arrow(fact)}" for number, fact in enumerate(row["facts"][:shown], 1)]
        if len(row["facts"]) > shown:
            facts.append(f"… {len(row['facts']) - shown:,} more")
        if row["undone"]:
            facts.append(f"without {many(len(row['undone']['revoked']), 'fact')} of {row['undone']['of'][:8]}")
        cells = (row["id"][:8], row["kind"], row["method"] or "–", row["model"], size(row["bytes"]))
        on = row["parent"][:8] if row["parent"] else "–"
        table.add_row(Text(row["path"]), *map(Text, (*cells, on)), Text("\n".join(facts) or "–"))
    return table


def files_table(rows: Sequence[tuple[str, int]]) -> RenderableType:
    """A line a file, with its bytes."""
    table = plain_table("file", "size", right=(1,))
    for name, count in rows:
        table.add_row(Text(name), size(count))
    return table
