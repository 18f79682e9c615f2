"""`sequential`: edit batch after batch and take nothing back; ask again right after each step and at checkpoints.

Every step's edit is saved before it is asked about. After an interruption the saved edits are attached again, one after
another, and whatever is missing is asked in the same state as it would have been: the numbers are those of an
uninterrupted run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edit_cli.commands.evaluate import result_line
from edit_cli.commands.sme import Sme
from edit_cli.console import ConsoleMonitor
from edit_cli.datasets import Dataset, Source
from edit_cli.editors.base import Editor
from edit_cli.errors import UsageError
from edit_cli.experiment.attempt import Attempt, attempt
from edit_cli.experiment.base import Experiment, Line, Summary
from edit_cli.experiment.downstream import GeneralAbility, downstream_of
from edit_cli.experiment.figures import draw_own
from edit_cli.experiment.job import Job, Outcome
from edit_cli.experiment.plan import Plan
from edit_cli.experiment.protocol import SequentialProtocol
from edit_cli.experiment.records import records_of
from edit_cli.experiment.saved_steps import SavedSteps
from edit_cli.experiment.sme_protocol import SmeProtocol
from edit_cli.lm.model import LM
from edit_cli.metrics.observe import BeforeCache, Observation, observe
from edit_cli.metrics.sequence import AFTER_EDIT, CHECKPOINT, HELD_OUT, MODEL, checkpoint_rows, first_collapse
from edit_cli.metrics.weight_drift import Health
from edit_cli.monitor import Monitor
from edit_cli.report.sequence import told
from edit_cli.requests import Case
from edit_cli.runs.run import Run, SharedRun
from edit_cli.wording import many

COLLAPSED = 6  # exit code of a run that was stopped because it was destroying its model
WATCHED = 64  # prompts on which the drift of activations is measured


def run(job: Job, monitor: ConsoleMonitor) -> Outcome:
    """Raises UsageError where the protocol is none of sequences."""
    if isinstance(job.config.protocol, SmeProtocol):
        return Sme(job, monitor).conduct()
    if not isinstance(job.config.protocol, SequentialProtocol):
        raise UsageError("protocol names no protocol of sequences: choose protocol=lifelong or protocol=sme")
    return Lifelong(job, monitor).conduct()


class Lifelong(Experiment):
    KEY = ("case_id", "when", "edits")
    COMPLETE = "this run is complete, so nothing is edited again (overwrite=true would)"

    def __init__(self, job: Job, monitor: ConsoleMonitor) -> None:
        records, protocol = records_of(job, monitor), job.config.protocol
        dataset = records.dataset
        self.steps = protocol.batches(dataset.cases, job.config.method)
        protocol.checkpoint_steps([len(step) for step in self.steps])  # refuses those that are out of reach
        left = untouched(records.source, dataset, protocol.holdout)
        self.held_out = records.put(left)
        super().__init__(job, monitor, dataset, [*records.found.cases, *left], records)
        self.general = GeneralAbility(protocol, self.path())

    def details(self) -> dict[str, Any]:
        return {
            "batch_size": self.protocol.size(self.method, len(self.dataset.cases)),
            "batches": len(self.steps),
            "evaluated": "right after each step, and at checkpoints",
            "restored": False,
            "held_out": len(self.held_out),
        }

    def belongs(self) -> Callable[[Any], bool]:
        return identities(self.protocol, self.steps, self.held_out).__contains__

    def check(self) -> None:
        self.general.require(self.job)
        super().check()

    def is_complete(self) -> bool:
        return self.is_summarized()

    def work(self, lm: LM) -> None:
        cases, about = self.dataset.cases, self.job.about_method
        editor = self.begin(lm)
        editor.warm_up()
        before = self.unedited()
        with self.monitor.phase("ask before"):
            before.observe(lm, [*cases, *self.held_out])
            watched = [probe.text for case in self.held_out or cases for probe in case.probes][:WATCHED]
            health = Health(lm, watched)
        self.general.ask(lm, 0)
        saved = SavedSteps(self.run.edits, lm, editor, self.protocol.edits_room)
        walk = Walk(lm, editor, self.run, before, self.protocol, about, health, saved, self.general)
        self.write_all(self._until_destroyed(walk), "facts", len(cases), lambda identity: identity[1] == AFTER_EDIT)
        if isinstance(self.run, Run):
            rejected = {line["case_id"] for line in self.run.lines() if line["error"]}
            edited = [case for step in self.steps for case in step if case.id not in rejected]
            if self.settings.figures:
                draw_own(editor, edited, self.run.path, f"{about['name']} on {lm.name}: {self.dataset.name}")

    def _until_destroyed(self, walk: Walk) -> Iterator[Line]:
        if self._is_destroyed():
            return
        for line in walked(walk, self.steps, self.held_out):
            yield line
            if line["when"] == MODEL and self._is_destroyed():
                return

    def _is_destroyed(self) -> bool:
        """Tell how the last checkpoint went; whether the run is to be stopped there.

        The main process decides, from the lines on disk.
        """
        stop, protocol = False, self.protocol
        if isinstance(self.run, Run):
            lines = self.run.lines()
            last = max((line["edits"] for line in lines if line["when"] == MODEL), default=None)
            part = [line for line in lines if line["edits"] == last or line["when"] == AFTER_EDIT]
            if rows := checkpoint_rows(part, protocol.first) if last else []:
                found = first_collapse(rows, lines, protocol.collapse_below, protocol.collapse_perplexity)
                self.tracked.means(rows[-1]["metrics"], rows[-1]["edits"])
                self.monitor.note(told(rows[-1]) + (f"; COLLAPSED: {found['reason']}" if found else ""))
                stop = protocol.stop_on_collapse and found is not None
        return self.job.process_group.broadcast(stop)

    def summary(self, lines: Sequence[Line]) -> Summary:
        return {**super().summary(lines), **downstream_of(self.run.path)}

    def exit_code(self, summary: Summary, lines: Sequence[Line]) -> int:
        failed = super().exit_code(summary, lines)
        return COLLAPSED if summary["stopped"] else failed


@dataclass
class Walk:
    """What one pass over the steps needs. `before` knows what the unedited model says, `health` how it was, `general`
    asks downstream tasks.
    """

    lm: LM
    editor: Editor[Any]
    run: SharedRun
    before: BeforeCache
    protocol: SequentialProtocol
    method: dict[str, Any]
    health: Health
    steps: SavedSteps
    general: GeneralAbility

    def missing(self, cases: Sequence[Case], when: str, edits: int) -> list[Case]:
        return [case for case in cases if (case.id, when, edits) not in self.run.finished]

    def ask(self, cases: Sequence[Case], phase: str, texts: Sequence[str] = ()) -> dict[str, Observation]:
        """{case id: what the model says now}."""
        with self.lm.monitor.phase(phase):
            seen = observe(self.lm, cases, self.before.options, texts, self.before.seen)
        return dict(zip((case.id for case in cases), seen, strict=True))


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
        return Attempt(None, [], {case.id: "it came to no edit when its step was taken" for case in step}, 0.0)
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
    seen = walk.ask(asked, "ask after")
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
    seen = walk.ask(group if wanted else [], "ask at checkpoints", walk.before.texts)
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


def untouched(source: Source, dataset: Dataset, count: int) -> list[Case]:
    """Neighborhood and locality prompts of up to `count` records that come after the edited ones."""
    used = dataset.passed
    if not count or source.ids or used >= dataset.total - len(dataset.dropped):
        return []
    following = replace(source, offset=used).load(count, Monitor())
    cases = []
    for case in following.cases:
        probes = tuple(probe for probe in case.probes if probe.kind in ("neighborhood", "locality"))
        if probes:
            cases.append(Case(f"untouched {case.id}", (), probes))
    return cases


def plan(job: Job, monitor: ConsoleMonitor) -> Plan:
    """What `run` would do, before it costs anything."""
    protocol = job.config.protocol
    if not isinstance(protocol, SequentialProtocol):
        plan = Plan.of(Sme(job, monitor))
        plan.unknown.append("how many of the facts the model gets wrong: only those are edited under this protocol")
        return plan
    whole = Lifelong(job, monitor)
    cases, steps, held_out = whole.dataset.cases, whole.steps, whole.held_out
    plan = Plan.of(whole, steps)
    checkpoints = sorted(protocol.checkpoint_steps([len(step) for step in steps]))
    edited = [[case for step in steps[: number + 1] for case in step] for number in checkpoints]
    plan.say("checkpoints", f"after {', '.join(f'{len(done):,}' for done in edited)} facts")
    plan.editing(whole.method, steps)
    plan.asking("before", [*cases, *held_out])
    plan.asking("after each step", cases)
    for done in edited:
        wanted = _sample(done, protocol) | {case.id for case in done[: protocol.first]}
        plan.asking("at checkpoints", [*(case for case in done if case.id in wanted), *held_out], aloud=False)
    most = f"up to {protocol.sample:,}" if protocol.sample else "all"
    plan.say("at checkpoints", f"{most} of the facts so far, and {many(len(held_out), 'held-out record')}")
    plan.unknown += whole.general.untold
    return plan
