"""What the makers of tiny models share as commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import edit_cli
from edit_cli.errors import EditCliError, UsageError

ASSETS = Path(edit_cli.__file__).parent / "assets"


def exit_code(work: Callable[[], None]) -> int:
    """0, or that of the error that `work` ends in, which is told in a line."""
    try:
        work()
    except EditCliError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def require_some(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises UsageError: one of these arguments is below 1."""
    for name in names:
        value = getattr(arguments, name)
        if value < 1:
            raise UsageError(f"--{name} must be at least 1, not {value}")


def shown(arguments: argparse.Namespace, names: Sequence[str]) -> str:
    """These arguments as they are typed."""
    return " ".join(f"--{name} {getattr(arguments, name)}" for name in names)
