"""The few numbers that tell runs, or moments of one run, apart, side by side."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table

from edit_cli.metrics.registry import SME, of_plugins
from edit_cli.report import words
from edit_cli.report.tables.run import plain_table, prose
from edit_cli.report.tables.texts import Text

SHOWN = {
    "efficacy_success": "edited",
    "paraphrase_success": "reworded",
    "neighborhood_success": "others",
    "score": "score",
    "efficacy_token_accuracy": "edited",
    "paraphrase_token_accuracy": "reworded",
    "locality_token_accuracy": "unrelated",
    "token_score": "score",
    "efficacy_generated_contains": "writes",
    "neighborhood_generated_unchanged": "same",
    "perplexity": "ppl",
    **{metric.id: metric.label for metric in SME.values()},
}
LOST = {  # of the data of trained editors: shown beside the others where runs are compared
    "locality_random_drawdown": "DD",
    "locality_same_relation_drawdown": "DD rel",
    "locality_same_subject_drawdown": "DD subj",
    "convsent_es": "ConvSent",
}
DISPENSABLE = ("token_score", "score", "perplexity", "efficacy_generated_contains", "neighborhood_generated_unchanged")
RATED = {  # what success, or token accuracy, is told of
    "edited": "the edited prompts",
    "reworded": "the same in other words",
    "others": "other subjects, which must keep their answers",
    "unrelated": "unrelated prompts, which must keep their answers",
}
TELLS = {
    "score": "harmonic mean of these",
    "writes": "its own reply holds the new answer",
    "same": "of other subjects it writes what it wrote before",
    "ppl": "perplexity of plain text, lower is better",
    "held out": "success on records that were never edited",
    "DD": "drawdown, points of accuracy lost on other subjects and matters",
    "DD rel": "on the same relation of other subjects",
    "DD subj": "on other matters about the same subject",
    "ConvSent": "ES of its replies, in %",
    "SR": "mistakes put right, in %",
    "GR": "their other wordings",
    "ER": "all edited prompts at the end",
    "TrainR": "accuracy on training records over that before",
    "TestR": "on test records",
    "first": "success on the first facts of all",
    "drift": "by how much, in %, the last state of untouched prompts has moved",
    "s/edit": "seconds",
    "cases": "98/100 means that 2 failed",
}


def legend(metrics: Collection[str], *others: str) -> RenderableType:
    """What the columns of a table mean: those of `metrics`, and others by their headings."""
    return prose(meaning(metrics, *others))


def meaning(metrics: Collection[str], *others: str) -> str:
    """As `legend`, in sentences."""
    named, own = [*map(_column, metrics), *others], of_plugins()
    rated = "; ".join(f"{name}, {RATED[name]}" for name in named if name in RATED)
    measure = "Token accuracy" if any(metric.endswith("token_accuracy") for metric in metrics) else "Success"
    told = [f"{measure} in % on: {rated}"] if rated else []
    told += [f"{name}: {TELLS[name]}" for name in named if name in TELLS]
    told += [f"{own[metric].label}: {own[metric].definition}" for metric in metrics if metric in own]
    return ". ".join(told) + "."


def _column(metric: str) -> str:
    """The heading of a metric's column."""
    own = of_plugins()
    return own[metric].label if metric in own else (SHOWN | LOST)[metric]


def shown_metrics(measured: Collection[str]) -> list[str]:
    """Those of the measured metrics that have a column; token accuracies only where whole answers are not compared."""
    hidden = {"efficacy_token_accuracy", "paraphrase_token_accuracy"} if "efficacy_success" in measured else set()
    return [metric for metric in SHOWN if metric in measured and metric not in hidden]


def right_aligned(*names: str) -> Table:
    """A narrow table whose first column is text and whose others are numbers."""
    table = plain_table(*names, right=tuple(range(1, len(names))))
    table.padding = (0, 0)
    return table


@dataclass
class Comparison:
    """One line a run, from (what tells it apart, its summary): means at the end. A run without a summary failed.

    Where the screen is too narrow for names and numbers in one line each, the columns of `DISPENSABLE` are left out
    first.
    """

    rows: Sequence[tuple[str, Mapping[str, Any] | None]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        measured = {metric for _, summary in self.rows if summary for metric in summary["metrics"]}
        shown = [*shown_metrics(measured), *(metric for metric in (*LOST, *of_plugins()) if metric in measured)]
        spare = [metric for metric in DISPENSABLE if metric in shown]
        while (
            spare
            and Measurement.get(console, options.update(width=1000), self._table(shown)).maximum > options.max_width
        ):
            shown.remove(spare.pop(0))
        yield self._table(shown)
        yield legend(shown, "s/edit", "cases")

    def _table(self, shown: Sequence[str]) -> Table:
        table = right_aligned("run", *map(_column, shown), "s/edit", "cases")
        for name, summary in self.rows:
            table.add_row(Text(name), *(_cells(summary, shown) if summary else ["failed", *[""] * (len(shown) + 1)]))
        return table


def last_side(sides: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The entry that tells how the model was in the end."""
    return sides.get("at_end") or sides.get("after")


def _cells(summary: Mapping[str, Any], shown: Sequence[str]) -> list[str]:
    means = [last_side(summary["metrics"].get(metric, {})) for metric in shown]
    cells = [words.number(entry["mean"]) if entry else "–" for entry in means]
    scored = summary["n"] - summary["failed"]
    spent = summary["seconds_per_edit"]
    cases = f"{scored:,}/{summary['n']:,}" if summary["failed"] else f"{scored:,}"
    return [*cells, "–" if spent is None else f"{spent:.2f}", cases]


def short(value: Any) -> str:
    """A setting in a few characters: a list by its ends."""
    if isinstance(value, list) and value:
        return f"{value[0]}–{value[-1]}" if len(value) > 1 else str(value[0])
    return str(value)
