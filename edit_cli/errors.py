"""Errors that a user can act on.

Each carries the exit code of the command line; anything else is a bug and shows a traceback.
"""

from __future__ import annotations


class EditCliError(Exception):
    """One clear line: what is wrong, in which field, and the remedy."""

    exit_code = 2


class UsageError(EditCliError):
    """Bad usage or configuration, or a method that cannot be right on this model."""

    exit_code = 2


class MissingError(EditCliError):
    """A named model, file, dataset, run or edit is missing or unusable."""

    exit_code = 3


class OutOfMemory(EditCliError):
    """The device ran out of memory; the message says which setting lowers the need."""

    exit_code = 4


class RejectedRequest(ValueError):
    """A single request that no editor can work on (say, an empty target). Recorded with its case; the run goes on."""
