"""`processes=N`: run one job in N processes of this machine and watch over them, so that none waits for one that has
died.

The job is composed once; the processes read the result. `torchrun` and `accelerate launch` start and watch processes
themselves.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

from edit_cli import streams
from edit_cli.config.composed import Composed
from edit_cli.console import Screen
from edit_cli.distributed import PeerLost
from edit_cli.errors import MissingError, UsageError
from edit_cli.experiment.job import Outcome

Execute = Callable[[Composed], Outcome]
GRACE = 20.0  # seconds in which the others may notice by themselves that one has ended, and put their results in order


def run(composed: Composed, size: int, execute: Execute) -> Outcome:
    """What `execute` makes of the job in `size` processes that find each other; the main one's outcome.

    If one of them dies, the others are ended, and what was finished stays.
    """
    context = multiprocessing.get_context("spawn")  # forks of a process that holds a GPU or threads do not work
    with TemporaryDirectory(prefix="edit-cli-") as folder:
        place = (size, _free_port(), Path(folder))
        processes = [
            context.Process(target=_work, args=(execute, composed, rank, *place), name=f"process {rank}")
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            _watch(processes)
        except KeyboardInterrupt:
            _end(processes, signal.SIGINT, patience=2.0)  # a terminal has told them already
            raise
        return _outcome(processes, [_read(Path(folder), rank) for rank in range(size)])


def _watch(processes: Sequence[BaseProcess]) -> None:
    """Until all have ended: by themselves, or soon after one of them came to a bad end."""
    while alive := [process for process in processes if process.is_alive()]:
        wait([process.sentinel for process in alive])
        if any(process.exitcode for process in processes):
            return _end(processes, signal.SIGTERM, patience=GRACE)
    return None


def _end(processes: Sequence[BaseProcess], how: signal.Signals, patience: float) -> None:
    """Wait for all; send the signal to those that take longer than `patience` seconds, and kill those that do not
    heed it.
    """
    for send in (how, signal.SIGKILL):
        deadline = time.monotonic() + patience
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0.0))
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, send)
        patience = GRACE
    for process in processes:
        process.join()


def _outcome(processes: Sequence[BaseProcess], outcomes: Sequence[Outcome | None]) -> Outcome:
    """The main process's; where it ended because of another, what is known of that one."""
    if outcomes[0] is not None:
        return outcomes[0]
    for outcome in outcomes:
        if outcome is not None and outcome.error:
            if outcome.exit_code in (UsageError.exit_code, MissingError.exit_code):
                Screen().error(outcome.error)  # followers leave these to the main process
            return outcome
    killed = [process for process in processes if (process.exitcode or 0) < 0] or [
        process for process in processes if process.exitcode
    ]
    how = killed[0].exitcode or 0
    reason = f"was killed ({signal.Signals(-how).name})" if how < 0 else f"ended with exit code {how}"
    message = (
        f"{killed[0].name} of {len(processes)} {reason}; what was finished is kept, the same command goes on from there"
    )
    Screen().error(message)
    return Outcome(1, error=message)


# --- in the processes -------------------------------------------------------------------------------------------------


def _work(execute: Execute, composed: Composed, rank: int, size: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    streams.settle()
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_follow_parent, daemon=True).start()
    _share_cores(size)
    try:
        outcome = execute(composed)
    except PeerLost:
        sys.exit(PeerLost.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    (folder / f"{rank}.json").write_text(json.dumps(asdict(replace(outcome, overrides=()))), encoding="utf-8")
    sys.exit(outcome.exit_code if outcome.error else 0)


def _stop(*_: object) -> None:
    raise PeerLost("another process of this run has ended")


def _follow_parent() -> None:
    """A job whose starter is gone, even by kill -9, must not go on unseen."""
    starter = multiprocessing.parent_process()
    assert starter is not None  # this is a process that was started
    starter.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _share_cores(size: int) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max((os.cpu_count() or 1) // size, 1))


def _read(folder: Path, rank: int) -> Outcome | None:
    path = folder / f"{rank}.json"
    return Outcome(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
