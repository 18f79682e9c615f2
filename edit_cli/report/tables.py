"""Tables of one run, from its summary.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edit_cli.metrics.registry import METRICS
from edit_cli.report import words

FOOTNOTE = (
    "Success compares the likelihoods of two given answers; accuracy and the free-running rows tell what the model says. "
    "[low, high]: 95 % interval of the mean over facts. ↑ higher is better, ↓ lower."
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


def metrics_table(metrics: Mapping[str, Any]) -> RenderableType:
    """Metrics before → after with their intervals, teacher-forced and free-running ones apart."""
    if not metrics:
        return Text("No case went through, so there is nothing to measure.")
    table = plain_table("", "before", "after", "what it tells", right=(1, 2))
    table.columns[0].ratio, table.columns[3].ratio = None, 1
    table.columns[0].min_width = 20
    for section in words.SECTIONS:
        rows = [name for name in metrics if words.section(name) == section]
        if not rows:
            continue
        if table.row_count:
            table.add_section()
        table.add_row(Text(section.partition(":")[0], style="bold"), "", "", Text(section.partition(": ")[2], style="dim"))
        for name in rows:
            sides = metrics[name]
            table.add_row(
                words.label(METRICS[name]),
                words.with_interval(sides.get("before")),
                Text(words.with_interval(sides.get("after")), style="bold"),
                Text(words.plain(name), style="dim"),
            )
    return table


def footer(summary: Mapping[str, Any]) -> list[RenderableType]:
    """What it cost, and how to read the numbers."""
    cost = f"Time per edit {words.seconds(summary['seconds_per_edit'])}, statistics not counted. Seconds: {words.phases(summary['seconds'])}."
    return [Text(cost), Text(FOOTNOTE, style="dim")]
