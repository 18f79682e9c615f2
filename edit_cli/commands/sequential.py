"""`sequential`: edit batch after batch and take nothing back; ask again right after each step and at checkpoints.

Every step's edit is saved before it is asked about. After an interruption the saved edits are attached again, one after
another, and whatever is missing is asked in the same state as it would have been: the numbers are those of an
uninterrupted run.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edit_cli.commands import sme
from edit_cli.commands.evaluate import result_line
from edit_cli.console import ConsoleMonitor
from edit_cli.datasets import Dataset, Source
from edit_cli.editors.base import Editor
from edit_cli.errors import UsageError
from edit_cli.experiment.conclude import conclude
from edit_cli.experiment.downstream import GeneralAbility, downstream_of
from edit_cli.experiment.examples import OtherRecords
from edit_cli.experiment.figures import draw_own
from edit_cli.experiment.job import Job, Outcome
from edit_cli.experiment.protocol import SequentialProtocol
from edit_cli.experiment.run_directory import recorded, run_path
from edit_cli.experiment.saved_steps import SavedSteps
from edit_cli.experiment.setup import (
    Attempt,
    PhaseTimer,
    attempt,
    context_of,
    load_fitting,
    perplexity_texts,
    refuse_missing,
)
from edit_cli.experiment.sme_protocol import SmeProtocol
from edit_cli.lm.model import LM
from edit_cli.metrics.observe import BeforeCache, observe
from edit_cli.metrics.sequence import AFTER_EDIT, CHECKPOINT, HELD_OUT, MODEL, checkpoint_rows, first_collapse
from edit_cli.metrics.weight_drift import Health
from edit_cli.monitor import Monitor
from edit_cli.report.figures import curves
from edit_cli.report.sequence import sequential_summary, sequential_table, told
from edit_cli.requests import Case
from edit_cli.runs.run import SUMMARY, Run

KEY = ("case_id", "when", "edits")
COLLAPSED = 6  # exit code of a run that was stopped because it was destroying its model
WATCHED = 64  # prompts on which the drift of activations is measured


@dataclass
class Walk:
    """What one pass over the steps needs. `before` knows what the unedited model says, `health` how it was, `general`
    asks downstream tasks.
    """

    lm: LM
    editor: Editor[Any]
    run: Run
    before: BeforeCache
    protocol: SequentialProtocol
    method: dict[str, Any]
    health: Health
    steps: SavedSteps
    general: GeneralAbility

    def missing(self, cases: Sequence[Case], when: str, edits: int) -> list[Case]:
        return [case for case in cases if (case.id, when, edits) not in self.run.finished]


def run(job: Job, monitor: ConsoleMonitor) -> Outcome:
    protocol = job.config.protocol
    if isinstance(protocol, SmeProtocol):
        return sme.run(job, protocol, monitor)
    if not isinstance(protocol, SequentialProtocol):
        raise UsageError("protocol names no protocol of sequences: choose protocol=lifelong or protocol=sme")
    top, model, method, source = job.config.settings, job.config.model, job.config.method, job.config.dataset
    dataset = source.load(top.limit, monitor)
    steps = protocol.batches(dataset.cases, method)
    protocol.checkpoint_steps([len(step) for step in steps])  # refuses those that are out of reach
    held_out = untouched(source, dataset, protocol.holdout)
    context = context_of(job, OtherRecords(source, [*dataset.cases, *held_out], top.seed))
    details = {
        "protocol": {
            "batch_size": protocol.size(method, len(dataset.cases)),
            "batches": len(steps),
            "evaluated": "right after each step, and at checkpoints",
            "restored": False,
            "held_out": len(held_out),
        }
    }
    path = run_path(job, job.choices["dataset"], job.model_name)
    belongs, general = identities(protocol, steps, held_out).__contains__, GeneralAbility(protocol, path)

    def check() -> None:
        general.require(job)
        refuse_missing(job, model, method, context)

    with recorded(job, path, monitor, details, dataset, KEY, check, belongs) as run:
        timer = PhaseTimer(monitor)
        if not job.process_group.broadcast((run.path / SUMMARY).exists()):  # the last thing that is written
            general.require(job)
            lm = load_fitting(job, model, method, context, [dataset], monitor)
            editor = method.begin(lm, context)
            editor.warm_up()
            about = job.about_method
            before = BeforeCache(protocol.observe, perplexity_texts(model))
            with monitor.phase("ask before"):
                before.observe(lm, [*dataset.cases, *held_out])
                health = Health(
                    lm, [probe.prompt for case in held_out or dataset.cases for probe in case.probes][:WATCHED]
                )
            general.ask(lm, 0)
            walk = Walk(
                lm,
                editor,
                run,
                before,
                protocol,
                about,
                health,
                SavedSteps(run.edits, lm, editor, protocol.edits_room),
                general,
            )
            lines = iter(()) if _destroyed(job, run, protocol, monitor) else walked(walk, steps, held_out)
            with monitor.task("facts", len(dataset.cases)) as advance:
                if known := sum(when == AFTER_EDIT for _, when, _ in run.finished):
                    monitor.note(f"continuing: {known:,} of {len(dataset.cases):,} facts are edited already")
                advance(known)
                for line in lines:
                    run.append({**line, "phases": timer.take()})
                    advance(line["when"] == AFTER_EDIT)
                    if line["when"] == MODEL and _destroyed(job, run, protocol, monitor):
                        break
            if job.process_group.is_main:
                rejected = {line["case_id"] for line in run.lines() if line["error"]}
                edited = [case for step in steps for case in step if case.id not in rejected]
                draw_own(editor, edited, run.path, f"{about['name']} on {lm.name}: {dataset.name}")
        else:
            monitor.note("this run is complete, so nothing is edited again (overwrite=true would)")
        return conclude(
            job,
            run,
            monitor,
            lambda lines: {
                **sequential_summary(run.manifest, lines, dataset.references, timer.take()),
                **downstream_of(run.path),
            },
            lambda summary, _: sequential_table(summary),
            curves.draw,
            lambda summary: COLLAPSED if summary["stopped"] else 0,
        )


def identities(
    protocol: SequentialProtocol, steps: Sequence[Sequence[Case]], held_out: Sequence[Case]
) -> set[tuple[str, str, int]]:
    """Of all lines that a run may have."""
    found, edited, total = set(), [], 0
    checkpoints = protocol.checkpoint_steps([len(step) for step in steps])
    for number, step in enumerate(steps):
        edited += [case.id for case in step]
        total += len(step)
        found |= {(case.id, AFTER_EDIT, total) for case in step}
        if number in checkpoints:
            found |= {(id, CHECKPOINT, total) for id in edited} | {(case.id, HELD_OUT, total) for case in held_out}
            found.add((MODEL, MODEL, total))
    return found


def walked(walk: Walk, steps: Sequence[list[Case]], held_out: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Take every step and yield the lines that the run lacks; a checkpoint's last one is about the model.

    Edits stay attached.
    """
    checkpoints = walk.protocol.checkpoint_steps([len(step) for step in steps])
    edited: list[Case] = []
    for number, step in enumerate(steps):
        done = _take(walk, number, step)
        edited += [case for case in step if case.id not in done.rejected]
        total = sum(len(earlier) for earlier in steps[: number + 1])
        yield from _after_edit(walk, number, step, done, total)
        if number in checkpoints:
            yield from _asked(walk, number, edited, CHECKPOINT, total)
            yield from _asked(walk, number, held_out, HELD_OUT, total)
            walk.general.ask(walk.lm, total)
            if (MODEL, MODEL, total) not in walk.run.finished:
                with walk.lm.monitor.phase("ask at checkpoints"):
                    found = walk.health.measure(walk.lm)
                yield {"case_id": MODEL, "when": MODEL, "edits": total, "step": number, "model": found, "error": None}


def _take(walk: Walk, number: int, step: list[Case]) -> Attempt:
    """Attach the step's edit: the saved one if there is one, else make and save it."""
    if walk.steps.saved(number):
        edit, made = walk.steps.read(number)
        rejected = made.get("rejected", {})
        done = Attempt(edit, [case for case in step if case.id not in rejected], rejected, made["seconds"])
    elif number <= walk.steps.start:  # there was nothing to be saved
        return Attempt(None, [], {case.id: "" for case in step}, 0.0)
    else:
        done = attempt(walk.editor, step)
        if done.edit is not None:
            made = {"step": number, "seconds": done.seconds, "rejected": done.rejected}
            walk.steps.save(number, done.edit, done.requests, {**walk.method, "made": made})
    if done.edit is not None:
        walk.health.watch(walk.lm, done.edit)
        walk.lm.attach(done.edit)
        walk.lm.merge_top_edits()
        walk.steps.attached(number, walk.method)
    return done


def _after_edit(walk: Walk, number: int, step: Sequence[Case], done: Attempt, total: int) -> Iterator[dict[str, Any]]:
    wanted = walk.missing(step, AFTER_EDIT, total)
    # all together: in other company, answers differ in their last bits
    asked = [case for case in step if case.id not in done.rejected] if wanted else []
    with walk.lm.monitor.phase("ask after"):
        seen = dict(
            zip(
                (case.id for case in asked),
                observe(walk.lm, asked, walk.before.options, before=walk.before.seen),
                strict=True,
            )
        )
    for case in wanted:
        earlier = walk.before.observe(walk.lm, [case])[0]
        line = result_line(case, number, earlier, seen.get(case.id), done.seconds, done.rejected.get(case.id))
        yield {**line, "when": AFTER_EDIT, "edits": total}


def _asked(walk: Walk, number: int, cases: Sequence[Case], when: str, total: int) -> Iterator[dict[str, Any]]:
    """What the model says at a checkpoint.

    The answers before are in the case's first line, or stand here for held-out ones.
    """
    sampled = _sample(cases, walk.protocol) if when == CHECKPOINT else {case.id for case in cases}
    early = {case.id for case in cases[: walk.protocol.first]}
    group = [case for case in cases if case.id in sampled | early]
    wanted = walk.missing(group, when, total)
    with walk.lm.monitor.phase("ask at checkpoints"):
        asked = group if wanted else []
        seen = dict(
            zip(
                (case.id for case in asked),
                observe(walk.lm, asked, walk.before.options, walk.before.texts, walk.before.seen),
                strict=True,
            )
        )
    for case in wanted:
        earlier = walk.before.observe(walk.lm, [case])[0] if when == HELD_OUT else None
        line = result_line(case, number, earlier, seen[case.id], 0.0, None)
        yield {**line, "seconds": None, "when": when, "edits": total, "sampled": case.id in sampled}


def _sample(cases: Sequence[Case], protocol: SequentialProtocol) -> set[str]:
    """Ids of all of them, or of those with the lowest random ranks: a fact's rank is the same at every checkpoint."""
    if protocol.sample is None or len(cases) <= protocol.sample:
        return {case.id for case in cases}
    rank = {case.id: random.Random(f"{protocol.sample_seed} {case.id}").random() for case in cases}
    return {case.id for case in sorted(cases, key=lambda case: rank[case.id])[: protocol.sample]}


def _destroyed(job: Job, run: Run, protocol: SequentialProtocol, monitor: Monitor) -> bool:
    """Tell how the last checkpoint went; whether the run is to be stopped there.

    The main process decides, from the lines on disk.
    """
    stop = False
    if job.process_group.is_main:
        lines = run.lines()
        last = max((line["edits"] for line in lines if line["when"] == MODEL), default=None)
        part = [line for line in lines if line["edits"] == last or line["when"] == AFTER_EDIT]
        if rows := checkpoint_rows(part, protocol.first) if last else []:
            found = first_collapse(rows, lines, protocol.collapse_below, protocol.collapse_perplexity)
            monitor.note(told(rows[-1]) + (f"; COLLAPSED: {found['reason']}" if found else ""))
            stop = protocol.stop_on_collapse and found is not None
    return job.process_group.broadcast(stop)


def untouched(source: Source, dataset: Dataset, count: int) -> list[Case]:
    """Neighbourhood and locality prompts of up to `count` records that come after the edited ones."""
    used = dataset.offset + len(dataset.cases)
    if not count or source.ids or used >= dataset.total - len(dataset.dropped):
        return []
    following = replace(source, offset=used).load(count, Monitor())
    cases = []
    for case in following.cases:
        probes = tuple(probe for probe in case.probes if probe.kind in ("neighborhood", "locality"))
        if probes:
            cases.append(Case(f"untouched {case.id}", (), probes))
    return cases
