"""Standard output and error that no run dies of: a reader that goes away (`| head -1`), a full disk, or an encoding
that lacks a character costs no result.
"""

from __future__ import annotations

import codecs
import io
import sys
from typing import TextIO

NAME = "edit-cli"  # of the way in which characters that an encoding lacks are written
# Our own signs, one for one, so that tables stay in line
SIGNS = dict(zip("↑↓→←–−—…·×’‘“”•─━│┃±≤≥", "^v><---.*x''\"\"*--||~<>", strict=True))


class Outlet(io.FileIO):
    """A file descriptor that takes whatever is written. trouble: why something was lost that somebody waits for."""

    trouble: OSError | None = None

    def write(self, data) -> int:  # type: ignore[no-untyped-def, override]
        try:
            return super().write(data) or 0
        except BrokenPipeError:  # whoever read has seen enough
            return len(data)
        except OSError as error:
            self.trouble = error
            return len(data)


def substitute(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that an encoding lacks: a sign that looks alike, else their number (\\u0141)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(SIGNS.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in lost), error.end


def settle() -> None:
    """Put such streams in the place of this process's own, where these are files (not in tests that capture them)."""
    codecs.register_error(NAME, substitute)
    sys.stdout, sys.stderr = _outliving(sys.stdout), _outliving(sys.stderr)


def _outliving(stream: TextIO) -> TextIO:
    try:
        number = stream.fileno()
    except (AttributeError, OSError):  # closed from the start, or no file
        return stream
    if isinstance(getattr(getattr(stream, "buffer", None), "raw", None), Outlet):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(Outlet(number, "w", closefd=False)),
        encoding=stream.encoding,
        errors=NAME,
        line_buffering=getattr(stream, "line_buffering", True),
    )


def trouble() -> OSError | None:
    """Why standard output is not whole, if it is not."""
    if isinstance(sys.stdout, io.TextIOWrapper) and isinstance(raw := getattr(sys.stdout.buffer, "raw", None), Outlet):
        sys.stdout.flush()
        return raw.trouble
    return None
