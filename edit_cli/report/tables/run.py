"""Tables of one run, from its summary.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.table import Table

from edit_cli.metrics.registry import Metric, metrics
from edit_cli.report import words
from edit_cli.report.tables.texts import Text
from edit_cli.wording import many

PROSE = 100  # columns of a note
WIDEST_LABEL = 34  # columns that labels, and what stands between columns, may take
LEAST = 15  # columns that explanations need
FOOTNOTE = (
    "Success compares the likelihoods of two given answers; accuracy and the free-running rows tell what the model"
    " says. P: probability of an answer. n: facts that a mean is over. [low, high]: its 95 % interval. ↑: higher is"
    " better, ↓: lower is."
)


def prose(text: str) -> RenderableType:
    """A note in sentences, in lines that can be read however wide the screen is."""
    return Constrain(Text(text, style="dim"), PROSE)


def plain_table(*headings: str, right: tuple[int, ...] = ()) -> Table:
    """The one look of all tables."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(
            heading, justify="right" if index in right else "left", overflow="fold", no_wrap=index in right
        )
    return table


def evaluation(summary: Mapping[str, Any]) -> RenderableType:
    """What was edited and how, every metric before and after, what it cost."""
    below = [*general_ability(summary), *footer(summary)]
    return Group(heading(summary), Text(), *metrics_of(summary), Text(), *below)


FLIPS = (
    "change: after minus before over the same items, its 95 % interval and p-value (swapping items). lost: items that"
    " went from right to wrong; gained: from wrong to right."
)


def general_ability(summary: Mapping[str, Any]) -> list[RenderableType]:
    """A row a downstream task and metric, at every number of edited facts; nothing where no tasks were asked."""
    states = summary.get("downstream") or []
    if not states:
        return []
    table = plain_table(
        "task", "facts", "n", "before", "after", "change", "p", "lost", "gained", right=tuple(range(1, 9))
    )
    for state in states:
        for name, by_metric in state["tasks"].items():
            for metric, found in by_metric.items():
                digits = 1 if found["share"] else 3
                change = "–" if found["change"] is None else f"{found['change']:+.{digits}f}"
                if found["ci95"] is not None:
                    change += " [{:+.{d}f}, {:+.{d}f}]".format(*found["ci95"], d=digits)
                table.add_row(
                    f"{name}, {metric}" + (", %" if found["share"] else ""),
                    f"{state['edits']:,}",
                    f"{found['n']:,}",
                    *(f"{found[side]:.{digits}f}" for side in ("before", "after")),
                    change,
                    "–" if found["p"] is None else f"{found['p']:.3f}",
                    *("–" if found[side] is None else f"{found[side]:,}" for side in ("lost", "gained")),
                )
    return [Text("GENERAL ABILITY: tasks of lm-evaluation-harness", style="bold"), table, Text(), prose(FLIPS), Text()]


def metrics_of(summary: Mapping[str, Any]) -> list[RenderableType]:
    """Every metric before and after; of a run that asks in several forms, those of all forms side by side, and below
    them what tells of the model as a whole.
    """
    forms, means = summary.get("asked"), summary["metrics"]
    if not forms:
        return [MetricsTable(means)]
    sides = {f"{form} {side}": (form, side) for form in forms for side in ("before", "after")}
    told = {
        name: {named: forms[form][name][side] for named, (form, side) in sides.items() if side in forms[form][name]}
        for name in means
        if all(name in found for found in forms.values())
    }
    rest = {name: entry for name, entry in means.items() if name not in told}
    below: list[RenderableType] = [Text(), MetricsTable(rest)] if rest else []
    return [MetricsTable(told, list(sides)), *below]


def heading(summary: Mapping[str, Any]) -> Text:
    """Method, model, number of facts, records, protocol."""
    protocol, dataset = summary["protocol"], summary["dataset"]
    facts = f"{many(summary['edits'], 'fact')} edited" + (
        "" if summary["edits"] == 1 else f", {words.batches(protocol)}"
    )
    lines = [
        (f"{summary['method']} on {summary['model']}: {facts}", "bold"),
        (f"Data: {dataset['name']} ({dataset['source']}), {words.records(dataset)}", ""),
        (words.asked(protocol), ""),
    ]
    if dataset.get("forms"):
        lines.append((words.forms(dataset["forms"]), ""))
    if summary["edits"] != 1:
        lines.append((words.answers(protocol), ""))
    if summary["n"] < dataset["records_selected"] and not summary.get("stopped"):
        lines.append((f"UNFINISHED: {summary['n']:,} of {dataset['records_selected']:,} cases so far", "bold yellow"))
    if summary["failed"]:
        lines.append(
            (f"{summary['failed']:,} of {many(summary['n'], 'case')} FAILED, left out of the means", "bold red")
        )
    text = Text()
    for index, (line, style) in enumerate(lines):
        text.append(("\n" if index else "") + line, style)
    return text


@dataclass(frozen=True)
class MetricsTable:
    """Means with intervals on each of `sides`, teacher-forced and free-running ones apart; explained where there is
    room.
    """

    metrics: Mapping[str, Any]
    sides: Sequence[str] = ("before", "after")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found, known = words.sections(self.metrics), metrics()
        if not found:
            yield Text("No case went through, so there is nothing to measure.")
            return
        cells = self._cells(known, words.with_interval)
        wide = sum(max(len(row[side]) for row in cells.values()) for side in range(len(self.sides)))
        if len(self.sides) > 2 and wide > options.max_width - WIDEST_LABEL:
            cells = self._cells(known, words.mean)  # several columns find room without their intervals
        rows = [row for _, groups in found for _, rows in groups for row in rows]
        named = [side.replace("_", " ") for side in self.sides]
        told = [(title, [(where, some, *self._counted(some)) for where, some in groups]) for title, groups in found]
        label = max(len(name) for _, groups in told for *_, labels in groups for name in labels)
        widths = [max(len(side), *(len(cells[row.id][index]) for row in rows)) for index, side in enumerate(named)]
        explained = options.max_width - (label + 2 + sum(widths) + len(widths) + 1) >= LEAST
        yield _grid([("", *named, "")], label, widths, "dim")
        for title, groups in told:
            yield Text(title + "".join(n for where, _, n, _ in groups if not where), style="bold")
            for where, some, n, labels in groups:
                if where:
                    yield Text(f" {where}{n}", style="italic")
                yield _grid(
                    [
                        (name, *cells[row.id], row.explained if explained else "")
                        for row, name in zip(some, labels, strict=True)
                    ],
                    label,
                    widths,
                )

    def _cells(self, known: Mapping[str, Metric], told: Callable[[Any, int], str]) -> dict[str, list[str]]:
        """{metric: a cell of each side}."""
        return {
            name: [told(entry.get(side), known[name].decimals) for side in self.sides]
            for name, entry in self.metrics.items()
        }

    def _counted(self, rows: Sequence[Metric]) -> tuple[str, list[str]]:
        """(how many facts the means of these rows are over, their labels): a row of another number says so."""
        counts = {row.id: words.counted([self._told(row.id)]) for row in rows if row.id != "perplexity"}  # of one model
        usual = Counter(counts.values()).most_common(1)[0][0] if counts else ""
        others = {metric: f" ({n})" for metric, n in counts.items() if n != usual}
        return f", {usual}" if usual else "", [row.named + others.get(row.id, "") for row in rows]

    def _told(self, metric: str) -> dict[str, Any]:
        """{side: entry}"""
        return {side: entry for side in self.sides if (entry := self.metrics[metric].get(side))}


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
    each, spent = words.seconds(summary["seconds_per_edit"]), words.phases(summary["seconds"])
    by = f" by {summary['processes']} processes" if summary.get("processes", 1) > 1 else ""
    about = [prose(summary["diagnosis"])] if summary.get("diagnosis") else []
    return [*about, prose(f"Time per edit {each}{by}, statistics not counted. Seconds: {spent}."), prose(FOOTNOTE)]
