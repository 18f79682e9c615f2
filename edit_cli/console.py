"""What a person sees: results on standard output; progress, notes and errors on standard error, live where that is a
terminal.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from edit_cli.files.json_files import to_json
from edit_cli.monitor import Advance, Monitor
from edit_cli.terminal import one_line, visible

STARTING, WORKING = "loading libraries", "working"
# Without a terminal, a line of progress after so many seconds; later after a twentieth of the time so far, at most:
FIRST, LONGEST = 2.0, 30.0
WHOLE = 10_000  # columns, none of which is wrapped
TICK = 0.5  # seconds between looks at the clock


class SafeConsole(Console):
    """A console to which texts from anywhere can be printed: no markup is read in them, and control characters are
    shown, not sent.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Every text passes through here, those in tables, too."""
        if isinstance(renderable, Text) and (plain := visible(renderable.plain)) != renderable.plain:
            renderable = renderable.blank_copy(plain)
        return super().render(renderable, options)


class Screen:
    """Both streams. Colors and widths are rich's business: it knows terminals, NO_COLOR and COLUMNS. Where results go
    into a file or a pipe, rows are as long as they are: ids and paths are to be found and copied there.
    """

    def __init__(self, out: Console | None = None, err: Console | None = None) -> None:
        fits = sys.stdout is None or sys.stdout.isatty() or bool(os.environ.get("COLUMNS"))
        self.out = out or SafeConsole(width=None if fits else WHOLE)
        self.err = err or SafeConsole(stderr=True)
        self.live: Live | None = None  # what is drawn below the last line, while there is something to wait for

    @classmethod
    def of(cls, process: int) -> Screen:
        """The screen of one of several processes: only the main one has something to show; nothing but errors is
        told by the others.
        """
        return cls() if process == 0 else cls(Console(quiet=True), Console(quiet=True))

    def show(self, what: RenderableType) -> None:
        """A result."""
        self.rest()
        self.out.print(what)

    def line(self, text: str) -> None:
        """A line of a result, whole however long it is: paths are made to be copied."""
        self.rest()
        self.out.print(Text(one_line(text)), soft_wrap=True)

    def json(self, value: Any) -> None:
        """A result for programs."""
        self.rest()
        self.out.print(Text(to_json(value, indent=1)), soft_wrap=True)

    def note(self, text: str) -> None:
        """A line beside the results."""
        self.err.print(Text(one_line(text)), soft_wrap=True)

    def details(self, text: str) -> None:
        """Several lines beside the results."""
        self.err.print(Text(visible(text)), soft_wrap=True)

    def error(self, text: str) -> None:
        self.rest()
        self.err.print(Text.assemble(("error:", "bold red"), f" {one_line(text)}"), soft_wrap=True)

    def rest(self) -> None:
        """Wipe what is drawn live."""
        if self.live is not None:
            self.live.stop()
            self.live = None


@dataclass
class Task:
    """Progress of one job. bar: its row in a terminal."""

    description: str
    total: int | None
    began: float
    bar: TaskID
    done: int = 0

    def told(self, now: float) -> str:
        """`scoring 40 of 960, 12 s left`"""
        # the first of a batch comes late and says nothing of the rest
        left = ""
        if self.total is not None and max(2, self.total / 50) <= self.done < self.total:
            left = f", {duration((now - self.began) / self.done * (self.total - self.done))} left"
        if not (self.done or self.total):
            return self.description
        return f"{self.description} {self.done:,}{f' of {self.total:,}' if self.total else ''}{left}"


class ConsoleMonitor(Monitor):
    """Draws what is being done, and how far it has come: live in a terminal, elsewhere in a line now and then. `log`
    gets every note too.
    """

    def __init__(self, screen: Screen, log: Callable[[str], None] | None = None) -> None:
        super().__init__()
        self.screen = screen
        self.log = log
        self._tasks: list[Task] = []
        self._doing = [(STARTING, time.monotonic())]  # what is done within what, and since when
        self._began = self._told = time.monotonic()
        self._at_work = False
        self._header = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, expand=True)
        self._row = self._header.add_task(STARTING, total=None)

    @contextmanager
    def working(self) -> Iterator[None]:
        """From here to the end of the block, nobody is left to wonder whether anything happens."""
        ended = threading.Event()
        ticker = threading.Thread(target=self._watch, args=(ended,), daemon=True)
        ticker.start()
        self._at_work = True
        self._draw()
        try:
            yield
        finally:
            self._at_work = False
            ended.set()
            ticker.join()
            self.screen.rest()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with super().phase(name):
            self._doing.append((name, time.monotonic()))
            self._head()
            try:
                yield
            finally:
                self._doing.pop()
                self._doing[0] = (WORKING, time.monotonic())
                self._head()

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        bar = self._bars.add_task(description, total=total)
        task = Task(description, total, time.monotonic(), bar=bar)
        self._tasks.append(task)
        self._draw()

        def advance(steps: int) -> None:
            task.done += steps
            self._bars.advance(bar, steps)
            self.tick()

        try:
            yield advance
        finally:
            self._tasks.remove(task)
            self._bars.remove_task(bar)

    def note(self, message: str) -> None:
        self._told = time.monotonic()
        self.screen.note(message)
        if self.log is not None:
            self.log(message)

    def tick(self) -> None:
        """Without a terminal: tell how far it has come, if nothing has been told for a while."""
        now = time.monotonic()
        if self.screen.err.is_terminal or now - self._told < min(max(FIRST, (now - self._began) / 20), LONGEST):
            return
        self._told = now
        name, since = self._doing[-1]
        tasks = [task.told(now) for task in list(self._tasks)]
        self.screen.note(" | ".join([name if tasks else f"{name}, {duration(now - since)}", *tasks]))

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(TICK):
            self.tick()

    def _head(self) -> None:
        name, _ = self._doing[-1]
        self._header.reset(self._row, description=name)
        self._draw()

    def _draw(self) -> None:
        if self._at_work and self.screen.live is None and self.screen.err.is_terminal and not self.screen.err.quiet:
            shown = Group(self._header, self._bars)
            self.screen.live = Live(
                shown, console=self.screen.err, transient=True, refresh_per_second=4, redirect_stdout=False
            )
            self.screen.live.start()


def duration(seconds: float) -> str:
    """1:02:03, or seconds where there are few."""
    return f"{seconds:.0f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
