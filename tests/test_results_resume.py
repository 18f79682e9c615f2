"""Runs that were killed, torn, or wanted twice at once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edit_cli.errors import MissingError, UsageError
from edit_cli.runs.record import read_run
from edit_cli.runs.run import Run

WRITER = """
import sys
from edit_cli.runs.run import Run
with Run.open(sys.argv[1], "notes", {"seed": 0}, made_with={}) as run:
    print("open", flush=True)
    for index in range(int(sys.argv[2])):
        if str(index) not in run.finished:
            run.append({"case_id": str(index), "text": "x" * 20000})
    run.write_summary({"n": len(run.lines())})
"""
HOLDER = """
import sys
from edit_cli.runs.run import Run
with Run.open(sys.argv[1], "notes", {"seed": 0}, made_with={}):
    print("open", flush=True)
    sys.stdin.read()
"""


def start(path: Path) -> Run:
    return Run.open(path, "notes", {"seed": 0}, made_with={})


def process(code: str, *arguments: object) -> subprocess.Popen:
    """A process that has opened its run."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "open\n"
    return child


def wait_for(path: Path, size: int) -> None:
    for _ in range(2000):
        if path.exists() and path.stat().st_size > size:
            return
        time.sleep(0.005)
    raise AssertionError(f"{path} never grew beyond {size} bytes")


def test_kill_9_at_any_moment(tmp_path):
    results = tmp_path / "run" / "results.jsonl"
    for lines_more in (1, 30, 90):
        before = results.stat().st_size if results.exists() else 0
        with process(WRITER, tmp_path / "run", 10**9) as child:
            wait_for(results, before + lines_more * 20000)
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
        record = read_run(tmp_path / "run")
        assert record.status == "interrupted" and record.manifest["status"] == "started"
        assert len(record.lines) >= lines_more
        assert [line["case_id"] for line in record.lines] == [str(i) for i in range(len(record.lines))]
    cases = len(record.lines) + 5
    with process(WRITER, tmp_path / "run", cases) as child:
        child.wait()
    assert child.returncode == 0
    record = read_run(tmp_path / "run")
    assert record.status == "success" and record.summary is not None and record.summary["n"] == cases
    assert [line["case_id"] for line in record.lines] == [str(i) for i in range(cases)]


@pytest.mark.parametrize(
    "torn", [b"{", b'{"case_id": "2", "te', b'{"case_id": "2"}', b"\0\0\0", b"\0\0\0\n", b'{"case_id"\n']
)
def test_a_torn_last_line_is_dropped_and_done_again(tmp_path, torn):
    with start(tmp_path / "run") as run:
        run.append({"case_id": "1"})
    results = tmp_path / "run" / "results.jsonl"
    whole = results.read_bytes()
    results.write_bytes(whole + torn)
    assert [line["case_id"] for line in read_run(tmp_path / "run").lines] == ["1"]
    with start(tmp_path / "run") as run:
        assert run.finished == {"1"}
        assert results.read_bytes() == whole
        run.append({"case_id": "2"})
    assert [json.loads(text)["case_id"] for text in results.read_text().splitlines()] == ["1", "2"]


def test_a_damaged_line_in_the_middle_is_not_passed_over(tmp_path):
    with start(tmp_path / "run") as run:
        run.append({"case_id": "1"})
    results = tmp_path / "run" / "results.jsonl"
    results.write_bytes(b"{broken\n" + results.read_bytes())
    with pytest.raises(MissingError, match="line 1, is damaged: delete that line"):
        start(tmp_path / "run")


def test_half_written_json_of_a_killed_process_is_cleared_away(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".manifest.json.999").write_text('{"schema')
    with start(tmp_path / "run"):
        assert not (tmp_path / "run" / ".manifest.json.999").exists()


def test_two_processes_may_not_write_to_one_run(tmp_path):
    with process(HOLDER, tmp_path / "run") as child:
        for config, overwrite in (({"seed": 0}, False), ({"seed": 1}, True)):
            with pytest.raises(UsageError, match="another process is writing"):
                Run.open(tmp_path / "run", "notes", config, overwrite=overwrite, made_with={})
        assert read_run(tmp_path / "run").status == "started"
        child.kill()
    with start(tmp_path / "run"):
        pass  # the lock went with the process


def test_a_refused_run_does_not_stay_locked(tmp_path):
    with start(tmp_path / "run") as run:
        run.append({"case_id": "1"})
    with pytest.raises(UsageError, match="another configuration"):
        Run.open(tmp_path / "run", "notes", {"seed": 1}, made_with={})
    with start(tmp_path / "run"):
        pass


FULL_DISK = """
import resource, sys
from edit_cli.errors import MissingError
from edit_cli.runs.run import Run
run = Run.open(sys.argv[1], "notes", {"seed": 0}, made_with={})
run.append({"case_id": "1"})
limit = (run.path / "results.jsonl").stat().st_size + 10
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    run.append({"case_id": "2", "text": "x" * 100})
except MissingError as error:
    print(error)
"""


def test_a_line_that_the_disk_does_not_take_leaves_nothing_behind(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "run")], capture_output=True, text=True, check=True
    )
    assert "results.jsonl cannot be written" in done.stdout
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == b'{"case_id": "1"}\n'
    with start(tmp_path / "run") as run:
        assert run.finished == {"1"}
