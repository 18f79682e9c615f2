"""Several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from edit_cli.metrics.registry import METRICS
from edit_cli.report import words
from edit_cli.report.tables import plain_table

if TYPE_CHECKING:
    from edit_cli.results import RunRecord

SHOWN = {
    "score": "score",
    "token_score": "score",
    "efficacy_success": "efficacy success",
    "paraphrase_success": "paraphrase success",
    "neighborhood_success": "neighb. success",
    "efficacy_token_accuracy": "efficacy tokens",
    "paraphrase_token_accuracy": "paraphrase tokens",
    "locality_token_accuracy": "locality tokens",
    "efficacy_generated_contains": "it says it",
    "neighborhood_generated_unchanged": "others same",
    "perplexity": "perplexity",
}


def comparison(rows: Sequence[tuple[str, RunRecord | None]]) -> RenderableType:
    """One line a run: means after the edit, by what tells the runs apart."""
    summaries = [(name, None if record is None else record.summary) for name, record in rows]
    measured = {metric for _, summary in summaries if summary for metric in summary.get("metrics", {})}
    shown = [metric for metric in SHOWN if metric in measured]
    table = plain_table("run", *(f"{SHOWN[metric]} {words.ARROWS[METRICS[metric].better]}" for metric in shown), "time per edit", "cases")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, summary in summaries:
        table.add_row(Text(name), *(_cells(summary, shown) if summary else ["failed", *[""] * (len(shown) + 1)]))
    return table


def _cells(summary: dict[str, Any], shown: Sequence[str]) -> list[str]:
    means = [summary["metrics"].get(metric, {}).get("after") for metric in shown]
    failed = f", {summary['failed']} failed" if summary["failed"] else ""
    cells = [words.number(entry["mean"]) if entry else "–" for entry in means]
    return [*cells, words.seconds(summary["seconds_per_edit"]), f"{summary['n']:,}{failed}"]
