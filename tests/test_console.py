"""Progress and notes: live in a terminal, lines elsewhere, results apart from both."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from edit_cli import console
from edit_cli.console import ConsoleMonitor, Screen, duration


def screen(terminal: bool = False) -> Screen:
    return Screen(
        Console(file=io.StringIO(), width=80),
        Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None),
    )


def test_results_and_the_rest_go_different_ways():
    here = screen()
    here.line("result " + "x" * 200)
    here.note("[note]")
    here.error("[what] is wrong")
    assert here.out.file.getvalue() == "result " + "x" * 200 + "\n"
    assert here.err.file.getvalue() == "[note]\nerror: [what] is wrong\n"


def test_notes_are_logged_too():
    logged: list[str] = []
    monitor = ConsoleMonitor(screen(), logged.append)
    monitor.note("said once")
    assert logged == ["said once"]
    assert monitor.screen.err.file.getvalue() == "said once\n"


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

    moved = Clock()
    monkeypatch.setattr(console, "time", moved)
    return moved


def test_without_a_terminal_progress_is_a_line_every_few_seconds(clock):
    monitor = ConsoleMonitor(screen())
    with monitor.task("cases", 100) as advance:
        for _ in range(50):
            clock.now += 0.5
            advance(1)
    lines = monitor.screen.err.file.getvalue().splitlines()
    assert lines == [f"cases: {n} of 100, {round(25 / 50 * (100 - n))} s left" for n in (10, 20, 30, 40, 50)]


def test_short_tasks_say_nothing_without_a_terminal(clock):
    monitor = ConsoleMonitor(screen())
    for _ in range(100):
        with monitor.task("short", 1) as advance:
            clock.now += 1
            advance(1)
    assert monitor.screen.err.file.getvalue() == ""


def test_tasks_of_unknown_length_count(clock):
    monitor = ConsoleMonitor(screen())
    with monitor.task("documents", None) as advance:
        clock.now += 6
        advance(1234)
    assert monitor.screen.err.file.getvalue() == "documents: 1,234\n"


def test_in_a_terminal_nested_tasks_are_drawn_and_leave_nothing_behind():
    monitor = ConsoleMonitor(screen(terminal=True))
    with monitor.task("cases", 2) as outer, monitor.task("scoring", 5) as inner:
        inner(5)
        outer(1)
        drawn = monitor._live
        assert [(task.description, task.completed) for task in drawn.tasks] == [("cases", 1), ("scoring", 5)]
    assert monitor._live is None
    assert not drawn.tasks
    with pytest.raises(KeyboardInterrupt), monitor.task("cases", 2):
        raise KeyboardInterrupt
    assert monitor._live is None


@pytest.mark.parametrize(("seconds", "told"), [(0.4, "0 s"), (59, "59 s"), (61, "0:01:01"), (3723, "1:02:03")])
def test_durations(seconds, told):
    assert duration(seconds) == told
