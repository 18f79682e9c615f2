"""Progress and notes: live in a terminal, lines elsewhere, results apart from both."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, Group

from edit_cli import console
from edit_cli.console import WHOLE, ConsoleMonitor, SafeConsole, Screen, duration
from edit_cli.report.tables.listing import runs_list
from edit_cli.terminal import visible


def screen(terminal: bool = False) -> Screen:
    return Screen(
        Console(file=io.StringIO(), width=80),
        Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None),
    )


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def written(monitor: ConsoleMonitor) -> str:
    return printed(monitor.screen.err)


def test_results_and_the_rest_go_different_ways():
    here = screen()
    here.line("result " + "x" * 200)
    here.note("[note]")
    here.error("[what] is wrong")
    assert printed(here.out) == "result " + "x" * 200 + "\n"
    assert printed(here.err) == "[note]\nerror: [what] is wrong\n"


def test_notes_are_logged_too():
    logged: list[str] = []
    monitor = ConsoleMonitor(screen(), logged.append)
    monitor.note("said once")
    assert logged == ["said once"]
    assert written(monitor) == "said once\n"


HOSTILE = "a\x1b]0;title\x07b\x1b[2Jc\x9b1md\u202ee\ud800\rf"
HARMLESS = r"a\x1b]0;title\x07b\x1b[2Jc\x9b1md\u202ee\ud800\x0df"
CONTROLS = {chr(code) for code in (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def safe(terminal: bool = False) -> tuple[Screen, io.StringIO, io.StringIO]:
    """What a person sees, as wide as needed, and what is sent to both streams."""
    out, err = io.StringIO(), io.StringIO()
    return Screen(*(SafeConsole(file=file, width=400, force_terminal=terminal) for file in (out, err))), out, err


def test_control_characters_are_shown_and_not_sent():
    here, out, err = safe()
    for tell in (here.line, here.note, here.error, here.details, here.json):
        tell(HOSTILE)
    here.note("one\nline\tonly")
    shown = err.getvalue()
    assert out.getvalue().splitlines()[0] == HARMLESS
    assert shown == f"{HARMLESS}\nerror: {HARMLESS}\n{HARMLESS}\none\\nline       only\n"
    assert not CONTROLS & set(shown + out.getvalue()) - {"\n"}
    assert visible("two\nlines\tof text") == "two\nlines\tof text"


@pytest.mark.parametrize("terminal", [False, True])
def test_tables_show_control_characters_markup_and_emoji_codes_as_they_are(terminal):
    from rich.text import Text as Plain

    from edit_cli.report.tables.run import plain_table
    from edit_cli.report.tables.texts import Text

    (here, out, _), table = safe(terminal), plain_table(f"name {HOSTILE}", "value")
    table.add_row(HOSTILE, Text(HOSTILE, style="bold"))
    table.add_row("[link=file:///etc]x[/link] [/b] :warning:", Plain(f"plain \x1b[2J {HOSTILE}"))
    here.show(Group(Text("head ").append(HOSTILE, "dim"), table))
    printed = out.getvalue()
    assert printed.count(r"a\x1b]0;title\x07b\x1b[2Jc\x9b1md\u202ee\ud800") == 4
    assert "[link=file:///etc]x[/link] [/b] :warning:" in printed
    own = re.sub(r"\x1b\[[0-9;]*m", "", printed)  # colors are the console's own
    assert not CONTROLS & set(own) - {"\n"}


def test_texts_are_made_where_control_characters_are_shown():
    """Of rich's own texts only those of the console's: its last net lets nothing through, but what it drops is not
    seen.
    """
    package = Path(console.__file__).parent
    users = {path.name for path in package.rglob("*.py") if re.search(r"rich\.text|rich import text", path.read_text())}
    assert users == {"console.py", "texts.py"}


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


def test_columns_that_are_set_to_nothing_are_not_set(monkeypatch):
    """Rows that go into a pipe are as long as they are."""
    for value, width in (("", WHOLE), ("90", 90)):
        monkeypatch.setenv("COLUMNS", value)
        monkeypatch.setattr("sys.stdout", io.StringIO())
        assert Screen().out.width == width


def test_lists_of_runs_tell_two_scores_apart():
    def run(*names):
        return {"path": names[0], "status": "success", "started": None, "n": 1, "failed": 0,
                "metrics": {name: {"after": {"mean": 1.0, "n": 1}} for name in names}}  # fmt: skip

    def heads(*rows):
        table: Any = runs_list(rows)
        return [column.header for column in table.columns][4:]

    assert heads(run("score")) == heads(run("token_score")) == ["score"]
    assert heads(run("score"), run("token_score")) == ["Score S", "Score S (tokens)"]
