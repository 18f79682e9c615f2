"""Find the file that a dataset is read from: a local path, a URL, a file on the hub, or the published one.

Downloads are never retried.
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import threading
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from edit_cli.config.schema import Config
from edit_cli.errors import MissingError, UsageError
from edit_cli.files.paths import expanded
from edit_cli.monitor import Monitor

TIMEOUT = 10  # seconds until a host must have answered, and between two packets
CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Remote(Config):
    """A published file. Size and digest are checked where they are known."""

    url: str
    """Its address."""
    license: str = "not stated by its source"
    """What its source says of the license."""
    bytes: int | None = None
    """Its size."""
    sha256: str | None = None
    """Its digest."""


@dataclass(frozen=True)
class File:
    """A file on this machine, and how to call it in records and messages."""

    path: Path
    label: str
    sha256: str | None = None  # what it must be, where that is known
    split: str | None = None  # the split that is meant unless another one is asked for


def locate(path: str, cache_dir: str, monitor: Monitor, key: str) -> File:
    """The file that the user named in `key`: `FILE`, `https://…`, or `hub:owner/name[@revision][:file]`.

    Raises:
        UsageError: a URL or `hub:` address of another form.
        MissingError: no such file, or it cannot be fetched.
    """
    if path.startswith(("https://", "http://")):
        try:
            urlsplit(path)
        except ValueError as error:
            raise UsageError(f"{key}={path}: {error}") from None
        return download(Remote(path), cache_dir, monitor, key)
    if path.startswith("hub:"):
        from edit_cli.datasets.records.hub import from_hub

        return File(*from_hub(path, monitor, key))
    file = expanded(path)
    if file.is_dir():
        raise MissingError(f"{key}={path} is a folder; name the file in it")
    if not file.is_file():
        raise MissingError(f"{key}={path}: no such file")
    return File(file, path)


def download(remote: Remote, cache_dir: str, monitor: Monitor, key: str) -> File:
    """The cached copy of a published file, fetched on first use.

    Raises:
        MissingError: not cached and not to be had, or not the file that was published; tells which key takes a local
            path.
    """
    address = urlsplit(remote.url)
    name = re.sub(r"[^\w.-]", "_", PurePosixPath(address.path).name) or "file"
    target = expanded(cache_dir) / "downloads" / f"{hashlib.sha256(remote.url.encode()).hexdigest()[:12]}-{name}"
    if not target.is_file():
        try:
            _fetch(remote, target, monitor)
        except _Unavailable as error:
            raise MissingError(
                f"{remote.url} is not in the cache ({target}) and {error}; give a local copy: {key}=FILE"
            ) from None
    return File(target, remote.url, remote.sha256)


class _Unavailable(Exception):
    """Why a download failed, as the end of a sentence."""


def _fetch(remote: Remote, target: Path, monitor: Monitor) -> None:
    """Write `remote` to `target`, whole and checked or not at all."""
    digest, size = hashlib.sha256(), 0
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with _open(remote.url) as response:
            monitor.note(f"Downloading {remote.url} (license: {remote.license}) to {target}")
            announced = response.headers.get("Content-Length", "")
            expected = remote.bytes or (int(announced) if announced.isdecimal() else None)
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as out, monitor.task(f"Downloading {target.name}", expected) as advance:
                while chunk := response.read(CHUNK):
                    out.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
                    advance(len(chunk))
        if expected not in (None, size):
            raise _Unavailable(f"what was sent has {size:,} bytes instead of {expected:,}")
        if remote.sha256 not in (None, digest.hexdigest()):
            raise _Unavailable(f"what was sent has the sha256 {digest.hexdigest()} instead of {remote.sha256}")
        os.replace(part, target)
    except (OSError, HTTPException) as error:
        raise _Unavailable(f"the download broke off ({error})") from None
    finally:
        with suppress(OSError):
            part.unlink()


def _open(url: str) -> Any:
    """A response, or `_Unavailable` soon.

    The thread bounds what no socket timeout covers: looking up the host's name.
    """
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    host = urlsplit(url).netloc
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise _Unavailable("HF_HUB_OFFLINE forbids downloads")
    answers: queue.Queue[BinaryIO | Exception] = queue.Queue()

    def ask() -> None:
        try:
            answers.put(urlopen(Request(url, headers={"User-Agent": "edit-cli"}), timeout=TIMEOUT))
        except Exception as error:  # handed to the caller below
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=TIMEOUT)
    except queue.Empty:
        raise _Unavailable(f"{host} did not answer within {TIMEOUT} seconds") from None
    if isinstance(answer, HTTPError):
        raise _Unavailable(f"{host} answered {answer.code} {answer.reason}")
    if isinstance(answer, OSError | HTTPException | ValueError):
        raise _Unavailable(f"{host or 'the host'} cannot be reached ({getattr(answer, 'reason', answer)})")
    if isinstance(answer, Exception):
        raise answer
    return answer
