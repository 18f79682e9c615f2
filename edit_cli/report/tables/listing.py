"""Lists of what there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType

from edit_cli.metrics.registry import ARROWS, metrics
from edit_cli.report import words
from edit_cli.report.comparison import column, last_side
from edit_cli.report.tables.run import plain_table
from edit_cli.report.tables.texts import Text


def named_list(group: str, rows: Sequence[dict[str, Any]]) -> RenderableType:
    """Options of a group, to be given as `group=NAME`."""
    table = plain_table(f"{group}=", "")
    for row in rows:
        table.add_row(Text(row["name"], style="bold"), Text(row["summary"]))
    return table


def metrics_list(rows: Sequence[dict[str, Any]]) -> RenderableType:
    """Every metric with its unit, the direction of a good edit, and its definition."""
    table = plain_table("metric", "unit", "", "definition")
    for row in rows:
        table.add_row(
            Text(row["id"], style="bold"),
            row["unit"].replace(" ", ""),
            ARROWS[row["better"]],
            Text(row["definition"]),
        )
    return table


def runs_list(rows: Sequence[dict[str, Any]], metric: str | None = None) -> RenderableType:
    """One line a run, with the few numbers that tell runs apart, and another one if it is asked for."""
    if not rows:
        return Text("no runs")
    usual = [name for name in ("score", "token_score") if any(name in row["metrics"] for row in rows)]
    shown = usual if metric is None else [metric, *(name for name in usual if name != metric)]
    heads = list(map(column, shown))
    if len(set(heads)) < len(heads):  # runs on data of several kinds
        heads = [metrics()[name].label for name in shown]
    table = plain_table("run", "status", "day", "cases", *heads, right=tuple(range(3, 4 + len(shown))))
    for row in rows:
        entries = [last_side(row["metrics"].get(name, {})) for name in shown]
        cases = "–" if row["n"] is None else f"{row['n']:,}" + (f", {row['failed']} failed" if row["failed"] else "")
        cells = [words.number(entry["mean"]) if entry else "–" for entry in entries]
        table.add_row(Text(row["path"]), row["status"], (row["started"] or "–")[:10], cases, *cells)
    return table
