"""What a long computation tells the outside: phases (where the time goes), progress and notes.

The library calls a `Monitor` and never prints; `console.ConsoleMonitor` draws what it is told.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]
PHASE = "edit_cli_phase"  # attribute of an error


def failed_in(error: BaseException) -> str | None:
    """The innermost phase that the error came from."""
    return vars(error).get(PHASE)


class Monitor:
    """Sums seconds by phase and swallows progress. Phases may nest: time counts for the innermost one only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[tuple[str, float]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside under `name` (seconds, wall clock). An error that leaves it says so (`failed_in`)."""
        self._charge()
        self._stack.append((name, time.perf_counter()))
        try:
            yield
        except Exception as error:
            vars(error).setdefault(PHASE, name)  # the innermost one
            raise
        finally:
            self._charge()
            self._stack.pop()
            if self._stack:
                self._stack[-1] = (self._stack[-1][0], time.perf_counter())

    def _charge(self) -> None:
        if self._stack:
            name, since = self._stack[-1]
            now = time.perf_counter()
            self.seconds[name] += now - since
            self._stack[-1] = (name, now)

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        """Progress of one job: yields `advance(steps)`. `total` may be unknown (None)."""
        yield lambda steps: None

    def counted(self, description: str, total: int) -> Iterator[int]:
        """0, 1, … total − 1, as a task of so many steps: for loops that may end early."""
        with self.task(description, total) as advance:
            for number in range(total):
                yield number
                advance(1)

    def note(self, message: str) -> None:
        """Something the user should know, said once and at once."""
