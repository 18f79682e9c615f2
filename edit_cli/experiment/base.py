"""What every command is that leaves a run: it opens the run's directory, loads the model, writes the lines that are not
there yet, and concludes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from edit_cli.console import ConsoleMonitor
from edit_cli.datasets import Dataset
from edit_cli.editors.base import Editor
from edit_cli.experiment.examples import OtherRecords
from edit_cli.experiment.job import Job, Outcome
from edit_cli.experiment.records import Records
from edit_cli.experiment.run_directory import opened, recorded, run_path
from edit_cli.experiment.setup import context_of, load_model, perplexity_texts, refuse_missing
from edit_cli.experiment.tracking import Tracking, tracking
from edit_cli.experiment.tracking import require as require_trackers
from edit_cli.lm.chat import ALL_PLAIN, ChatOptions, hint
from edit_cli.lm.model import LM
from edit_cli.metrics.observe import BeforeCache
from edit_cli.monitor import Monitor
from edit_cli.report.kinds import Line, Summary, report_of
from edit_cli.requests import Case
from edit_cli.runs.record import SUMMARY
from edit_cli.runs.run import Run, SharedRun

SOME_FAILED = 5  # exit code
NAMED = 5  # failed cases that are named one by one


class Experiment(ABC):
    """One job at work. Its steps are methods, in the order in which `conduct` takes them; a command says what is its
    own of each.

    Attributes:
        KEY: fields that tell the lines of its run apart.
        COMPLETE: what is said of a run in which nothing is left to do.
        SHOWN_IN_SWEEPS: whether each run of a sweep shows its table; else one table stands for all of them.
        context: what its editors are handed.
        run: its run, while it is open. tracked: tells trackers how it goes.
    """

    KEY: ClassVar[tuple[str, ...]] = ("case_id",)
    COMPLETE: ClassVar[str]
    SHOWN_IN_SWEEPS: ClassVar[bool] = False
    run: SharedRun
    tracked: Tracking

    def __init__(
        self,
        job: Job,
        monitor: ConsoleMonitor,
        dataset: Dataset,
        asked: Sequence[Case] | None = None,
        records: Records | None = None,
    ):
        """asked: cases, as the data have them, of which no editor may remember a prompt; None: editors have nothing to
        remember. records: where `dataset` is from, of commands that choose form and knowledge.
        """
        config = job.config
        self.job, self.monitor, self.dataset = job, monitor, dataset
        self.settings, self.protocol, self.model, self.method = (
            config.settings,
            config.protocol,
            config.model,
            config.method,
        )
        self.loaded = records and records.lm
        forms = records.forms if records else ALL_PLAIN
        source = records.source if records else config.dataset
        others = None if asked is None else OtherRecords(source, asked, self.settings.seed, forms)
        self.context = context_of(job, others)
        self.timer = PhaseTimer(monitor)

    def conduct(self) -> Outcome:
        """All of it. Raises as `Run.open` and `recorded`."""
        path, about = self.path(), {"protocol": self.details(), "dataset": self.dataset.describe()}
        require_trackers(self.job)
        self.run = opened(self.job, path, about, self.KEY, self.check, self.belongs())
        with recorded(self.run, self.job.process_group, self.monitor), tracking(self.job, self.run) as self.tracked:
            if self.is_complete():
                self.monitor.note(self.COMPLETE)
            else:
                self.work(self.load())
            return self.conclude()

    # --- the run's directory ------------------------------------------------------------------------------------------

    def path(self) -> Path:
        """Where the run lies."""
        return run_path(self.job, self.job.choices["dataset"], self.job.model_name)

    @abstractmethod
    def details(self) -> dict[str, Any]:
        """How facts come to be edited and asked about, for the manifest's `protocol`."""

    def check(self) -> None:
        """Refuse what cannot come to anything, before anything is replaced or loaded. Raises as `refuse_missing`."""
        refuse_missing(self.job, self.model, self.method, self.context)

    def belongs(self) -> Callable[[Any], bool]:
        """What tells whether a line of an identity can be one of this run's."""
        return frozenset(self.dataset.ids).__contains__

    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.run.finished.issuperset(self.dataset.ids)

    def is_summarized(self) -> bool:
        """Whether the last thing that a run writes is there."""
        return self.job.process_group.broadcast((self.run.path / SUMMARY).exists())

    # --- the model ----------------------------------------------------------------------------------------------------

    def load(self) -> LM:
        """The job's model, once it is known to suit method and data: asking it anything may take hours.

        Raises:
            As `check`, `ModelOptions.load` and `refuse_unfit`.
        """
        with self.monitor.phase("load model"):
            self.check()
            if hasattr(self.protocol, "observe"):
                self.protocol.observe.judge.try_out()
        lm = self.loaded or load_model(self.model, self.monitor, self.job.process_group)
        self.refuse_unfit(lm)
        if isinstance(self.protocol, ChatOptions) and (told := hint(lm, self.protocol)):
            self.monitor.note(told)
        return lm

    def refuse_unfit(self, lm: LM) -> None:
        """Refuse a model of a kind that does not suit method or data, or that lacks a layer (UsageError)."""
        self.begin(lm)
        self.dataset.refuse_unfit(getattr(lm.head, "labels", None), lm.name, lm.head.READS)
        lm.head.refuse_unfit([request.text for case in self.dataset.cases for request in case.requests])

    def begin(self, lm: LM) -> Editor[Any]:
        """An editor that remembers nothing yet."""
        return self.method.begin(lm, self.context)

    def unedited(self) -> BeforeCache:
        """What the unedited model says, as it comes to be asked."""
        return BeforeCache(self.protocol.observe, perplexity_texts(self.model))

    # --- the lines ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def work(self, lm: LM) -> None:
        """Write the lines that are not there yet."""

    def write_all(
        self, lines: Iterator[Line], unit: str, total: int, counts: Callable[[Any], bool] = lambda identity: True
    ) -> None:
        """Write lines as they come; each is on disk when the next one is asked for.

        counts: whether a line of an identity is one of the `total` units that progress is counted in.
        """
        if known := sum(map(counts, self.run.finished)):
            self.monitor.note(f"continuing: {known:,} of {total:,} {unit} are there already")
        with self.monitor.task(unit, total) as advance:
            advance(known)
            for line in lines:
                self.write(line)
                advance(counts(self.run.identity(line)))

    def write(self, line: Line) -> None:
        """Add a line, with its seconds by phase."""
        self.run.append({**line, "phases": self.timer.take()})

    # --- the end ------------------------------------------------------------------------------------------------------

    def conclude(self) -> Outcome:
        """Write the summary and what else the run leaves, and show the table."""
        run = self.run
        if not isinstance(run, Run):
            return Outcome(0, str(run.path))
        lines = run.lines()
        with self.monitor.phase("score"):
            summary = self.summary(lines)
        run.write_summary(summary)
        self.tracked.end(summary)
        left = self.leave(summary, lines)
        if self.SHOWN_IN_SWEEPS or not self.job.in_sweep:
            self.monitor.screen.show(report_of(run.manifest).table(summary, lines))
            for what in left:
                self.monitor.screen.line(what)
        return Outcome(self.exit_code(summary, lines), str(run.path))

    def summary(self, lines: Sequence[Line]) -> Summary:
        """The content of summary.json."""
        manifest = self.run.manifest
        return report_of(manifest).summary(manifest, lines, self.dataset.references, self.timer.take())

    def leave(self, summary: Summary, lines: Sequence[Line]) -> list[str]:
        """Write what else the run leaves; a line for each file that says where it lies."""
        if not self.settings.figures:
            return []
        drawn = report_of(self.run.manifest).draw(summary, self.run.path)
        return [f"figure: {self.run.path / name}.png" for name in drawn]

    def exit_code(self, summary: Summary, lines: Sequence[Line]) -> int:
        """How it went. Failed cases are named with their reasons."""
        failed = [line for line in lines if line["error"]]
        for line in failed[:NAMED]:
            self.monitor.note(f"case {line['case_id']} failed: {line['error']}")
        if len(failed) > NAMED:
            where = self.run.path / "results.jsonl"
            self.monitor.note(f"… and {len(failed) - NAMED:,} more failed; all reasons are in {where}")
        return SOME_FAILED if failed else 0


class PhaseTimer:
    """Seconds by phase since they were last asked for: every line of results takes its share, so that a killed run
    keeps them.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._taken: dict[str, float] = {}

    def take(self) -> dict[str, float]:
        """{phase: seconds} since the last call."""
        now = dict(self._monitor.seconds)
        spent = {phase: round(seconds - self._taken.get(phase, 0.0), 4) for phase, seconds in now.items()}
        self._taken = now
        return {phase: seconds for phase, seconds in spent.items() if seconds > 0}
