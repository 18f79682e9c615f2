"""`evaluate`: edit, ask before and after, restore, and go on to the next batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

from edit_cli.console import ConsoleMonitor
from edit_cli.distributed import SINGLE
from edit_cli.editors.base import Editor
from edit_cli.edits import store as edit_store
from edit_cli.experiment.asking import Asker, Seen
from edit_cli.experiment.attempt import Attempt, attempt, attempt_each
from edit_cli.experiment.base import Experiment, Line, Summary
from edit_cli.experiment.downstream import GeneralAbility, downstream_of
from edit_cli.experiment.job import Job, Outcome
from edit_cli.experiment.plan import Plan
from edit_cli.experiment.records import records_of
from edit_cli.lm.model import LM
from edit_cli.metrics.observe import BeforeCache, Observation
from edit_cli.requests import Case
from edit_cli.runs.run import SharedRun

WINDOW = 100  # cases that are asked about in one go before they are edited

Batches = list[tuple[int, list[Case]]]  # (step, cases)
Begin = Callable[[], Editor[Any]]


def run(job: Job, monitor: ConsoleMonitor) -> Outcome:
    return Evaluate(job, monitor).conduct()


class Evaluate(Experiment):
    COMPLETE = "all cases are there already, so nothing is edited again (overwrite=true would)"

    def __init__(self, job: Job, monitor: ConsoleMonitor) -> None:
        records = records_of(job, monitor)
        job.config.protocol.require_facts(len(records.dataset.cases), monitor)
        super().__init__(job, monitor, records.dataset, records.found.cases, records)
        self.batches = list(enumerate(self.protocol.batches(self.dataset.cases, self.method)))
        self.general = GeneralAbility(self.protocol, self.path())

    def details(self) -> dict[str, Any]:
        size = self.protocol.size(self.method, len(self.dataset.cases))
        return {"batch_size": size, "batches": len(self.batches), "evaluated": "after each batch", "restored": True}

    def check(self) -> None:
        self.general.require(self.job)
        super().check()

    def is_complete(self) -> bool:
        states = (0, len(self.batches[-1][1]))
        lacking = [edits for edits in states if self.general.lacks(self.job.process_group, edits)]
        return super().is_complete() and not lacking

    def work(self, lm: LM) -> None:
        self.general.ask(lm, 0)
        self.begin(lm).warm_up()
        about = self.job.about_method if self.protocol.save_edits else None
        last: dict[int, Attempt] = {}
        lines = evaluate_shared(lm, partial(self.begin, lm), self.batches, self.run, self.unedited(), about, last)
        self.write_all(lines, "cases", len(self.dataset.cases))
        self._ask_general(lm, last)

    def _ask_general(self, lm: LM, made: dict[int, Attempt]) -> None:
        """Ask downstream tasks with the last batch's edit in place. It is made again where this process, or another,
        has not got it.
        """
        (step, cases), lm.process_group = self.batches[-1], self.job.process_group
        if not self.general.lacks(lm.process_group, len(cases)):
            return
        has_it = all(lm.process_group.gather([step in made]))
        done = made[step] if has_it else attempt(self.begin(lm), cases)
        if done.edit is None:
            self.monitor.note("the last batch came to no edit, so downstream tasks are not asked again")
            return
        with lm.edited(done.edit):
            self.general.ask(lm, len(cases))

    def summary(self, lines: Sequence[Line]) -> Summary:
        return {**super().summary(lines), **downstream_of(self.run.path)}

    def write(self, line: Line) -> None:
        super().write(line)
        self.tracked.line(line)


def evaluate_shared(lm: LM, begin: Begin, batches: Batches, *rest: Any) -> Iterator[dict[str, Any]]:
    """Lines of results of all processes (see `evaluate`), in the order of the batches.

    Batches know nothing of each other: each process takes its share of them. Fewer batches than processes are edited by
    all together.
    """
    together = lm.process_group
    if len(batches) < together.size:
        return chain.from_iterable(evaluate(lm, begin, batches, *rest))
    lm.process_group = SINGLE
    return chain.from_iterable(together.merge(evaluate(lm, begin, together.share(batches), *rest), len(batches)))


def evaluate(
    lm: LM,
    begin: Begin,
    batches: Batches,
    run: SharedRun,
    before: BeforeCache,
    about: dict[str, Any] | None = None,
    last: dict[int, Attempt] | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Lines of results, a list a batch, of the cases that `run` has not finished.

    begin: makes an editor that remembers nothing. about: what saved edits say of their method; without, none is saved.
    last: is given what came of the last of the batches.

    In other company, answers differ in their last bits. So what was cut off is done again as a whole: of a window with
    unfinished cases all are edited and asked about, finished or not, as in a run that was not cut off.
    """
    asker = Asker(lm, before)
    for window in windows(batches):
        if run.finished.issuperset(case.id for _, batch in window for case in batch):
            yield from ([] for _ in window)
            continue
        with lm.monitor.phase("ask before"):
            before.observe(lm, [case for _, batch in window for case in batch])
        made = attempts(asker, begin, window, run, about)
        for (step, batch), (done, after) in zip(window, asker.answers(made), strict=True):
            wanted = [case for case in batch if case.id not in run.finished]
            if last is not None and step == batches[-1][0] and done.edit is not None:
                last[step] = done
            yield lines_of(done, wanted, step, before.observe(lm, wanted), after)


def attempts(
    asker: Asker, begin: Begin, window: Batches, run: SharedRun, about: dict[str, Any] | None
) -> Iterator[Attempt]:
    """The edits of the batches, saved if `about` says of what method.

    Those that are asked about one by one say the same in whatever company: there, finished batches are left out.
    """
    lm = asker.lm

    def finished(batch: Sequence[Case]) -> bool:
        return asker.one_by_one and run.finished.issuperset(case.id for case in batch)

    made = attempt_each(begin, [batch for _, batch in window], finished)
    for (step, _), done in zip(window, made, strict=True):
        if done.edit is not None and about is not None and lm.process_group.is_main:
            edit_store.save(done.edit, run.edits / f"{step:04d}", lm, done.requests, about)
        yield done


def lines_of(
    done: Attempt, wanted: Sequence[Case], step: int, before: Sequence[Observation], after: Seen
) -> list[dict[str, Any]]:
    """Lines of results of those `wanted` of the cases that were to be edited, with what was said before and after."""
    return [
        {
            **result_line(case, step, now, after.get(case.id), done.seconds, done.rejected.get(case.id)),
            "diagnosis": done.diagnosis,
        }
        for case, now in zip(wanted, before, strict=True)
    ]


def result_line(
    case: Case, step: int, before: Observation | None, after: Observation | None, seconds: float, error: str | None
) -> dict[str, Any]:
    """One line of results.jsonl: what was asked for, what the model said before and after, or why there is nothing
    to tell.
    """
    requests = [
        {"prompt": r.prompt, "subject": r.subject, "target_new": r.target_new, "target_true": r.target_true}
        for r in case.requests
    ]
    problem = error or next((seen["error"] for seen in (before, after) if seen and seen.get("error")), None)
    return {
        "case_id": case.id,
        "step": step,
        "requests": requests,
        "before": before,
        "after": after,
        "seconds": seconds if after is not None else None,
        "error": problem,
    }


def windows(batches: Iterable[tuple[int, list[Case]]]) -> Iterator[Batches]:
    """Batches in groups of at least WINDOW cases: what the unedited model says is asked in bulk, but not long before
    it is needed.
    """
    group: Batches = []
    for step, batch in batches:
        group.append((step, batch))
        if sum(len(cases) for _, cases in group) >= WINDOW:
            yield group
            group = []
    if group:
        yield group


def plan(job: Job, monitor: ConsoleMonitor) -> Plan:
    """What `run` would do, before it costs anything."""
    whole = Evaluate(job, monitor)
    cases, batches = whole.dataset.cases, [batch for _, batch in whole.batches]
    plan = Plan.of(whole, batches)
    plan.editing(whole.method, batches)
    plan.asking("before", cases)
    plan.asking("after", cases)
    plan.perplexity("after", len(batches) - 1)
    plan.unknown += whole.general.untold
    return plan
