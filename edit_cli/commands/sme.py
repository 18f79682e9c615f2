"""Sequential model editing: `sequential protocol=sme`.

Folds of an edit set; what is wrong at its turn is edited, all else is skipped.

Each turn's edit is saved before the turn's line is written. After an interruption the fold goes on from its saved
edits: the numbers are those of an unbroken run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edit_cli.commands.evaluate import Begin, result_line
from edit_cli.console import ConsoleMonitor
from edit_cli.editors.base import Editor
from edit_cli.edits import store as edit_store
from edit_cli.errors import UsageError
from edit_cli.experiment.attempt import Attempt, attempt
from edit_cli.experiment.base import Experiment, Line
from edit_cli.experiment.figures import draw_own
from edit_cli.experiment.job import Job
from edit_cli.experiment.records import records_of
from edit_cli.experiment.run_directory import run_path
from edit_cli.experiment.saved_steps import naming
from edit_cli.experiment.sme_protocol import SmeProtocol
from edit_cli.lm.model import LM
from edit_cli.metrics.observe import Observation, observe
from edit_cli.metrics.sme import KEPT, TURN, solved
from edit_cli.requests import Case
from edit_cli.runs.run import Run, SharedRun
from edit_cli.wording import many

MODEL, END = "model", " at the end"  # names of lines about no case
KEPT_RATES = {"train": "TrainR", "test": "TestR"}


class Sme(Experiment):
    KEY = ("case_id", "when", "fold", "edits")
    COMPLETE = "this run is complete, so nothing is edited again (overwrite=true would)"

    def __init__(self, job: Job, monitor: ConsoleMonitor) -> None:
        records, protocol = records_of(job, monitor), job.config.protocol
        cut, kept = protocol.cut(records.found.cases), protocol.kept(records.source, records.found)
        self.folds = {number: records.put(map(protocol.as_edited, cases)) for number, cases in cut.items()}
        self.kept = dict(zip(("train", "test"), map(records.put, kept), strict=True))
        super().__init__(job, monitor, records.dataset, [*records.found.cases, *kept[0], *kept[1]], records)

    def path(self) -> Path:
        return run_path(self.job, self.job.choices["dataset"], self.job.model_name, "sme")

    def details(self) -> dict[str, Any]:
        counts = {name: len(asked) for name, asked in self.kept.items()}
        return {"kind": "sme", "batch_size": 1, "batches": len(self.dataset.cases), **counts}

    def belongs(self) -> Callable[[Any], bool]:
        return partial(belongs, self.folds)

    def is_complete(self) -> bool:
        return self.is_summarized()

    def work(self, lm: LM) -> None:
        begin = partial(self.begin, lm)
        begin().warm_up()
        lines = self.job.process_group.broadcast(self.run.lines() if isinstance(self.run, Run) else [])
        done = {self.run.identity(line): line for line in lines}
        method, figures = self.job.about_method, self.settings.figures
        stream = Stream(lm, begin, begin(), self.run, self.protocol, method, self.kept, done, figures)
        _refuse_too_few(stream, self.folds)
        every = (line for number, cases in self.folds.items() for line in walked(stream, number, cases))
        new = (line for line in every if self.run.identity(line) not in done)
        total = sum(map(len, self.folds.values()))
        self.write_all(new, "facts", total, lambda identity: identity[1] == TURN)


@dataclass
class Stream:
    """What the folds need. begin: makes an editor that remembers nothing; editor: that of the present fold. kept: the
    records of TrainR and TestR.

    done: lines of the run that are there, by their identity. figures: whether the editor's own are drawn.
    """

    lm: LM
    begin: Begin
    editor: Editor[Any]
    run: SharedRun
    protocol: SmeProtocol
    method: dict[str, Any]
    kept: dict[str, list[Case]]
    done: dict[Any, Line]
    figures: bool

    def ask(self, cases: Sequence[Case], phase: str) -> list[Observation]:
        with self.lm.monitor.phase(phase):
            return observe(self.lm, cases, self.protocol.observe)


def belongs(folds: Mapping[int, Sequence[Case]], identity: tuple[str, str, int, int]) -> bool:
    """Whether a line of that identity can be one of this run's."""
    name, when, fold, edits = identity
    if fold not in folds or not 0 <= edits <= len(folds[fold]):
        return False
    if when == KEPT:
        return name in (MODEL, f"{MODEL}{END}")
    return any(case.id == name for case in folds[fold])


def _refuse_too_few(stream: Stream, folds: Mapping[int, Sequence[Case]]) -> None:
    """There must be something to edit in every fold, or its rates mean nothing.

    Raises:
        UsageError: the unedited model makes no mistakes, or a fold is without one.
    """
    wrong = {fold: sum(not solved(seen) for seen in stream.ask(cases, "ask before")) for fold, cases in folds.items()}
    total, lacking = sum(wrong.values()), [fold for fold, count in wrong.items() if not count]
    if not total:
        more = ", or altered answers: protocol.answers=written" if stream.protocol.answers == "right" else ""
        raise UsageError(
            f"{stream.lm.name} makes no mistakes on these records, so there is nothing to edit: edit other"
            f" records{more}"
        )
    if lacking:
        raise UsageError(
            f"protocol.folds={stream.protocol.folds}: {many(total, 'mistake is', 'mistakes are')} too few for so many"
            f" folds (fold {lacking[0]} has none): lower it, or raise limit"
        )


def walked(stream: Stream, fold: int, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """The fold's lines in their order, also those that are there already.

    The model is the unedited one before and after.
    """
    if (
        last := next((line for line in stream.done.values() if line["fold"] == fold and line.get("last")), None)
    ) is not None:
        yield from (line for line in stream.done.values() if line["fold"] == fold and line is not last)
        yield dict(last)
        return
    stream.editor = stream.begin()
    depth = len(stream.lm.attached)
    edited: list[Case] = []
    try:
        yield _kept(stream, fold, edited)
        for turn, case in enumerate(cases):
            if stream.protocol.max_edits is not None and len(edited) >= stream.protocol.max_edits:
                break
            line = _turn(stream, fold, turn, case, len(edited))
            if line["mistake"] and not line["error"]:
                edited.append(case)
            yield line
            if line["mistake"] and edited and not line["error"] and len(edited) % stream.protocol.every == 0:
                yield _kept(stream, fold, edited)
        if fold == 0 and stream.figures and stream.lm.process_group.is_main:
            draw_own(
                stream.editor,
                edited,
                stream.run.path,
                f"{stream.method['name']} on {stream.lm.name}, first fold",
            )
        yield {**_kept(stream, fold, edited, END), "last": True}
    finally:
        while len(stream.lm.attached) > depth:
            stream.lm.detach()


def _turn(stream: Stream, fold: int, turn: int, case: Case, edits: int) -> dict[str, Any]:
    """Ask; where the answer is wrong, edit (or attach the saved edit) and ask again."""
    about = {"when": TURN, "fold": fold, "turn": turn}
    for count, mistake in ((edits, False), (edits + 1, True)):
        if (known := stream.done.get((case.id, TURN, fold, count))) is not None and known["mistake"] == mistake:
            if mistake and not known["error"]:
                _take(stream, fold, turn, case)
            return dict(known)
    (before,) = stream.ask([case], "ask before")
    if before.get("error") or solved(before):
        return {**result_line(case, turn, before, None, 0.0, None), **about, "mistake": False, "edits": edits}
    done = _take(stream, fold, turn, case)
    if case.id in done.rejected:
        return {
            **result_line(case, turn, before, None, 0.0, done.rejected[case.id]),
            **about,
            "mistake": True,
            "edits": edits + 1,
        }
    (after,) = stream.ask([case], "ask after")
    return {**result_line(case, turn, before, after, done.seconds, None), **about, "mistake": True, "edits": edits + 1}


def _take(stream: Stream, fold: int, turn: int, case: Case) -> Attempt:
    """Attach the turn's edit: the saved one if there is one, else make and save it."""
    directory = stream.run.edits / f"{fold:03d}-{turn:05d}"
    lm = stream.lm
    if lm.process_group.broadcast((directory / edit_store.MANIFEST).exists()):
        with naming(directory, "that edit"):
            seconds = edit_store.made_of(directory)["seconds"]
            edit = edit_store.load(directory, lm)
            stream.editor.recall(edit)
        lm.attach(edit)
        lm.merge_top_edits()
        return Attempt(None, [case], {}, seconds)
    done = attempt(stream.editor, [case])
    if done.edit is not None:
        if lm.process_group.is_main:
            edit_store.save(
                done.edit,
                directory,
                lm,
                done.requests,
                {**stream.method, "made": {"seconds": done.seconds, "fold": fold}},
            )
        lm.attach(done.edit)
        lm.merge_top_edits()
    return done


def _kept(stream: Stream, fold: int, edited: Sequence[Case], end: str = "") -> dict[str, Any]:
    """What the model knows after so many edits: of every edited prompt, and of the records for TrainR and TestR,
    whether it is right.
    """
    identity = (f"{MODEL}{end}", KEPT, fold, len(edited))
    if identity in stream.done:
        return dict(stream.done[identity])
    asked = {"edited": [_bare(case) for case in edited], **stream.kept}
    found = {}
    for name, cases in asked.items():
        seen = stream.ask(cases, "ask at checkpoints")
        found[name] = [int(solved(one)) for one in seen if not one.get("error")]
        if not (fold or edited or end) and len(found[name]) < len(cases):
            _note_left_out(stream, name, seen)
    return {**dict(zip(Sme.KEY, identity, strict=True)), "seconds": None, "error": None, **found}


def _note_left_out(stream: Stream, name: str, seen: Sequence[Observation]) -> None:
    """Records that the model cannot be asked are no right answers, and no wrong ones."""
    errors = [one["error"] for one in seen if one.get("error")]
    stream.lm.monitor.note(
        f"{many(len(errors), 'record')} of {len(seen):,} for {KEPT_RATES[name]} cannot be asked and"
        f" {'is' if len(errors) == 1 else 'are'} left out (protocol.{name}): {errors[0]}"
    )


def _bare(case: Case) -> Case:
    return Case(case.id, (), tuple(probe for probe in case.probes if probe.kind == "rewrite"))
