"""Tables of one run, from its summary.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edit_cli.metrics.registry import METRICS
from edit_cli.report import words

FOOTNOTE = (
    "Success compares the likelihoods of two given answers; accuracy and the free-running rows tell what the model says. "
    "[low, high]: 95 % interval of the mean over facts. ↑: higher is better, ↓: lower is."
)


def plain_table(*headings: str, right: tuple[int, ...] = ()) -> Table:
    """The one look of all tables."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index in right else "left", overflow="fold")
    return table


def evaluation(summary: Mapping[str, Any]) -> RenderableType:
    """What was edited and how, every metric before and after, what it cost."""
    return Group(heading(summary), Text(), metrics_table(summary["metrics"]), Text(), *footer(summary))


def heading(summary: Mapping[str, Any]) -> Text:
    """Method, model, number of facts, records, protocol."""
    protocol, dataset = summary["protocol"], summary["dataset"]
    facts = f"{summary['edits']:,} fact{'' if summary['edits'] == 1 else 's'}"
    lines = [
        (f"{summary['method']} on {summary['model']}: {facts} edited, {words.batches(protocol)}", "bold"),
        (f"Data: {dataset['name']} ({dataset['source']}), {words.records(dataset)}", ""),
        (words.asked(protocol), ""),
    ]
    if protocol.get("order_seed") is not None:
        lines.append((f"Order of the facts: shuffled with seed {protocol['order_seed']}", ""))
    if summary["n"] < dataset["records_selected"]:
        lines.append((f"UNFINISHED: {summary['n']:,} of {dataset['records_selected']:,} cases so far", "bold yellow"))
    if summary["failed"]:
        lines.append((f"{summary['failed']:,} of {summary['n']:,} cases FAILED and are left out of the means", "bold red"))
    text = Text()
    for index, (line, style) in enumerate(lines):
        text.append(("\n" if index else "") + line, style)
    return text


def metrics_table(metrics: Mapping[str, Any], sides: Sequence[str] = ("before", "after")) -> RenderableType:
    """Means with intervals on each of `sides`, teacher-forced and free-running ones apart."""
    found = words.sections(metrics)
    if not found:
        return Text("No case went through, so there is nothing to measure.")
    cells = {name: [words.with_interval(entry.get(side)) for side in sides] for name, entry in metrics.items()}
    labels = [row.label for _, groups in found for _, rows in groups for row in rows]
    widths = [max(len(side), *(len(row[index]) for row in cells.values())) for index, side in enumerate(sides)]
    parts: list[RenderableType] = [_grid([("", *sides, "")], max(map(len, labels)), widths, "dim")]
    for title, groups in found:
        parts.append(Text(title, style="bold"))
        for where, rows in groups:
            parts += [Text(f" {where}", style="italic")] if where else []
            parts.append(_grid([(row.label, *cells[row.metric], row.tells) for row in rows], max(map(len, labels)), widths))
    return Group(*parts)


def _grid(rows: Sequence[tuple[str, ...]], label: int, widths: Sequence[int], style: str = "") -> Table:
    """Rows of label, values, explanation, in the same columns in every group."""
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=label + 2)
    for index, width in enumerate(widths):
        table.add_column(justify="right", width=width, style=style or ("bold" if index == len(widths) - 1 else ""))
    table.add_column(style="dim")
    for name, *cells in rows:
        table.add_row(f"  {name}", *cells)
    return table


def footer(summary: Mapping[str, Any]) -> list[RenderableType]:
    """What it cost, and how to read the numbers."""
    cost = f"Time per edit {words.seconds(summary['seconds_per_edit'])}, statistics not counted. Seconds: {words.phases(summary['seconds'])}."
    return [Text(cost), Text(FOOTNOTE, style="dim")]
