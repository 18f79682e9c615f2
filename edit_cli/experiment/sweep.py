"""A sweep on disk, so that it can be looked at, continued and retried; and the end of a launch: the last line, or for a
sweep one table over its runs.

    RUNS_DIR/sweeps/COMMAND-DIGEST/
        sweep.json    what was typed, and what each job varies
        jobs.jsonl    a line when a job begins, and one when it ends; of each job the last line counts
        table.md, table.csv    one row a job
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from edit_cli.config import catalog
from edit_cli.config.overrides import RETRY, override_key, unquoted
from edit_cli.console import Screen
from edit_cli.distributed import follows
from edit_cli.errors import UsageError
from edit_cli.experiment.job import Outcome
from edit_cli.files.disk import telling
from edit_cli.files.json_files import read_lines, to_json, write_json
from edit_cli.files.shapes import checked
from edit_cli.report import compare
from edit_cli.report.comparison import COMPARED, LOST, Comparison
from edit_cli.report.measures import measures
from edit_cli.report.tables.sheets import Sheet, markdown
from edit_cli.runs.record import SUMMARY, read_run
from edit_cli.wording import many

FOLDER, ABOUT, JOBS, TABLE = "sweeps", "sweep.json", "jobs.jsonl", "table"
ENDED = (0, 5, 6)  # exit codes of complete runs: done, but for some cases, and until the model collapsed
SCRATCH = ".sweep"  # of Hydra and its launchers, in RUNS_DIR: conf/common.yaml
STOPPED, NEVER = "it began and did not end", "it was not begun"
NAMED = 10  # failed jobs that are named one by one


@dataclass(frozen=True)
class Line:
    """Of jobs.jsonl. exit_code: null of a job that begins."""

    number: int
    overrides: list[str]
    exit_code: int | None = None
    run_dir: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Sweep:
    """Several jobs of one command, in this process or in others that write to the same files.

    jobs: what each varies, in their order; empty where only Hydra's sweeper knows. spared: numbers of jobs that are not
    run again.
    """

    folder: Path
    command: str
    arguments: tuple[str, ...]
    jobs: tuple[tuple[str, ...], ...]
    spared: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls, command: str, arguments: Sequence[str], overrides: Sequence[str], jobs: Sequence[Sequence[str]], root: Path
    ) -> Sweep:
        """The sweep of these overrides, be it a new one or one that was begun before. How its jobs are launched is no
        part of it.

        Raises:
            MissingError: what is known of it cannot be read.
        """
        named = [text for text in overrides if not override_key(text).startswith(("hydra.", "hydra/"))]
        digest = sha256(json.dumps([command, named]).encode()).hexdigest()[:8]
        folder = root.absolute() / FOLDER / f"{command}-{digest}"
        if (file := folder / JOBS).exists():  # off goes the line that was being written when the sweep was killed
            with telling(file):
                os.truncate(file, read_lines(file)[1])
        return cls(folder, command, tuple(arguments), tuple(map(tuple, jobs)))

    @property
    def place(self) -> Path:
        """Its folder as it is shown."""
        here = Path.cwd()
        return self.folder.relative_to(here) if self.folder.is_relative_to(here) else self.folder

    def begin(self, number: int, overrides: Sequence[str]) -> None:
        """Take note that a job begins. Raises MissingError: the folder cannot be written."""
        with telling(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / ABOUT).exists():
                about = {"command": self.command, "arguments": self.arguments, "jobs": self.jobs}
                write_json(self.folder / ABOUT, about)
        self._append({"number": number, "overrides": list(overrides)})

    def end(self, outcome: Outcome) -> None:
        """Take note of how a job has ended. Raises MissingError: the folder cannot be written."""
        self._append(asdict(outcome))

    def _append(self, line: Mapping[str, Any]) -> None:
        with telling(self.folder / JOBS), open(self.folder / JOBS, "ab", buffering=0) as file:
            file.write(to_json(line).encode() + b"\n")  # in one piece: several processes append

    def outcomes(self) -> list[Outcome]:
        """How the jobs have ended, in their order; those that did not end have an error that says so. Jobs that were
        never begun are left out.

        Raises:
            MissingError: jobs.jsonl is damaged.
        """
        last: dict[int, Line] = {}
        for number, line in enumerate(read_lines(self.folder / JOBS)[0], 1):
            found = checked(line, Line, f"{self.folder / JOBS}, line {number}", "delete that line")
            last[found["number"]] = Line(**found)
        return [
            Outcome(1 if line.exit_code is None else line.exit_code, line.run_dir, number, tuple(line.overrides),
                    STOPPED if line.exit_code is None else line.error)
            for number, line in sorted(last.items())
        ]  # fmt: skip

    def missing(self, outcomes: Collection[Outcome]) -> list[int]:
        """Jobs that were never begun."""
        begun = {outcome.number for outcome in outcomes}
        return [number for number in range(len(self.jobs)) if number not in begun]

    def retried(self) -> frozenset[int]:
        """Jobs that are complete and need not be run again.

        Raises:
            UsageError: there is no such sweep.
        """
        found = self.outcomes()
        if not found:
            raise UsageError(
                f"{RETRY}: there is no such sweep in {self.place.parent}; give the command that began it, with all"
                " of its settings in the same order"
            )
        return frozenset(outcome.number for outcome in found if outcome.exit_code in ENDED)

    def progress(self) -> str:
        """How far it has come, for whoever interrupts it."""
        done = sum(outcome.exit_code in ENDED for outcome in self.outcomes())
        of = f" of {len(self.jobs):,}" if self.jobs else ""
        return f"{done:,}{of} jobs of this sweep are complete ({self.place / JOBS})"

    def awaited(self, launcher: str) -> str:
        """What there is to look at while jobs run elsewhere."""
        jobs = many(len(self.jobs), "job") if self.jobs else "the jobs"
        logs = self.place.parent.parent / SCRATCH / ".submitit"
        return (
            f"{jobs} by {launcher}: their screens are in {logs}, what has begun and ended in {self.place / JOBS}; the"
            " table follows when all have ended"
        )

    def again(self) -> str:
        """The command that runs only what has failed."""
        return shlex.join(["edit-cli", self.command, *self.arguments, RETRY])


def conclude(outcomes: Sequence[Outcome], sweep: Sweep | None = None) -> int:
    """Print where the results lie; the exit code is the worst of all jobs. sweep: the one that they are of, if it is
    kept.
    """
    screen = Screen.of(int(follows()))
    if sweep is not None:
        _show(sweep, outcomes, screen)
    for outcome in outcomes:
        if outcome.run_dir is not None:
            screen.line(outcome.run_dir)
    if sweep is not None:
        _tell_failed(sweep, outcomes, screen)
    lost = sweep is not None and bool(sweep.missing(outcomes))
    return max((outcome.exit_code for outcome in outcomes), default=0) or int(lost)


def _show(sweep: Sweep, outcomes: Sequence[Outcome], screen: Screen) -> None:
    """One table on the screen, and as files."""
    summaries = [_summary(outcome) for outcome in outcomes]
    if all(summary is None for summary in summaries):
        return
    rows = [(label(outcome), summary) for outcome, summary in zip(outcomes, summaries, strict=True)]
    screen.show(Comparison(rows))
    measured = [(name, summary) for name, summary in rows if summary is not None]
    metrics = [name for name in measures() if any(name in summary["metrics"] for _, summary in measured)]
    shown = [name for name in metrics if name in (*COMPARED, *LOST)] or metrics[:3]
    points = [
        compare.Point(name, None, metric, entry, compare.cost([summary]))
        for name, summary in measured
        for _, entries in compare.moments(summary, None, over_facts=False)
        for metric, entry in entries.items()
        if metric in metrics
    ]
    told = [Sheet("", [], [], [f"{label(one)}: {_how(one)}." for one in outcomes if one.exit_code not in ENDED])]
    texts = {
        "csv": compare.csv_text(points, None, "", []),
        "md": markdown([compare.means([one for one in points if one.metric in shown], None, shown), *told]),
    }
    for kind, text in texts.items():
        with telling(sweep.folder / f"{TABLE}.{kind}"):
            (sweep.folder / f"{TABLE}.{kind}").write_text(text, "utf-8", "backslashreplace", newline="")
    screen.line(f"table: {sweep.place / TABLE}.md and .csv")


def _tell_failed(sweep: Sweep, outcomes: Sequence[Outcome], screen: Screen) -> None:
    """Which jobs have no complete run, why, and how to run only these again."""
    failed = [f"{label(outcome)}: {_how(outcome)}" for outcome in outcomes if outcome.exit_code not in ENDED]
    failed += [f"{label(Outcome(0, None, number, sweep.jobs[number]))}: {NEVER}" for number in sweep.missing(outcomes)]
    if not failed:
        return
    screen.note(f"{many(len(failed), 'job')} of {max(len(sweep.jobs), len(outcomes)):,} came to no result:")
    for line in failed[:NAMED]:
        screen.note(f"  {line}")
    if len(failed) > NAMED:
        screen.note(f"  … and {len(failed) - NAMED:,} more, in {sweep.place / JOBS}")
    screen.note(f"only these again: {sweep.again()}")


def _how(outcome: Outcome) -> str:
    return f"{outcome.error or 'it failed'} (exit code {outcome.exit_code})"


def _summary(outcome: Outcome) -> dict[str, Any] | None:
    """What the job's run measured, if it is one that measures and came so far."""
    if outcome.run_dir is None or not (Path(outcome.run_dir) / SUMMARY).is_file():
        return None
    summary = read_run(outcome.run_dir).summary
    return summary if summary and "metrics" in summary else None


def label(outcome: Outcome) -> str:
    """What a job's run is told apart by, in short: `rome layers=[0]`."""
    parts = []
    for override in outcome.overrides:
        key, _, value = override.partition("=")
        value = unquoted(value)
        parts.append(value if key in catalog.GROUPS.values() else f"{key.rpartition('.')[2]}={value}")
    return " ".join(parts) or f"job {outcome.number}"
