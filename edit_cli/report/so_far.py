"""What a run has found so far, whatever kind of run it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edit_cli.errors import MissingError
from edit_cli.report import learning, tuning
from edit_cli.report.sequence import sequential_summary
from edit_cli.report.sme import sme_summary
from edit_cli.report.summary import summary_of
from edit_cli.report.trace import trace_summary
from edit_cli.runs.format import kind_of
from edit_cli.runs.run import RunRecord

SUMMARIES: dict[str, Callable[..., dict[str, Any]]] = {
    "sequential": sequential_summary,
    "sme": sme_summary,
    "trace": trace_summary,
    "train-editor": learning.summary_of,
    "tune": tuning.summary_of,
}


def summary_so_far(record: RunRecord) -> dict[str, Any]:
    """The summary of a run, made of its lines where it has none yet.

    Raises:
        MissingError: it has no finished case.
    """
    if record.summary is not None:
        return record.summary
    kind = kind_of(record.manifest)
    if not record.lines and kind != "train-editor":
        raise MissingError(f"{record.path} has no finished case yet")
    return SUMMARIES.get(kind, summary_of)(record.manifest, record.lines)
