"""Runs one job and turns its end, however it comes, into an outcome with an exit code."""

from __future__ import annotations

import importlib
import traceback

from edit_cli.commands.job import Job, Outcome
from edit_cli.commands.recording import ran_out_of_memory
from edit_cli.console import ConsoleMonitor, Screen
from edit_cli.errors import EditCliError, OutOfMemory, RejectedRequest


def execute(job: Job) -> Outcome:
    """Run the job's command. Errors are told in one line, so that the other jobs of a sweep go on; an interruption is not caught."""
    screen = Screen()
    if job.in_sweep:
        screen.note(f"--- {title(job)}")
    monitor = ConsoleMonitor(screen)
    command = importlib.import_module(f"edit_cli.commands.{job.command.replace('-', '_')}")
    try:
        return command.run(job, monitor)
    except EditCliError as error:
        return _failed(screen, str(error), error.exit_code)
    except RejectedRequest as error:
        return _failed(screen, str(error), EditCliError.exit_code)
    except Exception as error:
        if ran_out_of_memory(error):
            message = f"out of memory while getting ready ({error}); choose a smaller model or model.dtype=bfloat16"
            return _failed(screen, message, OutOfMemory.exit_code)
        screen.note(traceback.format_exc())  # there is no run yet whose log could hold it
        return _failed(screen, f"{type(error).__name__}: {error}", 1)


def title(job: Job) -> str:
    """What tells this job from the others of its sweep."""
    chosen = [job.choices[group] for group in ("method", "model", "dataset") if job.choices.get(group)]
    return " ".join(chosen + ([job.tag] if job.tag else []))


def _failed(screen: Screen, message: str, exit_code: int) -> Outcome:
    screen.error(message)
    return Outcome(exit_code, error=message)
