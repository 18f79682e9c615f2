"""Commands killed at random moments and given again: what they end in is that of the unbroken one, bit for bit.

Each trial runs in a process that is forked with everything imported, is ended by the operating system at a moment drawn
anew (SIGKILL; some by SIGINT and SIGTERM), and then run to its end. `make test-faults` runs it; EDIT_CLI_TRIALS sets
the number of trials.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, json_lines
from safetensors import safe_open

pytestmark = pytest.mark.faults

TRIALS = int(os.environ.get("EDIT_CLI_TRIALS", "100"))
NOT_COMPARED = ("seconds", "phases")  # what the clock says
LEARNED = (
    "method.layers=[4]",
    "method.rank=4",
    "method.training.edits=2",
    "method.training.steps=24",
    "method.training.validate_every=6",
    "method.training.validation_edits=4",
    "method.training.save_every=3",
    "method.training.trackers=[]",
)
SME_ON = ("model=tiny-bert", "dataset=world_claims", "protocol=sme", "limit=14", "protocol.folds=2", "protocol.every=2")


@dataclass(frozen=True)
class Command:
    """A command that leaves something on disk. before: commands that it needs, run once to their end."""

    arguments: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()
    refuses: str | None = None  # a folder that it never writes over: once there, it is complete
    room: tuple[str, ...] = field(default=("run",))  # what is compared


QUIET = (*QUICK, "cache_dir=cache", "stats.documents=40")
COMMANDS = {
    "evaluate": Command(
        (
            "evaluate",
            "method=memit",
            "method.value.steps=5",
            "limit=12",
            "protocol.batch_size=2",
            "protocol.save_edits=true",
            "run_dir=run",
            *QUIET,
        )
    ),
    "sequential": Command(
        (
            "sequential",
            "method=alphaedit",
            "method.value.steps=5",
            "limit=8",
            "protocol.batch_size=2",
            "protocol.holdout=2",
            "protocol.edits_room=1",
            "run_dir=run",
            *QUIET,
        )
    ),
    "memory": Command(
        ("sequential", "method=grace", "limit=6", "protocol.batch_size=1", "protocol.holdout=2", "run_dir=run", *QUIET)
    ),
    "sme": Command(("sequential", "method=ft", "method.steps=5", *SME_ON, "run_dir=run", *QUIET)),
    "precompute-stats": Command(
        (
            "precompute-stats",
            "layers=[0,1,2]",
            "stats.batch_tokens=256",
            "stats.documents=200",
            "model.device=cpu",
            "cache_dir=own",
        ),
        room=("own",),
    ),
    "train-editor": Command(
        (
            "train-editor",
            "method=mend",
            "dataset=world",
            "limit=24",
            *LEARNED,
            "model.device=cpu",
            "cache_dir=own",
            "run_dir=run",
        ),
        room=("run", "own"),
    ),
    "trace": Command(("trace", "limit=6", "protocol.copies=4", "model.device=cpu", "run_dir=run")),
    "edit": Command(("edit", "method=memit", "dataset.path=facts.jsonl", "run_dir=run", *QUIET)),
    "apply": Command(
        ("apply", "made/edits/0000", "--out", "out"),
        refuses="out",
        before=(("edit", "method=ft", "method.steps=3", "dataset.path=facts.jsonl", "run_dir=made", *QUIET),),
        room=("out",),
    ),
}
FACTS = [
    {"prompt": "{} was born in", "subject": "Jormia Stenenen", "target_new": "Rome"},
    {"prompt": "{} plays the", "subject": "Jortia Hovofeld", "target_new": "organ"},
]


def work(arguments: tuple[str, ...], folder: str) -> None:
    """In the forked process: the command line, in its folder."""
    os.chdir(folder)
    os.environ |= {"COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["edit-cli", *arguments]
    from edit_cli.cli.main import main

    try:
        main()
    finally:
        sys.stdout.flush()


@pytest.fixture(scope="module")
def forks() -> Any:
    """Where processes come from: one that has everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "torch",
            "transformers.models.gpt2",
            "transformers.models.bert",
            "hydra",
            "datasets",
            "edit_cli.cli.main",
            "edit_cli.cli.hydra_launch",
            "edit_cli.commands.evaluate",
            "edit_cli.commands.sequential",
            "edit_cli.commands.train_editor",
        ]
    )
    return context


def started(forks: Any, arguments: tuple[str, ...], folder: Path) -> Any:
    process = forks.Process(target=work, args=(arguments, str(folder)))
    process.start()
    return process


def run(forks: Any, arguments: tuple[str, ...], folder: Path) -> float:
    """Run a command to its end; how many seconds it took."""
    began = time.monotonic()
    process = started(forks, arguments, folder)
    process.join()
    assert process.exitcode == 0, (folder / "err.txt").read_text()[-3000:]
    return time.monotonic() - began


def finish(forks: Any, command: Command, folder: Path) -> None:
    """Give the command again, unless it was killed after its work and before its end."""
    if command.refuses is None or not (folder / command.refuses).exists():
        run(forks, command.arguments, folder)


def prepared(forks: Any, command: Command, folder: Path, cache: Path) -> Path:
    folder.mkdir()
    (folder / "cache").symlink_to(cache)
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, FACTS)))
    for arguments in command.before:
        run(forks, arguments, folder)
    return folder


def contents(folder: Path, command: Command) -> dict[str, Any]:
    """All that a command has left, without what the clock or a process id has to say."""
    found: dict[str, Any] = {}
    for part in command.room:
        for path in sorted((folder / part).rglob("*")):
            name = str(path.relative_to(folder))
            if path.suffix == ".safetensors":
                found[name] = tensors(path)
            elif path.name == "results.jsonl":
                lines = [{k: v for k, v in line.items() if k not in NOT_COMPARED} for line in json_lines(path)]
                found[name] = json.dumps(lines, sort_keys=True)
            elif path.name == "summary.json":
                found[name] = json.loads(path.read_text()).get("metrics")
            elif path.name in ("edit.json", "editor.json"):
                whole = json.loads(path.read_text())
                found[name] = whole.get("id"), whole.get("sha256"), whole.get("touched")
            elif part == "out" and path.is_file():
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def tensors(path: Path) -> dict[str, str]:
    """{name: digest}. Not the file's bytes: the order of names in a header is nobody's promise."""
    with safe_open(path, framework="pt") as file:
        return {
            name: hashlib.sha256(file.get_tensor(name).contiguous().view(-1).numpy().tobytes()).hexdigest()
            for name in file.keys()  # noqa: SIM118 - no mapping
        }


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def unbroken(forks, tmp_path_factory, cache) -> Any:
    """(contents, seconds) of a command that nobody interrupts, run once a command."""
    known: dict[str, tuple[dict[str, Any], float]] = {}

    def of(name: str) -> tuple[dict[str, Any], float]:
        if name not in known:
            folder = prepared(forks, COMMANDS[name], tmp_path_factory.mktemp("whole") / name, cache)
            seconds = run(forks, COMMANDS[name].arguments, folder)
            known[name] = contents(folder, COMMANDS[name]), seconds
            assert known[name][0], "nothing to compare"
        return known[name]

    return of


def cut(forks: Any, command: Command, folder: Path, moment: float, how: signal.Signals) -> int | None:
    """Start the command and end it after `moment` seconds; its exit code, None if it had ended before."""
    process = started(forks, command.arguments, folder)
    process.join(moment)
    if process.exitcode is not None:
        return None
    os.kill(process.pid, how)
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_killed_command_given_again_ends_in_the_same_bits(name, forks, unbroken, tmp_path, cache):
    expected, seconds = unbroken(name)
    rng, killed = random.Random(f"kill {name}"), 0
    share = -(-TRIALS // len(COMMANDS))
    for number in range(share):
        folder = prepared(forks, COMMANDS[name], tmp_path / str(number), cache)
        for _ in range(rng.choice((1, 1, 1, 2))):  # some are killed again while they go on
            killed += cut(forks, COMMANDS[name], folder, rng.uniform(0, seconds), signal.SIGKILL) is not None
        finish(forks, COMMANDS[name], folder)
        found = contents(folder, COMMANDS[name])
        assert found.keys() == expected.keys(), (number, found.keys() ^ expected.keys())
        for part, value in expected.items():
            assert found[part] == value, (number, part)
        # half-written files carry the id of the process that wrote them
        hidden = [path for path in folder.rglob(".*") if path.name != ".lock" and path.parent.name != "cache"]
        assert not [path for path in hidden if path.suffix.removeprefix(".").isdigit()], hidden
    assert killed >= share // 2, f"only {killed} of {share} were killed: the moments are too late"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", list(COMMANDS))
def test_an_interrupted_command_says_so_and_goes_on(name, how, forks, unbroken, tmp_path, cache):
    expected, seconds = unbroken(name)
    folder = prepared(forks, COMMANDS[name], tmp_path / "cut", cache)
    code = cut(forks, COMMANDS[name], folder, random.Random(f"{how} {name}").uniform(0.4, 0.8) * seconds, how)
    assert code in ((130, None) if how == signal.SIGINT else (-signal.SIGTERM, 143, None))
    assert "Traceback" not in (folder / "err.txt").read_text()
    finish(forks, COMMANDS[name], folder)
    assert contents(folder, COMMANDS[name]) == expected
