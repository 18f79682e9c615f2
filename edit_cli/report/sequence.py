"""What a sequential run found: right after each edit and at checkpoints, under names of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from edit_cli.metrics.summarise import summarise
from edit_cli.report import words
from edit_cli.report.comparison import SHOWN, legend, right_aligned, shown_metrics
from edit_cli.report.summary import summary_of, total_seconds
from edit_cli.report.tables import MetricsTable, footer, heading

AFTER_EDIT, CHECKPOINT, HELD_OUT = "after_edit", "checkpoint", "held_out"  # values of a line's `when`
UNTOUCHED = "neighborhood_success"

Line = Mapping[str, Any]


def sequential_summary(
    manifest: Mapping[str, Any],
    lines: Sequence[Line],
    references: Mapping[str, Sequence[str]] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """summary.json of a sequential run.

    metrics: {id: {"before", "after_edit", "at_end"}}: of the unedited model; of each fact right after its own step; of all facts
    (or the sample) with all edits in place. checkpoints: the same and the held-out records' after each number of facts.
    """
    own = [line for line in lines if line["when"] == AFTER_EDIT]
    before = {line["case_id"]: line["before"] for line in own}
    summary = summary_of(manifest, own, references)
    checkpoints = []
    for edits in sorted({line["edits"] for line in lines if line["when"] == CHECKPOINT}):
        now = [line for line in lines if line["edits"] == edits and line["when"] == CHECKPOINT]
        held_out = [line for line in lines if line["edits"] == edits and line["when"] == HELD_OUT]
        metrics = summarise([{**line, "before": before.get(line["case_id"])} for line in now], references)
        checkpoints.append(
            {
                "edits": edits,
                "asked": len(now),
                "metrics": {name: sides["after"] for name, sides in metrics.items() if "after" in sides},
                "held_out": {name: dict(sides) for name, sides in summarise(held_out).items()} if held_out else {},
            }
        )
    at_end = checkpoints[-1]["metrics"] if checkpoints else {}
    metrics = {}
    for name, sides in ({name: {} for name in at_end} | summary["metrics"]).items():
        moments = {"before": sides.get("before"), AFTER_EDIT: sides.get("after"), "at_end": at_end.get(name)}
        metrics[name] = {moment: entry for moment, entry in moments.items() if entry}
    return {**summary, "metrics": metrics, "checkpoints": checkpoints, "seconds": total_seconds(lines, seconds)}


def sequential_table(summary: Mapping[str, Any]) -> RenderableType:
    """Three moments of every fact, and the way there."""
    parts: list[RenderableType] = [heading(summary), Text(), MetricsTable(summary["metrics"], ("before", AFTER_EDIT, "at_end")), Text()]
    if summary["checkpoints"]:
        parts += [Text("WITH MORE AND MORE EDITS: all facts so far, asked again", style="bold"), checkpoints(summary), Text()]
    return Group(*parts, *footer(summary), Text(NOTE, style="dim"))


NOTE = (
    "after edit: each fact right after its own step; at end: all facts with all edits in place."
)


def checkpoints(summary: Mapping[str, Any]) -> RenderableType:
    """One line a checkpoint."""
    rows = summary["checkpoints"]
    shown = shown_metrics({name for row in rows for name in row["metrics"]})
    shown = [name for name in shown if name not in ("score", "token_score")]
    held_out = next((name for name in (UNTOUCHED, "locality_token_accuracy") if any(name in row["held_out"] for row in rows)), None)
    table = right_aligned("facts", *(SHOWN[name] for name in shown), *(["held out"] if held_out else []))
    for row in rows:
        means = [row["metrics"].get(name) for name in shown] + ([row["held_out"].get(held_out, {}).get("after")] if held_out else [])
        table.add_row(f"{row['edits']:,}", *(words.number(entry["mean"]) if entry else "–" for entry in means))
    return Group(table, legend(shown, *(["held out"] if held_out else [])))


def curve_series(summary: Mapping[str, Any]) -> dict[str, list[tuple[int, Mapping[str, Any]]]]:
    """{name of a curve: [(facts, entry)]}, for those that are shares."""
    rows = summary["checkpoints"]
    measured = {name for row in rows for name in row["metrics"]}
    names = [name for name in shown_metrics(measured) if name not in ("perplexity", "score", "token_score")]
    series = {SHOWN[name]: [(row["edits"], row["metrics"][name]) for row in rows if name in row["metrics"]] for name in names}
    held_out = [(row["edits"], row["held_out"][UNTOUCHED]["after"]) for row in rows if "after" in row["held_out"].get(UNTOUCHED, {})]
    return series | ({"held out": held_out} if held_out else {})
