"""`tune`: try settings of a method on facts put aside for that, and keep the best where every run finds them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

from torch.linalg import LinAlgError

from edit_cli.commands.evaluate import lines_of, result_line
from edit_cli.config import users
from edit_cli.config.identity import flatten
from edit_cli.console import ConsoleMonitor
from edit_cli.datasets import Dataset, Source
from edit_cli.editors.base import Context, EditorConfig, Method
from edit_cli.editors.locate.base import LocateConfig
from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.experiment.asking import Asker
from edit_cli.experiment.attempt import attempt_each
from edit_cli.experiment.base import SOME_FAILED, Experiment, Line, Summary
from edit_cli.experiment.examples import OtherRecords
from edit_cli.experiment.job import Job, Outcome
from edit_cli.experiment.plan import Plan
from edit_cli.experiment.records import records_of
from edit_cli.experiment.run_directory import run_path
from edit_cli.experiment.setup import context_of, perplexity_texts, refuse_missing
from edit_cli.files.disk import require_file, require_folder, telling, write_keeping
from edit_cli.files.paths import expanded
from edit_cli.lm.model import LM
from edit_cli.metrics.bootstrap import finite
from edit_cli.metrics.observe import BeforeCache
from edit_cli.monitor import Monitor
from edit_cli.report import tuning as report
from edit_cli.runs.run import Run, SharedRun
from edit_cli.tuning.objective import Objective, penalty, perplexities
from edit_cli.tuning.spaces import SPACES, Space, reachable_layers
from edit_cli.tuning.study import Search, require_optuna
from edit_cli.wording import many

FEWEST = 4  # facts that settings can be compared on
SPLITS = "tune", "validation"  # of embedded records: those that nothing is reported on


def run(job: Job, monitor: ConsoleMonitor) -> Outcome:
    return Tune(job, monitor).conduct()


class Tune(Experiment):
    KEY = ("trial",)
    COMPLETE = "the search is done already; more trials=N or budget=TIME would go on with it"

    def __init__(self, job: Job, monitor: ConsoleMonitor) -> None:
        self.began = time.monotonic()
        top, name = job.config.settings, job.choices["method"]
        require_optuna()
        self.space = {key: values for key, values in SPACES[name].items() if not _is_given(key, job.composed.given)}
        if not self.space:
            raise UsageError(f"every setting of method={name} that is searched is given: leave one of them out")
        dataset, self.where = facts(job.config.dataset, top.limit, monitor)
        job.config.protocol.require_facts(len(dataset.cases), monitor)
        self.out = expanded(top.out) if top.out is not None else users.tuned_file(name, job.model_name)
        what = self.out if top.out is None else f"out={top.out}"
        require_folder(self.out.parent, what)
        require_file(self.out, what)
        records = records_of(job, monitor, dataset)
        super().__init__(job, monitor, records.dataset, dataset.cases, records)
        self.trials: list[Line] = []

    def details(self) -> dict[str, Any]:
        size = self.protocol.size(self.method, len(self.dataset.cases))
        return {"batch_size": size, "facts": self.where}

    def belongs(self) -> Callable[[Any], bool]:
        return lambda identity: isinstance(identity, int)

    def is_complete(self) -> bool:
        self.trials = self.job.process_group.broadcast(self.run.lines() if isinstance(self.run, Run) else [])
        return _ended(self.trials, self.settings.trials, self.settings.seconds, 0.0)

    def load(self) -> LM:
        if self.trials:
            self.monitor.note(f"continuing: {many(len(self.trials), 'trial')} there already")
        return super().load()

    def work(self, lm: LM) -> None:
        bench = Bench(self.job, lm, self.method, self.dataset, self.context, self.space)
        bench.search(self.run, self.trials, self.began)

    def summary(self, lines: Sequence[Line]) -> Summary:
        """Raises UsageError where no trial came to anything."""
        best = report.best_first(lines)[0]
        if best["objective"] <= 0:
            why = best["error"] or "no fact took"
            raise UsageError(f"none of {many(len(lines), 'trial')} came to anything ({why}): go on with more trials=N")
        return super().summary(lines)

    def leave(self, summary: Summary, lines: Sequence[Line]) -> list[str]:
        """All trials as CSV and as a figure, and the best settings as a file."""
        rows, path = report.best_first(lines), self.run.path
        with telling(path / report.TRIALS):
            (path / report.TRIALS).write_text(report.as_csv(rows), encoding="utf-8")
        drawn = super().leave(summary, lines)
        own = flatten(self.job.config.plain["method"])  # what was given is part of what was tried
        given = {key: value for key, value in own.items() if _is_given(key, self.job.composed.given)}
        text = users.written(given | rows[0]["settings"], report.comment(summary))
        if earlier := write_keeping(self.out, text):
            self.monitor.note(f"{self.out} held other settings, which are kept as {earlier}")
        return [f"trials: {path / report.TRIALS}", *drawn, f"settings: {self.out}"]

    def exit_code(self, summary: Summary, lines: Sequence[Line]) -> int:
        return SOME_FAILED if report.best_first(lines)[0]["failed"] else 0


def facts(source: Source, limit: int | None, monitor: Monitor) -> tuple[Dataset, str]:
    """The facts that settings are tried on, and in words which they are: those that the user chose; the split that is
    for nothing else, where there is one; else the last records, which later runs had better leave out.

    Raises:
        UsageError: they are too few.
    """
    if source.split is not None or source.offset or source.ids or source.shuffle_seed is not None:
        found, where = source.load(limit, monitor), "chosen by dataset.split, offset, ids or shuffle_seed"
    elif source.path is None and source.locate(monitor).split is not None and (apart := _put_apart(source, limit)):
        found, where = apart, f"split {apart.split}, on which nothing is reported"
    else:
        whole = source.load(None, monitor)
        count = min(limit or len(whole.cases), len(whole.cases))
        first = len(whole.cases) - count
        found = replace(whole, cases=whole.cases[first:], offset=first, limit=limit)
        where = f"the last {count:,} of {len(whole.cases):,} records: leave them out of what you report (limit={first})"
        if not first:
            where = f"all {count:,} records: none is left to report on"
    if len(found.cases) < FEWEST:
        raise UsageError(
            f"{len(found.cases)} facts ({where}): settings can be compared on {FEWEST} or more; raise limit"
        )
    return found, where


def _put_apart(source: Source, limit: int | None) -> Dataset | None:
    for split in SPLITS:
        with suppress(UsageError):  # the records have no such split
            return replace(source, split=split).load(limit)
    return None


def _is_given(key: str, given: Sequence[str]) -> bool:
    return any(f"method.{key}.".startswith(f"{other}.") for other in given)


def _ended(lines: Sequence[Line], trials: int | None, budget: float, more: float) -> bool:
    """Whether no further trial is to be made, those so far and `more` seconds being spent."""
    if trials is not None and len(lines) >= trials:
        return True
    if not lines:
        return False
    usual = math.fsum(line["seconds"] for line in lines) / len(lines)
    return bool(lines[-1]["spent"] + more + usual > budget)


@dataclass
class Bench:
    """Where settings are tried: one model, the same facts, asked about once before."""

    job: Job
    lm: LM
    method: Method
    dataset: Dataset
    context: Context
    space: Space

    def search(self, run: SharedRun, lines: list[Line], began: float) -> None:
        """Try settings until trials or budget are used up; every trial is on disk when the next one begins.

        Raises:
            UsageError: the budget is used up before the first trial, or data that cannot tell settings apart.
        """
        top, lm = self.job.config.settings, self.lm
        layout = lm.layout
        search = Search(self.space, layout.depth, top.seed, self._begin_with())
        search.recall(lines)
        self._collect(reachable_layers(self.space, layout.depth))
        before, objective = self._asked()
        spent, resumed = (lines[-1]["spent"] if lines else 0.0), time.monotonic() if lines else began
        if not lines and lm.process_group.broadcast(time.monotonic() - began) > top.seconds:
            raise UsageError(
                f"budget={top.budget}: {time.monotonic() - began:.0f} s went by before a first trial (model, second"
                " moments, answers before): give several times as much"
            )
        with lm.monitor.task("trials", top.trials) as advance:
            advance(len(lines))
            while not _ended(lines, top.trials, top.seconds, 0.0):
                trial, settings = search.ask(len(lines))
                start = time.monotonic()
                line: Line = {"trial": len(lines), "parameters": trial.params, "settings": settings}
                line |= self._tried(settings, before, objective)
                now = time.monotonic()
                line |= {"seconds": now - start, "spent": spent + now - resumed}
                line = lm.process_group.broadcast(line)
                search.tell(trial, line["objective"])
                run.append(line)
                lines.append(line)
                advance(1)

    def _begin_with(self) -> dict[str, Any]:
        """The settings that stand there already, as far as they are searched: published ones, or defaults."""
        depth, found = self.lm.layout.depth, dict[str, Any]()
        for key, values in self.space.items():
            found |= values.parameters(key, _value(self.method.config, key), depth)
        return found

    def _collect(self, layers: Sequence[int]) -> None:
        """Second moments of all layers that may be tried, in one pass over the text."""
        config = self.method.config
        if layers and isinstance(config, LocateConfig) and config.use_covariance:
            config.moments.collect(self.lm, layers)

    def _asked(self) -> tuple[BeforeCache, Objective]:
        """What the unedited model says, and what counts for these data."""
        cases = self.dataset.cases
        before = BeforeCache(self.job.config.protocol.observe, perplexity_texts(self.job.config.model))
        with self.lm.monitor.phase("ask before"):
            seen = before.observe(self.lm, cases)
        objective = Objective.of(
            [result_line(case, 0, now, now, 0.0, None) for case, now in zip(cases, seen, strict=True)]
        )
        if lacking := [part for part in ("efficacy", "neighborhood") if part not in objective.metrics]:
            raise UsageError(
                f"dataset={self.dataset.name} has nothing for {lacking[0]}: without prompts that must keep their"
                " answers the strongest edit would always win; choose another data set"
            )
        return before, objective

    def _tried(self, settings: Mapping[str, Any], before: BeforeCache, objective: Objective) -> Line:
        """What settings come to. Those that the method refuses are worth nothing, and say why."""
        lm, protocol = self.lm, self.job.config.protocol
        found: list[Line] = []
        try:
            method = Method(self.method.editor, with_settings(self.method.config, settings))
            context = replace(self.context, kept={})
            method.begin(lm, context).warm_up()
            batches = protocol.batches(self.dataset.cases, method)
            made = attempt_each(partial(method.begin, lm, context), batches)
            asker = Asker(lm, before, protocol.perplexity_edits)
            for step, (batch, (done, after)) in enumerate(zip(batches, asker.answers(made), strict=True)):
                found += lines_of(done, batch, step, before.observe(lm, batch), after)
        except (UsageError, RejectedRequest, LinAlgError) as problem:
            found = [
                result_line(case, 0, now, None, 0.0, str(problem))
                for case, now in zip(self.dataset.cases, before.observe(lm, self.dataset.cases), strict=True)
            ]
        error = next((line["error"] for line in found if line["error"]), None)
        parts = objective.parts(found)
        means = objective.rows(parts).mean(axis=0)
        was, now = perplexities(found)
        factor = penalty(was, now)
        return {
            "objective": factor * float(objective.score(means)),
            "parts": dict(zip(objective.metrics, map(float, means), strict=True)),
            "perplexity": [was, None if now is None else finite(now)],
            "penalty": factor,
            "facts": {line["case_id"]: part for line, part in zip(found, parts, strict=True)},
            "metrics": dict(objective.metrics),
            "failed": sum(bool(line["error"]) for line in found),
            "error": error,
        }


def with_settings(config: EditorConfig, settings: Mapping[str, Any]) -> EditorConfig:
    """The configuration with {dotted key: value} changed. Raises as `Config`."""
    own: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        group, _, rest = key.partition(".")
        if rest:
            groups.setdefault(group, {})[rest] = value
        else:
            own[key] = value
    own |= {group: with_settings(getattr(config, group), inner) for group, inner in groups.items()}
    return replace(config, **own)


def _value(config: Any, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def plan(job: Job, monitor: ConsoleMonitor) -> Plan:
    """What `run` would do, before it costs anything."""
    top, method, protocol = job.config.settings, job.config.method, job.config.protocol
    require_optuna()
    plan, name = Plan(job), job.choices["method"]
    dataset, where = facts(job.config.dataset, top.limit, monitor)
    plan.facts(dataset.cases, f"{dataset.source} ({where})", protocol.batches(dataset.cases, method))
    searched = [key for key in SPACES[name] if not _is_given(key, job.composed.given)]
    limit = many(top.trials, "trial") if top.trials else "as many trials as the budget allows"
    plan.say("searched", f"{', '.join(searched)}; {limit}" + (f", {top.budget} at most" if top.budget else ""))
    plan.run(run_path(job, job.choices["dataset"], job.model_name), dataset)
    context = context_of(job, OtherRecords(job.config.dataset, dataset.cases, top.seed))
    plan.needs(partial(refuse_missing, job, job.config.model, method, context))
    if top.out is not None:
        plan.needs(partial(require_file, expanded(top.out), f"out={top.out}"))
    outline = plan.model()
    if outline is not None and isinstance(method.config, LocateConfig) and method.config.use_covariance:
        plan.moments(method.config.moments, reachable_layers(SPACES[name], outline.depth))
    plan.asking("before", dataset.cases)
    plan.asking("after each trial's edits", dataset.cases, top.trials or 1)
    plan.unknown.append("how long the edits of a trial take: settings that are proposed differ in it")
    return plan
