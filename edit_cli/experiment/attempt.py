"""Editing some cases at once: the edit, what could not be edited, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edit_cli.editors.base import Editor
from edit_cli.editors.passes import packed
from edit_cli.edits.edit import Edit
from edit_cli.errors import RejectedRequest
from edit_cli.lm.model import LM
from edit_cli.requests import Case, EditRequest

EACH = 50  # facts of batches that are edited at once, where the method can: bounds what is held
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
    able, rejected = _able(editor, cases)
    if not able:
        return Attempt(None, able, rejected, 0.0)
    took = _stopwatch(lm)
    try:
        with lm.monitor.phase("edit"):
            made = editor.edit_cases(able)
        return _kept(lm, made, able, rejected, took() / len(able))
    except RejectedRequest as error:
        return Attempt(None, [], rejected | {case.id: str(error) for case in able}, 0.0)


def attempt_each(
    begin: Callable[[], Editor[Any]],
    batches: Sequence[Sequence[Case]],
    leave_out: Callable[[Sequence[Case]], bool] = lambda batch: False,
) -> Iterator[Attempt]:
    """Edit batches that know nothing of each other: some at once where the method can (`Editor.edit_each`), else one
    by one.

    begin: makes an editor that remembers nothing. leave_out: asked before a batch is edited by itself, whether there is
    nothing to be done for it.
    """
    for some in packed(batches, EACH):
        yield from _at_once(begin, some) or (
            Attempt(None, [], {}, 0.0) if leave_out(batch) else attempt(begin(), batch) for batch in some
        )


def _at_once(begin: Callable[[], Editor[Any]], batches: Sequence[Sequence[Case]]) -> list[Attempt]:
    """None at all where the method makes them one by one, or one of them cannot be made."""
    editor = begin()
    lm, parts = editor.lm, [_able(editor, batch) for batch in batches]
    wanted = [able for able, _ in parts if able]
    if len(wanted) < 2:
        return []
    took = _stopwatch(lm)
    try:
        with lm.monitor.phase("edit"):
            made = editor.edit_each([_requests(able) for able in wanted])
        if made is None:
            return []
        seconds, edits = took() / sum(map(len, wanted)), iter(made)
        return [
            _kept(lm, next(edits), able, rejected, seconds) if able else Attempt(None, able, rejected, 0.0)
            for able, rejected in parts
        ]
    except RejectedRequest:
        return []


def _kept(lm: LM, made: Edit, cases: list[Case], rejected: dict[str, str], seconds: float) -> Attempt:
    """What came of them. Raises RejectedRequest if the edit is none."""
    if not made.is_finite:
        raise RejectedRequest(
            "the edit came out as NaN or infinite and is not kept: give a smaller method.lr, or load the model with"
            " more digits (model.dtype=float32)"
        )
    return Attempt(made, cases, rejected, seconds, made.diagnosis(lm))


def _stopwatch(lm: LM) -> Callable[[], float]:
    """What tells the seconds since now, without those of statistics."""
    began, once = time.perf_counter(), lm.monitor.seconds[STATISTICS]
    return lambda: max(time.perf_counter() - began - (lm.monitor.seconds[STATISTICS] - once), 0.0)


def _able(editor: Editor[Any], cases: Sequence[Case]) -> tuple[list[Case], dict[str, str]]:
    """(those that can be worked on, {case id: why not} of the others)."""
    rejected: dict[str, str] = {}
    for case in cases:
        try:
            for request in case.requests:
                editor.check(request)
        except RejectedRequest as error:
            rejected[case.id] = str(error)
    return [case for case in cases if case.id not in rejected], rejected


def _requests(cases: Sequence[Case]) -> list[EditRequest]:
    return [request for case in cases for request in case.requests]
