"""Writing that a crash leaves whole, and that says what is wrong where it cannot be done."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from edit_cli.errors import MissingError, UsageError

HEAD = 1000  # bytes by which a file is told from others
FORSAKEN = 3600.0  # seconds after which an unfinished directory is nobody's any more
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BARRED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def is_refusal(error: BaseException) -> bool:
    """Whether a disk or its rights are what stands in the way, and no fault of the program."""
    return isinstance(error, OSError) and error.errno in (*FULL, *BARRED)


def refusal(error: OSError, what: object = None) -> MissingError:
    """What to say of it. what: what was at work, if the error does not name it."""
    return MissingError(f"{error.filename or what} cannot be used: {_reason(error)}")


def _reason(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    full = getattr(error, "errno", None) in FULL or os.strerror(errno.ENOSPC) in reason
    return f"{reason}; make room" if full else reason


@contextmanager
def telling(what: object) -> Iterator[None]:
    """Whatever keeps the block from writing is told in a line. what: what is written, or the setting that names it.

    Raises:
        MissingError: the disk does not take it.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise MissingError(f"{what} cannot be written: {_reason(error)}") from None


def require_folder(folder: Path, what: object) -> None:
    """Make the folder and try it, before hours of work go into what is to be written there.

    what: the setting that names it.

    Raises:
        MissingError: it cannot be made, or no file in it.
    """
    with telling(what):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def require_place(path: Path, what: object) -> None:
    """As `require_folder`, of the folder in which `path` is going to be made, as far as it is there; makes none."""
    with telling(what), tempfile.TemporaryFile(dir=_present(path)):
        pass


def require_file(path: Path, what: object) -> None:
    """As `require_place`, of a file. what: the setting that names it.

    Raises:
        UsageError: a folder lies there.
    """
    if path.is_dir():
        raise UsageError(f"{what} is a folder: name a file in it")
    require_place(path, what)


def require_own(path: Path, what: object, beginning: str) -> None:
    """Refuse to write over a file that does not begin as those do that are written here (UsageError).

    beginning: a regular expression.
    """
    with telling(what):
        if not path.is_file() or not path.stat().st_size:
            return
        with path.open("rb") as file:
            found = file.read(HEAD).decode(errors="replace")
    if not re.match(beginning, found):
        raise UsageError(f"{what}: {path} is there already and holds something else: name another file")


def write_keeping(file: Path, text: str, what: object = None) -> Path | None:
    """Write a file; another one that is there is kept beside it, under the name that is returned.

    what: the setting that names it.
    """
    with telling(what or file):
        earlier = None
        if file.exists() and file.read_bytes() != text.encode():
            earlier = file.with_name(f"{file.name}.old")
            file.replace(earlier)
        with replacing_file(file, what) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return earlier


def require_room(path: Path, size: int, what: object) -> None:
    """Raises:
    MissingError: the disk on which `path` is going to be made has fewer bytes to spare than `size`.
    """
    with telling(what):
        free = shutil.disk_usage(_present(path)).free
    if free < size:
        raise MissingError(
            f"{what} cannot be written: it takes {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} are free; make room"
        )


def _present(path: Path) -> Path:
    """The nearest thing above `path` that is there."""
    return next(folder for folder in path.resolve().parents if os.path.lexists(folder))


@contextmanager
def replacing(directory: Path, what: object = None) -> Iterator[Path]:
    """An empty directory that takes the place of `directory` once it has been filled and is on the disk, file by file;
    of a link, the place of what it points to.

    What a process that was killed has left of this is removed.

    what: the setting that names it; the directory itself, if there is none.

    Raises:
        MissingError: the disk does not take it.
    """
    whole = directory.resolve()
    temporary, former = (whole.with_name(f".{whole.name}.{os.getpid()}{end}") for end in ("", ".old"))
    try:
        with telling(what or directory):
            for leftover in _left_behind(whole):
                shutil.rmtree(leftover, ignore_errors=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for part in [*temporary.rglob("*"), temporary]:
                flush(part)
            if whole.exists():
                os.rename(whole, former)
            os.replace(temporary, whole)
            flush(whole.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def _left_behind(whole: Path) -> list[Path]:
    """Unfinished directories in place of `whole` whose process is gone, and that nobody has touched for a while: on a
    shared disk it may be a process of another machine.
    """
    found = []
    for path in whole.parent.glob(f".{glob.escape(whole.name)}.[0-9]*"):
        process = path.name.removeprefix(f".{whole.name}.").removesuffix(".old")
        if process.isdecimal() and not _is_running(int(process)) and time.time() - path.stat().st_mtime > FORSAKEN:
            found.append(path)
    return found


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


@contextmanager
def replacing_file(path: Path, what: object = None) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` once it is on the disk: readers see the whole of it or none.

    what: the setting that names it; the file itself, if there is none.

    Raises:
        MissingError: the disk does not take it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with telling(what or path):
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """See to it that a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(*([] if path.is_file() else [OSError])):  # some file systems know no such thing of folders
            os.fsync(handle)
    finally:
        os.close(handle)
