"""What trackers are told of a run that edits: the means of every window of cases, or of every checkpoint, and those at
the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from edit_cli.config.identity import flatten
from edit_cli.experiment.job import Job
from edit_cli.metrics.summarize import summarize
from edit_cli.runs.run import Run, SharedRun
from edit_cli.training import trackers

KEY, PROJECT = "trackers", "edit-cli"
WINDOW = 100  # cases whose means are told together

Line = Mapping[str, Any]


class Tracking:
    """Tells trackers of accelerate how a run goes. This one has none to tell."""

    def line(self, line: Line) -> None:
        """A case more; once there is a window of them, their means."""

    def means(self, found: Mapping[str, Mapping[str, Any]], edits: int) -> None:
        """{metric: entry} at a checkpoint after so many facts."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """The means at the end, by moment."""


SILENT = Tracking()


class Told(Tracking):
    """With trackers to tell.

    Args:
        log: tells the trackers.
        done: cases that were there already.
    """

    def __init__(self, log: trackers.Log, done: int) -> None:
        self.log, self.done = log, done
        self.window: list[Line] = []

    def line(self, line: Line) -> None:
        self.window.append(line)
        self.done += 1
        if len(self.window) == WINDOW:
            self._close()

    def means(self, found: Mapping[str, Mapping[str, Any]], edits: int) -> None:
        self._log({f"checkpoint/{name}": entry["mean"] for name, entry in found.items()}, edits)

    def end(self, summary: Mapping[str, Any]) -> None:
        if self.window:
            self._close()
        entries = {
            f"{moment}/{name}": entry["mean"]
            for name, moments in summary["metrics"].items()
            for moment, entry in moments.items()
        }
        self._log({**entries, "seconds_per_edit": summary["seconds_per_edit"]}, max(self.done, summary["n"]))

    def _close(self) -> None:
        means = summarize(self.window)
        self._log(
            {f"window/{name}": sides["after"]["mean"] for name, sides in means.items() if "after" in sides}, self.done
        )
        self.window = []

    def _log(self, values: Mapping[str, float | None], step: int) -> None:
        """Means that are not finite are left out: trackers draw them as nothing, or as 0."""
        self.log({name: value for name, value in values.items() if value is not None}, step)


def require(job: Job) -> None:
    """Raises:
    UsageError: a tracker that accelerate does not know, or that is not installed.
    """
    trackers.require(job.config.settings.trackers, KEY)


@contextmanager
def tracking(job: Job, run: SharedRun) -> Iterator[Tracking]:
    """The trackers of the job, at work for the block; only the main process tells them anything. Those that write files
    do so in the run's directory.
    """
    names: Sequence[str] = job.config.settings.trackers
    if not names or not isinstance(run, Run):
        yield SILENT
        return
    with trackers.reporting(names, PROJECT, run.path, _plain(job.config.plain)) as log:
        yield Told(log, len({line["case_id"] for line in run.lines()}) if run.finished else 0)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them: numbers, truth values and texts."""
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in flatten(config).items()
    }
