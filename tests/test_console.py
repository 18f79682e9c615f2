"""Progress and notes: live in a terminal, lines elsewhere, results apart from both."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console, Group

from edit_cli import console
from edit_cli.console import ConsoleMonitor, SafeConsole, Screen, duration
from edit_cli.terminal import visible


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

    from edit_cli.report.tables import plain_table
    from edit_cli.report.texts import Text

    (here, out, _), table = safe(terminal), plain_table(f"name {HOSTILE}", "value")
    table.add_row(HOSTILE, Text(HOSTILE, style="bold"))
    table.add_row("[link=file:///etc]x[/link] [/b] :warning:", Plain(f"plain \x1b[2J {HOSTILE}"))
    here.show(Group(Text("head ").append(HOSTILE, "dim"), table))
    printed = out.getvalue()
    assert printed.count(r"a\x1b]0;title\x07b\x1b[2Jc\x9b1md\u202ee\ud800") == 4
    assert "[link=file:///etc]x[/link] [/b] :warning:" in printed
    own = re.sub(r"\x1b\[[0-9;]*m", "", printed)  # colours are the console's own
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
