"""One run on two processes: it really is two, they give what one gives, and none waits for one that has died."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import QUICK, json_lines, nearly, observations
from safetensors.torch import load_file

from edit_cli.distributed import SINGLE, ProcessGroup, _alone

MEMIT = ("method=memit", "method.value.steps=6")


def identity(line: dict) -> str:
    return str([line["case_id"], line.get("when"), line.get("edits")])


def lines(run: str) -> list[dict]:
    return sorted(observations(Path(run)), key=identity)


def summary(run: str) -> dict:
    return json.loads(Path(run, "summary.json").read_text())


def members(run: str) -> list[int]:
    """The ids of the processes that took part, as they told each other."""
    found = re.findall(r"\d+ processes: ([\d, ]+)", Path(run, "log.txt").read_text())
    return [int(number) for number in found[-1].split(",")]


def on_one_and_on_two(cli, *arguments: str) -> None:
    """Run the command on one process as `one`, and on two as `two`, and see that there were two and that they found
    the same.
    """
    for name, processes in (("one", 1), ("two", 2)):
        ended = cli(*arguments, f"run_dir={name}", f"processes={processes}", quick="trace" not in arguments)
        assert ended.code == 0, ended.err
    assert len(set(members("two")) - {os.getpid()}) == 2
    assert json.loads(Path("two/manifest.json").read_text())["processes"] == 2
    assert not Path("one/log.txt").exists() or "processes" not in Path("one/log.txt").read_text()
    assert lines("two") == lines("one")
    assert summary("two").get("metrics") == nearly(summary("one").get("metrics"))


def edits(run: str) -> dict[str, torch.Tensor]:
    files = sorted(Path(run, "edits").rglob("*.safetensors"))
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def test_alone_everything_is_the_identity():
    tensor, generator = torch.ones(2), iter([5, 6])
    assert SINGLE.share([3, 4]) == SINGLE.gather([3, 4]) == [3, 4]
    assert list(SINGLE.merge(generator, 2)) == [5, 6]
    assert SINGLE.sum(tensor) is tensor
    assert SINGLE.broadcast("x") == "x"
    assert SINGLE.is_main


def test_every_item_is_in_one_share():
    shares = [ProcessGroup(rank, 3).share(range(8)) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_a_row_is_sent_without_the_matrix_that_it_is_a_row_of():
    matrix = torch.arange(800.0).view(100, 8)
    sent, number = _alone((matrix[3], 1.5))
    assert torch.equal(sent, matrix[3]) and number == 1.5
    assert sent.untyped_storage().nbytes() == 8 * 4


def test_one_batch_is_edited_by_both(cli):
    """Values are optimized and cases asked about by halves; what comes out is one edit."""
    on_one_and_on_two(cli, "evaluate", *MEMIT, "limit=5", "protocol.batch_size=all", "protocol.save_edits=true")
    one, two = edits("one"), edits("two")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (two[name] - tensor).double().norm() <= 1e-5 * tensor.double().norm(), name


@pytest.mark.slow
def test_batches_are_dealt_out(cli):
    on_one_and_on_two(cli, "evaluate", "method=ft", "method.steps=5", "limit=3")
    assert [line["step"] for line in json_lines(Path("two/results.jsonl"))] == [0, 1, 2]
    assert summary("two")["processes"] == 2


@pytest.mark.slow
def test_a_sequence_is_the_same(cli):
    on_one_and_on_two(
        cli, "sequential", *MEMIT, "method=alphaedit", "limit=6", "protocol.batch_size=3", "protocol.holdout=3"
    )
    for name, tensor in edits("one").items():
        assert (edits("two")[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


@pytest.mark.slow
def test_tracing_is_shared(cli):
    on_one_and_on_two(cli, "trace", "limit=3", "model.device=cpu")


@pytest.mark.slow
def test_text_is_shared(cli):
    """Both halves of the text are in the second moments, which one process writes."""
    text = ("corpus=file", "corpus.path=text.txt", "layers=[0,2]", "stats.batch_tokens=64", "model.device=cpu")
    Path("text.txt").write_text(
        "\n".join(f"line {number} tells of {'something ' * (number % 7)}" for number in range(200))
    )
    for name, processes in (("one", 1), ("two", 2)):
        assert cli("precompute-stats", *text, f"cache_dir={name}", f"processes={processes}").code == 0
    one, two = (sorted(Path(name).rglob("layer*.safetensors")) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    assert len(one) == 2
    for first, second in zip(one, two, strict=True):
        moment = load_file(first)["second_moment"]
        assert moment.dtype == torch.float64
        assert (load_file(second)["second_moment"] - moment).norm() <= 1e-7 * moment.norm()


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "edit_cli", *arguments, *QUICK],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # tests that run in the background would hand on that it is ignored
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_lines(run: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "results.jsonl").exists() or len(json_lines(run / "results.jsonl")) < count:
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_run_and_what_is_finished_stays(cli, tmp_path, rank):
    arguments = ("evaluate", "method=ft", "method.steps=30", "limit=24", "protocol.observe.perplexity=false")
    running = start(*arguments, "processes=2", "run_dir=cut")
    wait_for_lines(tmp_path / "cut", 2)
    os.kill(members("cut")[rank], signal.SIGKILL)
    _, err = running.communicate(timeout=300)
    assert running.returncode == 1
    assert f"process {rank} of 2 was killed (SIGKILL)" in err
    assert "Traceback" not in err
    done = json_lines(tmp_path / "cut/results.jsonl")
    assert 2 <= len(done) < 24
    shown = cli("ls", "runs", "--runs-dir", ".")
    assert ("failed" if rank else "interrupted") in shown.out
    ended = cli(*arguments, *QUICK, "run_dir=cut", "figures=false")
    assert ended.code == 0, ended.err
    assert json_lines(tmp_path / "cut/results.jsonl")[: len(done)] == done
    assert summary("cut")["n"] == 24


@pytest.mark.slow
def test_an_interruption_reaches_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    running = start("evaluate", "method=ft", "method.steps=30", "limit=300", "processes=2", "run_dir=cut")
    wait_for_lines(tmp_path / "cut", 1)
    pids = members("cut")
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=300)
    assert running.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert json.loads(Path("cut/manifest.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_none_goes_on_when_the_starter_is_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    running = start("evaluate", "method=ft", "method.steps=30", "limit=300", "processes=2", "run_dir=cut")
    wait_for_lines(tmp_path / "cut", 1)
    pids = members("cut")
    running.kill()
    running.communicate(timeout=300)
    deadline = time.monotonic() + 20
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and that nobody has asked about does not."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_torchrun_starts_it_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "edit_cli"]
    arguments = ("evaluate", "method=ft", "method.steps=3", "limit=2", "run_dir=two", *QUICK)
    ended = subprocess.run([*launched, *arguments], check=False, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 0, ended.stderr
    assert len(set(members("two"))) == 2
    assert ended.stdout.count("Time per edit") == 1
    assert summary("two")["n"] == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("processes=0",), "processes=0: give a whole number from 1 up"),
        (("processes=two",), "processes"),
    ],
)
def test_wrong_numbers_are_told(cli, arguments, told):
    ended = cli("evaluate", *arguments)
    assert ended.code == 2
    assert told in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.slow
def test_an_error_that_all_see_is_told_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    running = start("evaluate", "method=ft", "dataset.path=missing.json", "processes=2")
    _, err = running.communicate(timeout=300)
    assert running.returncode == 3
    assert err.count("missing.json") == 1
