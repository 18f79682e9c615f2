"""The few numbers that tell runs, or moments of one run, apart, side by side."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table

from edit_cli.metrics.registry import SME, of_plugins
from edit_cli.metrics.registry import metrics as registered
from edit_cli.report import words
from edit_cli.report.tables.run import plain_table, prose
from edit_cli.report.tables.texts import Text

COMPARED = (
    "efficacy_success",
    "paraphrase_success",
    "neighborhood_success",
    "score",
    "efficacy_token_accuracy",
    "paraphrase_token_accuracy",
    "locality_token_accuracy",
    "token_score",
    "efficacy_generated_contains",
    "paraphrase_generated_contains",
    "neighborhood_generated_unchanged",
    "locality_generated_unchanged",
    "perplexity",
    *SME,
)
# of the data of trained editors: shown beside the others where runs are compared
LOST = (
    "locality_random_drawdown",
    "locality_same_relation_drawdown",
    "locality_same_subject_drawdown",
    "convsent_es",
)
RATED = {"success": "Success", "token_accuracy": "Token accuracy"}  # measures whose legends are told together
DISPENSABLE = ("token_score", "score", "perplexity")
TELLS = {  # of columns that are no metrics
    "held out": "success on records that were never edited",
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
    known, own = registered(), of_plugins()
    named = [known[metric] for metric in metrics]
    told = []
    for measure, title in RATED.items():
        rated = [f"{in_a_line(one.id)}, {one.legend}" for one in named if one.measure == measure]
        told += [f"{title} in % on: {'; '.join(rated)}"] if rated else []
    told += [f"{in_a_line(one.id)}: {one.legend}" for one in named if one.legend and one.measure not in RATED]
    told += [f"{name}: {TELLS[name]}" for name in others]
    told += [f"{one.label}: {one.definition}" for one in named if one.id in own and not one.legend]
    return ". ".join(told) + "."


def column(metric: str) -> str:
    """The heading of a metric's column, in few letters a line."""
    found = registered()[metric]
    return found.heading or found.label


def in_a_line(metric: str) -> str:
    """The same where there is no table."""
    return unbroken(column(metric))


def unbroken(heading: str) -> str:
    """A heading in one line; words that were parted are whole again."""
    return heading.replace("-\n", "").replace("\n", " ")


def shown_metrics(measured: Collection[str]) -> list[str]:
    """Those of the measured metrics that have a column; token accuracies only where whole answers are not compared."""
    hidden = {"efficacy_token_accuracy", "paraphrase_token_accuracy"} if "efficacy_success" in measured else set()
    return [metric for metric in COMPARED if metric in measured and metric not in hidden]


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
        table = right_aligned("run", *map(column, shown), "s/edit", "cases")
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
