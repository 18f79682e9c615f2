"""Run directories: a manifest, one appended line a case, a summary.

A run that was killed at any moment can be continued.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from edit_cli.config.identity import UNSET, config_hash, differences, plain
from edit_cli.errors import MissingError, UsageError
from edit_cli.files.json_files import read_json, to_json, write_json
from edit_cli.files.lock import LOCK, acquire
from edit_cli.runs.environment import environment
from edit_cli.runs.record import EDITS, FORMAT, LOG, MANIFEST, RESULTS, SUMMARY, lines_of, manifest_of
from edit_cli.terminal import visible

FLUSHED_EVERY = 1.0  # seconds between two times that lines are made to be on disk
REMEDY = "give it a place of its own (tag=NAME or run_dir=DIR), or replace the old run (overwrite=true)"


class SharedRun:
    """A run as every process knows it that works on it, to take the same steps. The main one's is a `Run`: what others
    append, it writes.

    Attributes:
        path: the directory. manifest: the content of manifest.json. finished: the identities (by default case ids) of
        the lines that are already there.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], finished: set[Any], rank: int = 0) -> None:
        self.path, self.manifest, self.finished, self._rank = path, manifest, finished, rank

    @property
    def edits(self) -> Path:
        """Where edit directories go."""
        return self.path / EDITS

    def identity(self, line: Mapping[str, Any]) -> Any:
        """What tells the line from the others of its run."""
        return itemgetter(*self.manifest["key"])(line)

    def append(self, line: Mapping[str, Any]) -> None:
        """Take note of a line that the main process writes."""
        self.finished.add(self.identity(line))

    def log(self, message: str) -> None:
        """Add a line with the time to log.txt, for what only this process has seen."""
        write_log(self.path, f"process {self._rank}: {message}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The main process records how the run ended."""


class Run(SharedRun):
    """A run directory that this process writes to. Use it as a context manager: how the block ends becomes the
    status.
    """

    def __init__(
        self, path: Path, manifest: dict[str, Any], lock: int, belongs: Callable[[Any], bool] = lambda identity: True
    ) -> None:
        super().__init__(path, manifest, set())
        self._lock = lock
        lines, self._end = lines_of(path, manifest)
        self.finished |= set(map(self.identity, lines))
        if foreign := sorted(_told(identity) for identity in self.finished if not belongs(identity)):
            raise MissingError(
                f"{path / RESULTS} has a line of {foreign[0]}, which is not of this run: delete that line and run"
                " again, or start with overwrite=true"
            )
        self._file = open(path / RESULTS, "ab", buffering=0)  # noqa: SIM115 - open for the life of the run
        self._flushed = time.monotonic()
        self._file.truncate(self._end)  # off goes the line that was being written when the run was killed
        self._forget_summary(len(lines))

    @classmethod
    def open(
        cls,
        path: Path | str,
        command: str,
        config: Mapping[str, Any],
        *,
        ignore: Sequence[str] = (),
        key: Sequence[str] = ("case_id",),
        belongs: Callable[[Any], bool] = lambda identity: True,
        overwrite: bool = False,
        details: Mapping[str, Any] | None = None,
        made_with: Mapping[str, Any] | None = None,
    ) -> Run:
        """Start a run at `path`, or continue the one that is there.

        Args:
            path: the run directory.
            command: the command whose run it is.
            config: the resolved configuration, plain containers. It identifies the run, but for the keys in `ignore`.
            ignore: dotted keys that do not identify the run; a key stands for all below it.
            key: fields that tell lines apart: no two lines of a run have the same values.
            belongs: whether a line of that identity can be one of this run's.
            overwrite: delete a run that is there.
            details: more for the manifest (protocol, seeds, model, …).
            made_with: versions and devices; `environment()` unless given.

        Raises:
            UsageError: another configuration has been run there (names the keys that differ), another process is
                writing there, or the directory holds something else.
            MissingError: the directory cannot be used, or what it holds is damaged: a file that cannot be read, or a
                line that is there twice or belongs to another run.
        """
        path = Path(path)
        config = plain(config)
        digest = config_hash(config, ignore)
        lock = _locked(path)
        try:
            if overwrite and (path / MANIFEST).exists():
                _clear(path)
            previous = manifest_of(path) if (path / MANIFEST).exists() else None
            if previous is not None and (previous["command"], previous["config_hash"]) != (command, digest):
                if _has_results(path):
                    _refuse_other_run(path, previous, command, config, ignore)
                previous = None  # a mistyped command that came to nothing is in nobody's way
            facts = plain({**(environment() if made_with is None else made_with), **(details or {})})
            fresh = {
                "format": FORMAT,
                "command": command,
                "config": config,
                "config_hash": digest,
                "key": list(key),
                "status": "started",
                "started": _now(),
                "finished": None,
                **facts,
            }
            manifest = fresh if previous is None else _resumed(previous, fresh, facts, path)
            for left in path.glob(".*.json.*"):  # half-written files of a process that was killed
                left.unlink()
            write_json(path / MANIFEST, manifest)
            return cls(path, manifest, lock, belongs)
        except BaseException:
            os.close(lock)
            raise

    def _forget_summary(self, lines: int) -> None:
        """Delete a summary that was made of more lines than there are: the run is not finished, whatever it says."""
        with suppress(MissingError):
            told = read_json(self.path / SUMMARY).get("lines")
            if isinstance(told, int) and told > lines:
                (self.path / SUMMARY).unlink()

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line to results.jsonl. Numbers that are not finite become null.

        A killed process loses none; when the machine itself goes down, the lines of its last second may be lost, and
        are made again.

        Raises:
            ValueError: a line of this identity is there already.
            MissingError: the disk does not take it.
        """
        identity = self.identity(line)
        if identity in self.finished:
            raise ValueError(f"{self.path / RESULTS} already has a line for {identity!r}")
        data = to_json(line).encode() + b"\n"
        with self._taken():
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if time.monotonic() - self._flushed >= FLUSHED_EVERY:
                self._flush()
        self._end += len(data)
        self.finished.add(identity)

    def _flush(self) -> None:
        os.fsync(self._file.fileno())
        self._flushed = time.monotonic()

    @contextmanager
    def _taken(self) -> Iterator[None]:
        """Leave no part of a line that the disk does not take.

        Raises:
            MissingError: it does not.
        """
        try:
            yield
        except OSError as error:
            self._file.truncate(self._end)
            raise MissingError(
                f"{self.path / RESULTS} cannot be written: {error.strerror}; make room and run again"
            ) from None

    def lines(self) -> list[dict[str, Any]]:
        """All lines so far."""
        return lines_of(self.path, self.manifest)[0]

    def log(self, message: str) -> None:
        """Add a line with the time to log.txt."""
        write_log(self.path, message)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace summary.json. Of memory it says what this process or one before it had at most."""
        with self._taken():
            self._flush()  # no summary of lines that could be lost
        told = {"format": FORMAT, "command": self.manifest["command"], **summary, "lines": len(self.finished)}
        if "peak_memory_bytes" in summary:
            told["peak_memory_bytes"] = self._most_memory(summary["peak_memory_bytes"])
        write_json(self.path / SUMMARY, told)

    def _most_memory(self, now: Mapping[str, int | None]) -> dict[str, int | None]:
        """Bytes by place, at most: a command that is given again may have had next to nothing to do."""
        before: Any = None
        with suppress(MissingError):
            before = read_json(self.path / SUMMARY).get("peak_memory_bytes")
        both = [now, before if isinstance(before, dict) else {}]
        known = {place: [each[place] for each in both if isinstance(each.get(place), int)] for place in now}
        return {place: max(found, default=None) for place, found in known.items()}

    def close(self, status: str) -> None:
        """Record how the run ended (success, failed or interrupted) and let other processes in."""
        self.manifest |= {"status": status, "finished": _now()}
        try:
            with self._taken():
                self._flush()
            write_json(self.path / MANIFEST, self.manifest)
        finally:
            self._file.close()
            os.close(self._lock)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("success")
        else:
            with suppress(MissingError):  # a disk that takes nothing more must not hide what has happened
                self.close("failed" if issubclass(kind, Exception) else "interrupted")


# --- is it the same run?
# --------------------------------------------------------------------------------------------------


def _has_results(path: Path) -> bool:
    """Whether a run has left anything but its manifest and its log."""
    return any(
        part.name not in (MANIFEST, LOCK, LOG) and (part.is_dir() or part.stat().st_size) for part in path.iterdir()
    )


def _refuse_other_run(
    path: Path, previous: Mapping[str, Any], command: str, config: Mapping[str, Any], ignore: Sequence[str]
) -> NoReturn:
    if previous["command"] != command:
        raise UsageError(f"{path} holds a run of `{previous['command']}`, not of `{command}`: {REMEDY}")
    changed = differences(previous["config"], config, ignore)
    shown = [f"{name} was {_short(was)} and is {_short(now)}" for name, (was, now) in list(changed.items())[:8]]
    more = [f"{len(changed) - 8} more"] if len(changed) > 8 else []
    raise UsageError(f"{path} holds a run with another configuration ({'; '.join(shown + more)}): {REMEDY}")


def _resumed(
    previous: Mapping[str, Any], fresh: Mapping[str, Any], facts: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """The manifest of the first start, and which facts have changed since: lines from both lie side by side."""
    if previous["key"] != fresh["key"]:
        raise MissingError(f"{path / MANIFEST} is damaged: key is {previous['key']}; start with overwrite=true")
    changed = differences({name: previous.get(name) for name in facts}, facts)
    resumed = [
        *previous.get("resumed", []),
        {"at": fresh["started"], "changed": {name: list(pair) for name, pair in changed.items()}},
    ]
    return {**previous, "config": fresh["config"], "status": "started", "finished": None, "resumed": resumed}


def _told(identity: Any) -> str:
    """The identity of a line in words."""
    return ", ".join(map(str, identity)) if isinstance(identity, tuple) else f"case {identity}"


def _short(value: Any) -> str:
    text = UNSET if value == UNSET else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


def write_log(path: Path, message: str) -> None:
    """Add a line with the time to log.txt of the run at `path`; on a full disk there is none."""
    with suppress(OSError), open(path / LOG, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{_now()} {visible(message)}\n")


# --- files
# --------------------------------------------------------------------------------------------------------------


def _locked(path: Path) -> int:
    """Create the directory, see that it is free for a run or holds one, and lock it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        foreign = sorted(
            part.name
            for part in path.iterdir()
            if part.name not in (LOCK, LOG) and not part.name.startswith(f".{MANIFEST}")
        )
        if foreign and not (path / MANIFEST).exists():
            raise UsageError(
                f"{path} is not empty and holds no run (it has {foreign[0]}): name another directory by run_dir=DIR"
            )
        lock = acquire(path)
    except OSError as error:
        raise MissingError(f"{path} cannot be used as a run directory: {error.strerror}") from None
    if lock is None:
        raise UsageError(
            f"another process is writing to {path}: wait for it, or name another place (tag=NAME or run_dir=DIR)"
        )
    return lock


def _clear(path: Path) -> None:
    """Delete a run's own files, and nothing else that may lie there.

    The manifest last: until then it is a run without results.
    """
    for name in (RESULTS, SUMMARY, LOG):
        (path / name).unlink(missing_ok=True)
    shutil.rmtree(path / EDITS, ignore_errors=True)
    (path / MANIFEST).unlink()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
