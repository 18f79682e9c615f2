"""What a sequential run found: right after each edit and at checkpoints, under names of their own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType

from edit_cli.metrics.sequence import AFTER_EDIT, area, checkpoint_rows, first_collapse, retention_matrix
from edit_cli.report import words
from edit_cli.report.comparison import column, in_a_line, meaning, right_aligned, shown_metrics
from edit_cli.report.summary import summary_of, total_seconds
from edit_cli.report.tables.run import MetricsTable, footer, general_ability, heading, prose
from edit_cli.report.tables.texts import Text
from edit_cli.wording import many

# what is told of held-out records: the first that there is
UNTOUCHED = ("neighborhood_success", "locality_token_accuracy")
EARLY = ("efficacy_success", "efficacy_token_accuracy")  # and of the first facts

Line = Mapping[str, Any]


def sequential_summary(
    manifest: Mapping[str, Any],
    lines: Sequence[Line],
    references: Mapping[str, Sequence[str]] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """summary.json of a sequential run.

    metrics: {id: {"before", "after_edit", "at_end"}}: of the unedited model; of each fact right after its own step; of
    all facts (or the sample) with all edits in place. checkpoints: see `metrics.sequence`. collapse: where the model
    was first found destroyed, stopped: whether that ended the run. area: under the curve of the successes. cost:
    [[facts, seconds a fact]] by step.
    """
    own = [line for line in lines if line["when"] == AFTER_EDIT]
    protocol = manifest["config"]["protocol"]
    summary = summary_of(manifest, own, references)
    rows = checkpoint_rows(lines, protocol.get("first", 0), references)
    at_end = rows[-1]["metrics"] if rows else {}
    metrics = {}
    for name, sides in ({name: {} for name in at_end} | summary["metrics"]).items():
        moments = {"before": sides.get("before"), AFTER_EDIT: sides.get("after"), "at_end": at_end.get(name)}
        metrics[name] = {moment: entry for moment, entry in moments.items() if entry}
    collapsed = first_collapse(
        rows, lines, protocol.get("collapse_below", 0.0), protocol.get("collapse_perplexity", float("inf"))
    )
    return {
        **summary,
        "metrics": metrics,
        "checkpoints": rows,
        "forgetting": rows[-1]["forgetting"] if rows else {},
        "retention": retention_matrix(lines),
        "area": area(rows),
        "collapse": collapsed,
        "stopped": bool(collapsed and protocol.get("stop_on_collapse")),
        "cost": cost(own),
        "seconds": total_seconds(lines, seconds),
    }


def cost(own: Sequence[Line]) -> list[tuple[int, float]]:
    """(facts so far, seconds a fact) of each step that edited anything."""
    steps: dict[int, list[float]] = defaultdict(list)
    for line in own:
        if line["seconds"] is not None:
            steps[line["edits"]].append(line["seconds"])
    return [(edits, sum(each) / len(each)) for edits, each in sorted(steps.items())]


def sequential_table(summary: Mapping[str, Any]) -> RenderableType:
    """Three moments of every fact, and the way there."""
    parts: list[RenderableType] = [heading(summary)]
    if summary["collapse"]:
        parts.append(Text(collapse_line(summary), style="bold red"))
    parts += [Text(), MetricsTable(summary["metrics"], ("before", AFTER_EDIT, "at_end")), Text()]
    if summary["checkpoints"]:
        parts += [
            Text(f"WITH MORE AND MORE EDITS: {_again(summary)} asked again", style="bold"),
            checkpoints(summary),
            Text(),
        ]
    return Group(*parts, *general_ability(summary), *footer(summary), prose(NOTE))


NOTE = (
    "after edit: each fact right after its own step; at end: all facts, or the sample of them, with all edits in place."
)


def _again(summary: Mapping[str, Any]) -> str:
    """Which facts the checkpoints ask about."""
    asked = [row["asked"] for row in summary["checkpoints"] if row["asked"] < row["edits"]]
    return f"the facts so far, {max(asked):,} of them at most," if asked else "all facts so far,"


def collapse_line(summary: Mapping[str, Any]) -> str:
    """Where the model was found destroyed, and what came of it."""
    found = summary["collapse"]
    end = (
        "the run was stopped there"
        if summary["stopped"]
        else "the run went on (protocol.stop_on_collapse=true would have ended it)"
    )
    return f"COLLAPSED by {many(found['edits'], 'fact')}: {found['reason']}; {end}"


def checkpoints(summary: Mapping[str, Any]) -> RenderableType:
    """One line a checkpoint."""
    heads, rows, told = checkpoint_columns(summary)
    table = right_aligned(*heads)
    for row in rows:
        table.add_row(*row)
    return Group(table, prose(told))


def checkpoint_columns(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """(headings, a row a checkpoint, what the headings mean)."""
    rows = summary["checkpoints"]
    shown = shown_metrics({name for row in rows for name in row["metrics"]})
    shown = [name for name in shown if name not in ("score", "token_score")]
    more, cells = _more(rows), []
    for row in rows:
        means = [row["metrics"].get(name) for name in shown]
        numbers = [words.number(entry["mean"]) if entry else "–" for entry in means]
        cells.append([f"{row['edits']:,}", *numbers, *(words.number(each[row["edits"]]) for each in more.values())])
    return ["facts", *map(column, shown), *more], cells, meaning(shown, *more)


def _more(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float | None]]:
    """{heading: {facts: value}} of what only sequences have."""
    first = next((name for name in EARLY if any(name in row["first"] for row in rows)), None)
    untouched = next((name for name in UNTOUCHED if any(name in row["held_out"] for row in rows)), None)
    columns = {
        "first": {row["edits"]: row["first"].get(first, {}).get("mean") for row in rows} if first else {},
        "held out": (
            {row["edits"]: row["held_out"].get(untouched, {}).get("after", {}).get("mean") for row in rows}
            if untouched
            else {}
        ),
        "drift": {row["edits"]: drift * 100 for row in rows if (drift := row["model"].get("drift")) is not None},
    }
    return {name: values for name, values in columns.items() if len(values) == len(rows)}


def told(row: Mapping[str, Any]) -> str:
    """A checkpoint in a line, while the run goes on."""
    shown = [name for name in shown_metrics(row["metrics"]) if name not in ("score", "token_score")]
    means = [f"{in_a_line(name)} {words.number(row['metrics'][name]['mean'])}" for name in shown]
    return f"after {row['edits']:,} fact{'s' if row['edits'] != 1 else ''}: {', '.join(means)}"


def curve_series(summary: Mapping[str, Any]) -> dict[str, list[tuple[int, Mapping[str, Any]]]]:
    """{name of a curve: [(facts, entry)]}, for those that are shares."""
    rows = summary["checkpoints"]
    measured = {name for row in rows for name in row["metrics"]}
    names = [name for name in shown_metrics(measured) if name not in ("perplexity", "score", "token_score")]
    series = {
        in_a_line(name): [(row["edits"], row["metrics"][name]) for row in rows if name in row["metrics"]]
        for name in names
    }
    for name, group, wanted in (("first", "first", EARLY), ("held out", "held_out", UNTOUCHED)):
        entries = [
            (row["edits"], next((row[group][metric] for metric in wanted if metric in row[group]), None))
            for row in rows
        ]
        series[name] = [(edits, entry.get("after", entry)) for edits, entry in entries if entry]
    return {name: points for name, points in series.items() if points}
