"""`edit`: one fact or a file of facts, edited all at once; shows before and after, and keeps the edit."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

from edit_cli.commands.evaluate import result_line
from edit_cli.console import ConsoleMonitor
from edit_cli.datasets import Dataset
from edit_cli.datasets.facts import requested
from edit_cli.datasets.records.rows import Fault, Row
from edit_cli.edits import store as edit_store
from edit_cli.errors import UsageError
from edit_cli.experiment.conclude import SOME_FAILED, conclude
from edit_cli.experiment.job import Job, Outcome
from edit_cli.experiment.records import records_of
from edit_cli.experiment.run_directory import recorded, run_path, slug
from edit_cli.experiment.settings import Fact
from edit_cli.experiment.setup import PhaseTimer, attempt, context_of, load_fitting, perplexity_texts, refuse_missing
from edit_cli.files.paths import expanded
from edit_cli.metrics.observe import BeforeCache, observe
from edit_cli.metrics.verdict import verdicts
from edit_cli.report.summary import summary_of
from edit_cli.report.tables.facts import before_and_after
from edit_cli.requests import Case, Probe, with_join
from edit_cli.writing import bare

INLINE = "inline"
SAVED = "0000"  # name of the one edit that this command makes


def run(job: Job, monitor: ConsoleMonitor) -> Outcome:
    top, model, method = job.config.settings, job.config.model, job.config.method
    records = records_of(job, monitor, inline(top.edit) if top.edit.given else None)
    dataset = records.dataset
    base = None if top.base_edit is None else expanded(top.base_edit)
    path = _path(job, dataset, base)
    context = context_of(job, None if top.edit.given else records.others(top.seed))

    def check() -> None:
        refuse_missing(job, model, method, context)
        if base is not None:
            edit_store.verify(base)

    details = {
        "protocol": {"batch_size": len(dataset.cases), "batches": 1, "evaluated": "after all edits", "restored": False}
    }
    with recorded(job, path, monitor, details, dataset, check=check) as run:
        timer = PhaseTimer(monitor)
        saved = run.edits / SAVED
        if not job.process_group.broadcast(run.finished.issuperset(dataset.ids) and saved.is_dir()):
            check()
            lm = load_fitting(job, model, method, context, [dataset], monitor, loaded=records.lm)
            about = job.about_method
            editor = method.begin(lm, context)
            editor.warm_up()  # what it lacks is told before anything is asked
            if base is not None:
                for directory in edit_store.chain(base):
                    edit = edit_store.load(directory, lm)
                    if edit_store.read_manifest(directory)["method"].get("type") == about["type"]:
                        editor.recall(edit)  # before it is attached, as in a sequence
                    lm.attach(edit)
            before = BeforeCache(job.config.protocol.observe, perplexity_texts(model))
            with monitor.phase("ask before"):
                before.observe(lm, dataset.cases)
            done = attempt(editor, dataset.cases)
            after = {}
            if done.edit is not None:
                if job.process_group.is_main:
                    edit_store.save(done.edit, saved, lm, done.requests, about, base)
                with monitor.phase("ask after"), lm.edited(done.edit):
                    found = observe(lm, done.cases, before.options, before.texts, before.seen)
                after = dict(zip((case.id for case in done.cases), found, strict=True))
            for case, earlier in zip(dataset.cases, before.observe(lm, dataset.cases), strict=True):
                if case.id not in run.finished:
                    line = result_line(case, 0, earlier, after.get(case.id), done.seconds, done.rejected.get(case.id))
                    run.append({**line, "diagnosis": done.diagnosis, "phases": timer.take()})
        else:
            monitor.note("this edit is there already (overwrite=true makes it again)")

        def summarise(lines: list[dict[str, Any]]) -> dict[str, Any]:
            place = {"edit": str(saved.relative_to(run.path)), "took": verdicts(lines)}
            return {**summary_of(run.manifest, lines, seconds=timer.take()), **place}

        ended = conclude(
            job,
            run,
            monitor,
            summarise,
            before_and_after,
            code=lambda summary: SOME_FAILED if top.must_take and summary["took"]["failed"] else 0,
        )
        if saved.is_dir() and job.process_group.is_main and not job.in_sweep:
            monitor.screen.line(f"edit: {saved}")
        return ended


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
