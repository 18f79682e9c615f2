"""How each kind of run is told: its summary, its table and its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from edit_cli.errors import MissingError
from edit_cli.report import learning, memories, sme, tuning
from edit_cli.report.figures import curves, heatmap
from edit_cli.report.figures import memories as memories_figure
from edit_cli.report.sequence import sequential_summary, sequential_table
from edit_cli.report.summary import summary_of
from edit_cli.report.tables.facts import before_and_after
from edit_cli.report.tables.run import evaluation
from edit_cli.report.trace import trace_summary, trace_table
from edit_cli.runs.format import kind_of
from edit_cli.runs.record import RunRecord

Line = dict[str, Any]
Summary = dict[str, Any]
Table = Callable[[Summary], RenderableType]


@dataclass(frozen=True)
class Report:
    """summary: of (manifest, lines, references, seconds by phase); but for the manifest and the lines, each may be
    missing. table: of (summary, lines). draw: of (summary, directory); writes figures and returns their names, without
    suffix.
    """

    summary: Callable[..., Summary]
    table: Callable[[Summary, Sequence[Line]], RenderableType]
    draw: Callable[[Summary, Path], list[str]] = lambda summary, directory: []


def _without_lines(table: Table) -> Callable[[Summary, Sequence[Line]], RenderableType]:
    return lambda summary, lines: table(summary)


REPORTS = {
    "edit": Report(summary_of, before_and_after),
    "evaluate": Report(summary_of, _without_lines(evaluation)),
    "sequential": Report(sequential_summary, _without_lines(sequential_table), curves.draw),
    "sme": Report(sme.sme_summary, _without_lines(sme.sme_table), sme.draw),
    "trace": Report(trace_summary, _without_lines(trace_table), heatmap.draw),
    "inspect": Report(memories.summary_of, _without_lines(memories.table), memories_figure.draw),
    "train-editor": Report(learning.summary_of, _without_lines(learning.table), learning.draw),
    "tune": Report(tuning.summary_of, _without_lines(tuning.table), tuning.draw),
}


def report_of(manifest: Mapping[str, Any]) -> Report:
    """That of the kind of run which the manifest is of."""
    return REPORTS[kind_of(manifest)]


def summary_so_far(record: RunRecord) -> Summary:
    """The summary of a run, made of its lines where it has none yet.

    Raises:
        MissingError: it has no finished case, or is of a kind that this version does not know.
    """
    kind = kind_of(record.manifest)
    if kind not in REPORTS:
        raise MissingError(f"{record.path} holds a run of `{kind}`, which this version of edit-cli does not know")
    if record.summary is not None:
        return record.summary
    if not record.lines and kind != "train-editor":
        raise MissingError(f"{record.path} has no finished case yet")
    return REPORTS[kind].summary(record.manifest, record.lines)
