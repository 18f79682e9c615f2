"""What a person sees: results on standard output; progress, notes and errors on standard error, live where that is a
terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from edit_cli.jsonfiles import to_json
from edit_cli.monitor import Advance, Monitor
from edit_cli.terminal import one_line, visible

QUIET_SECONDS = 5.0  # without a terminal, how often a line of progress is printed at most


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
    """Both streams. Colours and widths are rich's business: it knows terminals, pipes, NO_COLOR and COLUMNS."""

    def __init__(self, out: Console | None = None, err: Console | None = None) -> None:
        self.out = out or SafeConsole()
        self.err = err or SafeConsole(stderr=True)

    @classmethod
    def of(cls, process: int) -> Screen:
        """The screen of one of several processes: only the main one has something to show; nothing but errors is
        told by the others.
        """
        return cls() if process == 0 else cls(Console(quiet=True), Console(quiet=True))

    def show(self, what: RenderableType) -> None:
        """A result."""
        self.out.print(what)

    def line(self, text: str) -> None:
        """A line of a result, whole however long it is: paths are made to be copied."""
        self.out.print(Text(one_line(text)), soft_wrap=True)

    def json(self, value: Any) -> None:
        """A result for programs."""
        self.out.print(Text(to_json(value, indent=1)), soft_wrap=True)

    def note(self, text: str) -> None:
        """A line beside the results."""
        self.err.print(Text(one_line(text)), soft_wrap=True)

    def details(self, text: str) -> None:
        """Several lines beside the results."""
        self.err.print(Text(visible(text)), soft_wrap=True)

    def error(self, text: str) -> None:
        self.err.print(Text.assemble(("error:", "bold red"), f" {one_line(text)}"), soft_wrap=True)


class ConsoleMonitor(Monitor):
    """Draws progress. `log` gets every note too."""

    def __init__(self, screen: Screen, log: Callable[[str], None] | None = None) -> None:
        super().__init__()
        self.screen = screen
        self.log = log
        self._live: Progress | None = None
        self._depth = 0
        self._printed = 0.0

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        self._depth += 1
        try:
            if self.screen.err.is_terminal:
                with self._bar(description, total) as advance:
                    yield advance
            else:
                yield self._lines(description, total)
        finally:
            self._depth -= 1
            if self._depth == 0 and self._live is not None:
                self._live.stop()
                self._live = None

    def note(self, message: str) -> None:
        self.screen.note(message)
        if self.log is not None:
            self.log(message)

    @contextmanager
    def _bar(self, description: str, total: int | None) -> Iterator[Advance]:
        if self._live is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._live = Progress(*columns, console=self.screen.err, transient=True, expand=True)
            self._live.start()
        live = self._live
        task: TaskID = live.add_task(description, total=total)
        try:
            yield lambda steps: live.advance(task, steps)
        finally:
            live.remove_task(task)

    def _lines(self, description: str, total: int | None) -> Advance:
        began, done = time.monotonic(), 0

        def advance(steps: int) -> None:
            nonlocal done
            done += steps
            now = time.monotonic()
            if now - max(self._printed, began) < QUIET_SECONDS:
                return
            self._printed = now
            # the first of a batch comes late and says nothing of the rest
            enough = total is not None and max(2, total / 50) <= done < total
            left = f", {duration((now - began) / done * (total - done))} left" if enough else ""
            self.screen.note(f"{description}: {done:,}{f' of {total:,}' if total else ''}{left}")

        return advance


def duration(seconds: float) -> str:
    """1:02:03, or seconds where there are few."""
    return f"{seconds:.0f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
