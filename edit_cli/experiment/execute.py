"""Makes typed settings of what Hydra composed, runs the command on them, and turns its end, however it comes, into an
outcome with an exit code.
"""

from __future__ import annotations

import importlib
import traceback
from pathlib import Path

from edit_cli.config import registry
from edit_cli.config.build import register_resolvers
from edit_cli.config.composed import Composed
from edit_cli.config.users import with_tuned
from edit_cli.console import ConsoleMonitor, Screen
from edit_cli.distributed import SINGLE, PeerLost, ProcessGroup, alone, follows, join
from edit_cli.errors import EditCliError, MissingError, OutOfMemory, RejectedRequest, UsageError
from edit_cli.experiment import launcher
from edit_cli.experiment.job import Job, Outcome
from edit_cli.experiment.run_directory import memory_remedy, ran_out_of_memory
from edit_cli.files.disk import is_refusal, refusal

WITHOUT_RUN = ("calibrate", "precompute-stats", "prepare")
TRACKED = ("evaluate", "sequential")


def execute(composed: Composed) -> Outcome:
    """Run a command with what Hydra composed for it, in as many processes as that asks for.

    Errors are told in one line, so that the other jobs of a sweep go on; an interruption is not caught.

    Raises:
        PeerLost: this is one of several processes, and another one has ended.
    """
    register_resolvers()
    process_group = SINGLE
    try:
        tuned = None
        if composed.command != "tune":  # a search must not depend on what the last one found
            tuned = with_tuned(composed.node, composed.choices.get("method"), composed.given)
        if tuple(composed.node.get("plugins") or ()) != composed.plugins:  # files may be from anywhere
            raise UsageError("plugins are named on the command line, by plugins=[mypackage], and in no file")
        registry.admit(composed.plugins)
        size = 1 if composed.settings.dry_run else composed.settings.processes
        if size > 1 and alone():
            return launcher.run(composed, size, execute)
        monitor = ConsoleMonitor(Screen.of(int(follows())))
        if tuned is not None:
            monitor.screen.note(f"method={composed.choices['method']} has settings that were found by tune: {tuned}")
        with monitor.working():
            process_group = join()
            if size not in (1, process_group.size):
                raise UsageError(
                    f"processes={size}, but this is one of {process_group.size} processes already: leave processes out"
                )
            return _command(composed, process_group, monitor)
    except PeerLost:
        raise
    except EditCliError as error:
        return _failed(process_group, error, error.exit_code)
    except RejectedRequest as error:
        return _failed(process_group, error, EditCliError.exit_code)
    except Exception as error:
        if ran_out_of_memory(error):
            message = memory_remedy(error, composed.plain)
            return _failed(process_group, OutOfMemory(message), OutOfMemory.exit_code)
        if isinstance(error, OSError) and is_refusal(error):
            return _failed(process_group, refusal(error), MissingError.exit_code)
        Screen().details(traceback.format_exc())  # there is no run yet whose log could hold it
        return _failed(process_group, f"{type(error).__name__}: {error}", 1)


def _command(composed: Composed, process_group: ProcessGroup, monitor: ConsoleMonitor) -> Outcome:
    _refuse_unheard(composed)
    if composed.in_sweep:
        monitor.screen.note(f"--- {title(composed)}")
    # what loads the libraries comes here, where the monitor says so, and not with this module
    from edit_cli.experiment.plan import show
    from edit_cli.experiment.setup import configured
    from edit_cli.lm.precision import passes_in_tf32
    from edit_cli.report.page.run import write_own

    command = importlib.import_module(f"edit_cli.commands.{composed.command.replace('-', '_')}")
    job = Job(composed, configured(composed), process_group)
    if composed.settings.dry_run:
        return show(command.plan(job, monitor), monitor)
    with passes_in_tf32(job.config.model.tf32):
        ended = command.run(job, monitor)
    if composed.settings.report and process_group.is_main and ended.run_dir is not None:
        monitor.screen.line(f"page: {write_own(Path(ended.run_dir))}")
    return ended


def _refuse_unheard(composed: Composed) -> None:
    """Raises:
    UsageError: a page is wanted of a command that keeps no run, or trackers of one that tells them nothing.
    """
    command, settings = composed.command, composed.settings
    if settings.report and command in WITHOUT_RUN:
        raise UsageError(f"report=true: `{command}` keeps no run, so there is no page")
    if settings.trackers and command not in TRACKED:
        own = "; a training has method.training.trackers" if command == "train-editor" else ""
        raise UsageError(f"trackers: `{command}` has nothing to tell them, {' and '.join(TRACKED)} have{own}")


def title(composed: Composed) -> str:
    """What tells this job from the others of its sweep."""
    chosen = [composed.choices[group] for group in ("method", "model", "dataset") if composed.choices.get(group)]
    return " ".join(chosen + ([composed.tag] if composed.tag else []))


def _failed(process_group: ProcessGroup, error: Exception | str, exit_code: int) -> Outcome:
    """What is wrong with the settings or the machine, all processes see alike: the main one says it."""
    if process_group.is_main:
        Screen().error(str(error))
    elif not isinstance(error, UsageError | MissingError):
        Screen().error(f"process {process_group.rank}: {error}")
    return Outcome(exit_code, error=str(error))
