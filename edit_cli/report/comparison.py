"""The few numbers that tell runs, or moments of one run, apart, side by side."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edit_cli.report import words
from edit_cli.report.tables import plain_table

if TYPE_CHECKING:
    from edit_cli.results import RunRecord

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
}
LEGEND = (
    "%: edited, reworded, others, unrelated: {rated} with the edits in place (others and unrelated must stay near 100 or where they were). "
    "writes: its own reply holds the new answer. same: of others it writes what it wrote before. ppl: perplexity of plain text, lower is better."
)


def legend(metrics: Collection[str]) -> Text:
    """What the columns of these tables mean."""
    return Text(LEGEND.format(rated="success" if "efficacy_success" in metrics else "token accuracy"), style="dim")


def shown_metrics(measured: Collection[str]) -> list[str]:
    """Those of the measured metrics that have a column; token accuracies only where whole answers are not compared."""
    hidden = {"efficacy_token_accuracy", "paraphrase_token_accuracy"} if "efficacy_success" in measured else set()
    return [metric for metric in SHOWN if metric in measured and metric not in hidden]


def right_aligned(*names: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    return plain_table(*names, right=tuple(range(1, len(names))))


def comparison(rows: Sequence[tuple[str, RunRecord | None]]) -> RenderableType:
    """One line a run: means at the end, by what tells the runs apart."""
    summaries = [(name, None if record is None else record.summary) for name, record in rows]
    shown = shown_metrics({metric for _, summary in summaries if summary for metric in summary.get("metrics", {})})
    table = right_aligned("run", *(SHOWN[metric] for metric in shown), "per edit", "cases")
    for name, summary in summaries:
        table.add_row(Text(name), *(_cells(summary, shown) if summary else ["failed", *[""] * (len(shown) + 1)]))
    return Group(table, legend(shown))


def last_side(sides: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The entry that tells how the model was in the end."""
    return sides.get("at_end") or sides.get("after")


def _cells(summary: Mapping[str, Any], shown: Sequence[str]) -> list[str]:
    means = [last_side(summary["metrics"].get(metric, {})) for metric in shown]
    failed = f", {summary['failed']} failed" if summary["failed"] else ""
    cells = [words.number(entry["mean"]) if entry else "–" for entry in means]
    return [*cells, words.seconds(summary["seconds_per_edit"]), f"{summary['n']:,}{failed}"]
