"""Progress and notes: live in a terminal, lines elsewhere, results apart from both."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from edit_cli import console
from edit_cli.console import ConsoleMonitor, Screen, duration


def screen(terminal: bool = False) -> Screen:
    return Screen(
        Console(file=io.StringIO(), width=80),
        Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None),
    )


def written(monitor: ConsoleMonitor) -> str:
    return monitor.screen.err.file.getvalue()  # type: ignore[attr-defined]


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
    assert written(monitor) == "said once\n"


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


def test_without_a_terminal_progress_is_a_line_now_and_then(clock):
    monitor = ConsoleMonitor(screen())
    with monitor.phase("ask before"), monitor.task("cases", 100) as advance:
        for _ in range(20):
            clock.now += 0.5
            advance(1)
    left = [round(0.5 * (100 - n)) for n in (4, 8, 12, 16, 20)]
    expected = [f"ask before | cases {n} of 100, {s} s left" for n, s in zip((4, 8, 12, 16, 20), left, strict=True)]
    assert written(monitor).splitlines() == expected


def test_lines_become_rarer_in_long_runs(clock):
    monitor = ConsoleMonitor(screen())
    with monitor.task("facts", None) as advance:
        for _ in range(10 * 3600):
            clock.now += 1
            advance(1)
    assert len(written(monitor).splitlines()) < 10 * 3600 / 25
    assert written(monitor).splitlines()[0] == "loading libraries | facts 2"


def test_what_takes_long_is_named_though_it_tells_nothing_of_itself(clock):
    monitor = ConsoleMonitor(screen())
    clock.now += 3
    monitor.tick()
    with monitor.phase("load model"):
        clock.now += 1
        monitor.tick()  # too soon
        clock.now += 1
        monitor.tick()
    clock.now += 2
    monitor.tick()
    assert written(monitor).splitlines() == ["loading libraries, 3 s", "load model, 2 s", "working, 2 s"]


def test_the_whole_and_its_part_are_told_together(clock):
    monitor = ConsoleMonitor(screen())
    with monitor.task("cases", 100), monitor.task("scoring", 900) as inner:
        clock.now += 3
        inner(90)
    assert written(monitor) == "loading libraries | cases 0 of 100 | scoring 90 of 900, 27 s left\n"


def test_somebody_looks_at_the_clock_while_nothing_is_told(monkeypatch):
    monkeypatch.setattr(console, "FIRST", 0.0)
    monkeypatch.setattr(console, "TICK", 0.001)
    monitor = ConsoleMonitor(screen())
    with monitor.working(), monitor.phase("load model"):
        deadline = time.monotonic() + 10
        while "load model" not in written(monitor) and time.monotonic() < deadline:
            time.sleep(0.001)
    assert "load model, 0 s" in written(monitor)
    told = written(monitor)
    time.sleep(0.01)
    assert written(monitor) == told  # nobody any more


def test_in_a_terminal_nested_tasks_are_drawn_and_leave_nothing_behind():
    monitor = ConsoleMonitor(screen(terminal=True))
    with monitor.working():
        assert monitor.screen.live is not None
        with monitor.phase("ask"), monitor.task("cases", 2) as outer, monitor.task("scoring", 5) as inner:
            inner(5)
            outer(1)
            assert [(task.description, task.completed) for task in monitor._bars.tasks] == [
                ("cases", 1),
                ("scoring", 5),
            ]
            assert [task.description for task in monitor._header.tasks] == ["ask"]
        assert not monitor._bars.tasks
        monitor.screen.line("a result")
        assert monitor.screen.live is None  # nothing is drawn over it
    assert monitor.screen.out.file.getvalue() == "a result\n"
    with pytest.raises(KeyboardInterrupt), monitor.working(), monitor.task("cases", 2):
        raise KeyboardInterrupt
    assert monitor.screen.live is None


@pytest.mark.parametrize(("seconds", "told"), [(0.4, "0 s"), (59, "59 s"), (61, "0:01:01"), (3723, "1:02:03")])
def test_durations(seconds, told):
    assert duration(seconds) == told
