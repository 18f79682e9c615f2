"""One writer a directory: an advisory lock that the operating system drops when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

LOCK = ".lock"


def acquire(directory: Path) -> int | None:
    """Lock `directory` for this process: a file descriptor that holds the lock until it is closed.

    None if another has it.

    Raises:
        OSError: the lock file cannot be made.
    """
    lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    for _ in range(10):  # whoever only looks (`is_locked`) holds it for an instant
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            time.sleep(0.05)
    os.close(lock)
    return None


def is_locked(directory: Path) -> bool:
    """Whether a process holds the lock right now."""
    try:
        lock = os.open(directory / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
