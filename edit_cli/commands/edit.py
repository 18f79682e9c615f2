"""`edit`: one fact or a file of facts, edited all at once; shows before and after, and keeps the edit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

from edit_cli.commands.evaluate import lines_of
from edit_cli.config.overrides import override_key
from edit_cli.console import ConsoleMonitor
from edit_cli.datasets import Dataset
from edit_cli.datasets.facts import requested
from edit_cli.datasets.records.rows import Fault, Row
from edit_cli.edits import store as edit_store
from edit_cli.errors import UsageError
from edit_cli.experiment.asking import Asker
from edit_cli.experiment.attempt import attempt
from edit_cli.experiment.base import SOME_FAILED, Experiment, Line, Summary
from edit_cli.experiment.job import Job, Outcome
from edit_cli.experiment.plan import Plan
from edit_cli.experiment.records import records_of
from edit_cli.experiment.run_directory import run_path, slug
from edit_cli.experiment.saved_edits import attach_base, edit_here, one_edit
from edit_cli.experiment.settings import Fact
from edit_cli.lm.model import LM
from edit_cli.metrics.verdict import verdicts
from edit_cli.report.summary import summary_of
from edit_cli.requests import Case, Probe, with_join
from edit_cli.writing import bare

INLINE = "inline"
SAVED = "0000"  # name of the one edit that this command makes


def run(job: Job, monitor: ConsoleMonitor) -> Outcome:
    return MakeEdit(job, monitor).conduct()


class MakeEdit(Experiment):
    COMPLETE = "this edit is there already (overwrite=true makes it again)"

    def __init__(self, job: Job, monitor: ConsoleMonitor) -> None:
        top = job.config.settings
        if top.edit.given and any(override_key(text) == "dataset.path" for text in job.composed.overrides):
            raise UsageError("edit.prompt and dataset.path both say what is edited: give one of them")
        records = records_of(job, monitor, inline(top.edit) if top.edit.given else None)
        super().__init__(job, monitor, records.dataset, None if top.edit.given else records.found.cases, records)
        self.base = None if top.base_edit is None else one_edit(edit_here(top.base_edit, "base_edit="))

    @property
    def saved(self) -> Path:
        return self.run.edits / SAVED

    def path(self) -> Path:
        return _path(self.job, self.dataset, self.base)

    def details(self) -> dict[str, Any]:
        size = len(self.dataset.cases)
        return {"batch_size": size, "batches": 1, "evaluated": "after all edits", "restored": False}

    def check(self) -> None:
        super().check()
        if self.base is not None:
            edit_store.verify(self.base)

    def is_complete(self) -> bool:
        return self.job.process_group.broadcast(super().is_complete() and self.saved.is_dir())

    def work(self, lm: LM) -> None:
        editor, about = self.begin(lm), self.job.about_method
        editor.warm_up()  # what it lacks is told before anything is asked
        if self.base is not None:
            attach_base(self.base, editor, about["type"])
        before = self.unedited()
        with self.monitor.phase("ask before"):
            before.observe(lm, self.dataset.cases)
        done = attempt(editor, self.dataset.cases)
        if done.edit is not None and lm.process_group.is_main:
            edit_store.save(done.edit, self.saved, lm, done.requests, about, self.base)
        wanted = [case for case in self.dataset.cases if case.id not in self.run.finished]
        after = Asker(lm, before).attached(done)
        for line in lines_of(done, wanted, 0, before.observe(lm, wanted), after):
            self.write(line)

    def summary(self, lines: Sequence[Line]) -> Summary:
        found = summary_of(self.run.manifest, lines, seconds=self.timer.take())
        return {**found, "edit": str(self.saved.relative_to(self.run.path)), "took": verdicts(lines)}

    def leave(self, summary: Summary, lines: Sequence[Line]) -> list[str]:
        return [f"edit: {self.saved}"] if self.saved.is_dir() else []

    def exit_code(self, summary: Summary, lines: Sequence[Line]) -> int:
        failed = super().exit_code(summary, lines)
        return SOME_FAILED if self.settings.must_take and summary["took"]["failed"] else failed


def _path(job: Job, dataset: Dataset, base: Path | None) -> Path:
    """Whatever is edited, alone or on top of another edit, lies apart, without the user's having to name it.

    Raises:
        MissingError: the base is no edit.
    """
    path = run_path(job, dataset.name, job.model_name)
    if job.config.settings.run_dir is not None and not job.in_sweep:
        return path
    if dataset.name == INLINE:
        request = dataset.cases[0].requests[0]
        what = f"{request.subject or request.prompt}-{bare(request.target_new)}"
    else:
        what = PurePath(job.config.dataset.path or "").stem
    digest = hashlib.sha256(repr((dataset.sha256, dataset.ids)).encode()).hexdigest()[:6]
    below = "" if base is None else f"on-{edit_store.read_manifest(base)['id'][:6]}"
    return path.with_name("-".join(filter(None, (path.name, what and slug(what)[:60], below, digest))))


def inline(fact: Fact) -> Dataset:
    """The one fact of the command line as a data set, by the rules of files of facts."""
    named = {"target_new": "target"}  # where the key is called otherwise than the field
    row = Row("command line", 0, {**asdict(fact), "target_new": fact.target})
    try:
        request = requested(row, None if fact.subject is None else row.phrase("subject"))
        case = Case("0", (request,), (Probe("rewrite", request.text, request.target_new, request.target_true),))
        case = with_join(case, row.join(None))
    except Fault as fault:
        raise UsageError(
            f"edit.{named.get(fault.field, fault.field)} {fault.reason}; one fact is, say, edit.prompt='{{}} plays the'"
            " edit.subject='Ada Lund' edit.target=violin"
        ) from None
    digest = hashlib.sha256(repr(case.requests[0]).encode()).hexdigest()
    return Dataset(INLINE, (case,), "command line", digest, 1, (), None, 0, None, None)


def plan(job: Job, monitor: ConsoleMonitor) -> Plan:
    """What `run` would do, before it costs anything."""
    whole = MakeEdit(job, monitor)
    cases = whole.dataset.cases
    plan = Plan.of(whole, [cases])
    if whole.base is not None:
        plan.say("stands on", str(whole.base))
    plan.editing(whole.method, [cases])
    plan.asking("before", cases)
    plan.asking("after", cases)
    return plan
