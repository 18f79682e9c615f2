"""`edit-cli` for the scripts of tests, from a process that has imported everything: a command takes its own time, and
not the seconds that imports take. Each runs in a fork of that process, with arguments, folder, environment and streams
of the script.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IMPORTED = (
    "edit_cli.experiment.execute",
    "edit_cli.experiment.plan",
    "edit_cli.cli.hydra_launch",
    "matplotlib.pyplot",
    "transformers",
)
COMMANDS = ("evaluate", "sequential", "sme", "train_editor", "compare")


@contextmanager
def warm_cli(folder: Path) -> Iterator[Path]:
    """A folder for PATH with an `edit-cli` in it, as long as the context lasts."""
    program, address = folder / "bin" / "edit-cli", folder / "socket"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable} -IS\n{CLIENT.format(address=str(address))}")
    program.chmod(0o755)
    with subprocess.Popen([sys.executable, __file__, str(address)], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        try:
            yield program.parent
        finally:
            server.terminate()


CLIENT = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as line:
    line.connect({address!r})
    told = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(line, [len(told).to_bytes(4, "big")], [1, 2])
    line.sendall(told)
    sys.exit(int(line.recv(8) or 1))
"""


def _serve(address: str) -> None:
    for module in (*IMPORTED, *(f"edit_cli.commands.{name}" for name in COMMANDS)):
        importlib.import_module(module)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        while True:
            line, _ = listening.accept()
            with line:
                if os.fork() == 0:
                    _answer(line)
            while _ended():
                pass


def _ended() -> bool:
    """Whether a child has ended that nobody has asked after."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def _answer(line: socket.socket) -> None:
    code = 1
    try:
        size, streams, *_ = socket.recv_fds(line, 4, 2)
        told = b""
        while len(told) < int.from_bytes(size, "big"):
            told += line.recv(1 << 16)
        arguments, folder, environment = json.loads(told)
        for number, stream in enumerate(streams, 1):
            os.dup2(stream, number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["edit-cli", *arguments]
        code = _run()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        line.sendall(str(code).encode())
        os._exit(code)


def _run() -> int:
    from edit_cli.cli.main import main

    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    _serve(sys.argv[1])
