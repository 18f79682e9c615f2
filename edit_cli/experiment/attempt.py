"""Editing some cases at once: the edit, what could not be edited, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edit_cli.editors.base import Editor
from edit_cli.edits.edit import Edit
from edit_cli.errors import RejectedRequest
from edit_cli.requests import Case, EditRequest

STATISTICS = "statistics"  # phase that is paid once a model, not once an edit


@dataclass
class Attempt:
    """What came of editing some cases at once. rejected: {case id: why}. seconds: of one case, without statistics.
    diagnosis: what the edit says of how it went.
    """

    edit: Edit | None
    cases: list[Case]
    rejected: dict[str, str]
    seconds: float
    diagnosis: Mapping[str, Any] = field(default_factory=dict)

    @property
    def requests(self) -> list[EditRequest]:
        return [request for case in self.cases for request in case.requests]


def attempt(editor: Editor[Any], cases: Sequence[Case]) -> Attempt:
    """Edit all requests of `cases` at once, leaving out the cases that cannot be worked on."""
    lm = editor.lm
    rejected: dict[str, str] = {}
    for case in cases:
        try:
            for request in case.requests:
                editor.check(request)
        except RejectedRequest as error:
            rejected[case.id] = str(error)
    able = [case for case in cases if case.id not in rejected]
    result = Attempt(None, able, rejected, 0.0)
    if not able:
        return result
    began, once = time.perf_counter(), lm.monitor.seconds[STATISTICS]
    try:
        with lm.monitor.phase("edit"):
            made = editor.edit_cases(able)
        if not made.is_finite:
            raise RejectedRequest(
                "the edit came out as NaN or infinite and is not kept: give a smaller method.lr, or load the model with"
                " more digits (model.dtype=float32)"
            )
        result.edit = made
    except RejectedRequest as error:
        return Attempt(None, [], rejected | {case.id: str(error) for case in able}, 0.0)
    result.seconds = max(time.perf_counter() - began - (lm.monitor.seconds[STATISTICS] - once), 0.0) / len(able)
    result.diagnosis = made.diagnosis(lm)
    return result
