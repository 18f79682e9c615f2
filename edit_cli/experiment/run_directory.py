"""Where a job's run lies, what identifies it, and what becomes of it when something goes wrong."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edit_cli.config import registry
from edit_cli.config.identity import flatten
from edit_cli.config.origins import origins
from edit_cli.console import ConsoleMonitor
from edit_cli.distributed import ProcessGroup
from edit_cli.errors import EditCliError, MissingError, OutOfMemory, UsageError
from edit_cli.experiment.job import Job
from edit_cli.files.disk import is_refusal, refusal
from edit_cli.files.paths import expanded
from edit_cli.monitor import failed_in
from edit_cli.runs.record import LOG, MANIFEST
from edit_cli.runs.run import Run, SharedRun

# where things lie, who works on them, and who is told
PLACE = ("tag", "runs_dir", "run_dir", "overwrite", "processes", "cache_dir", "figures", "report", "trackers")
LENGTH = ("trials", "budget", "out")  # how long is searched, and where it is written: a search may go on for longer
SHARED = ("stats", "corpus")  # stand in the method's own settings, if it uses them
# last parts of keys that move no result: speed and room, and what is refused
NO_INFLUENCE = ("cache_dir", "hub", "reuse", "batch_tokens", "edits_room", "made_for", "must_take", "refuse_too_large")
# which settings lower the memory that a phase takes, those that cost nothing but time first
ROOM = {
    "load model": (),
    "statistics": ("stats.batch_tokens", "method.moments.batch_tokens"),
    "value": ("method.value.batch_tokens", "protocol.batch_size"),
    "train": ("method.training.edits", "method.training.memory_mib", "protocol.batch_size"),
    "trace": ("protocol.batch_tokens", "model.batch_tokens"),
    "triggers": ("protocol.batch_tokens",),
    "removals": ("model.batch_tokens",),
    "edit": ("protocol.batch_size",),
    "keys": ("protocol.batch_size",),
    "solve": ("protocol.batch_size",),
}
ROOM_TO_ASK = ("model.batch_tokens", "protocol.batch_size")


class Crashed(EditCliError):
    """An error that nobody foresaw. Its traceback is in the run's log."""

    exit_code = 1


def run_path(job: Job, *parts: str, leaf: str | None = None) -> Path:
    """runs/COMMAND/PARTS…/METHOD[-TAG], unless `run_dir` says otherwise. In a sweep, `run_dir` holds a folder a job.

    leaf: instead of the method's name.
    """
    settings = job.config.settings
    leaf = (leaf or job.choices["method"]) + (f"-{slug(job.tag)}" if job.tag else "")
    if settings.run_dir is not None:
        chosen = expanded(settings.run_dir)
        return chosen.joinpath(*map(slug, parts), leaf) if job.in_sweep else chosen
    return expanded(settings.runs_dir).joinpath(job.command, *map(slug, parts), leaf)


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^\w.=,+-]+", "_", text).strip("._") or "_"


def opened(
    job: Job,
    path: Path,
    details: Mapping[str, Any],
    key: Sequence[str],
    check: Callable[[], None],
    belongs: Callable[[Any], bool],
) -> SharedRun:
    """The job's run directory; of several processes only the main one writes there.

    details: for the manifest, among them `dataset`: other records are another run, even if they come from a file of
    the same name. key: what tells lines apart. check: refuses what cannot come to anything; a run that lies there is
    replaced only after it, and only if nothing in it is needed. belongs: whether a line of an identity is one of this
    job's.
    """
    if not job.process_group.is_main:
        return SharedRun(path, {}, set(), job.process_group.rank)
    (config, ignore), overwrite = identity(job, details["dataset"]), job.config.settings.overwrite
    chosen = {"method": job.choices.get("method"), "model": job.model_name}
    typed = {"arguments": list(job.composed.arguments), "origins": origins(job.composed)}
    brought = {"plugins": found} if (found := registry.sources()) else {}
    details = {**chosen, "seeds": seeds(config), "processes": job.process_group.size, **typed, **brought, **details}
    if overwrite and (path / MANIFEST).exists():
        refuse_needed(path, config)
        check()
    return Run.open(
        path, job.command, config, ignore=ignore, key=key, belongs=belongs, overwrite=overwrite, details=details
    )


@contextmanager
def recorded(run: SharedRun, process_group: ProcessGroup, monitor: ConsoleMonitor) -> Iterator[None]:
    """All that happens in the block is the run's: errors are written to its log, and its manifest says how it ended."""
    with run:
        monitor.log = run.log if process_group.is_main else None
        try:
            run.manifest, run.finished = process_group.broadcast((run.manifest, run.finished))
            members = process_group.gather([os.getpid()])
            if monitor.log and len(members) > 1:
                run.log(f"{len(members)} processes: {', '.join(map(str, members))}")
            yield
        except EditCliError as error:
            run.log(f"error: {error}")
            raise
        except KeyboardInterrupt:
            run.log("interrupted")
            raise
        except Exception as error:
            run.log(traceback.format_exc())
            raise _told(error, run.path, run.manifest["config"]) from error
        finally:
            monitor.log = None


def identity(job: Job, about: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], list[str]]:
    """(the configuration by which the run is known, its keys that tell no run from another).

    about: the data set, as it describes itself.
    """
    config = dict(job.config.plain)
    config.pop("plugins", None)  # a file names no code: which there were is told beside the versions
    config.pop("dry_run", None)  # such a run leaves nothing
    if about is not None:  # other records are another run, even if they come from a file of the same name
        config["data"] = {"sha256": about["sha256"], "ids_sha256": about["ids_sha256"]}
    moves_nothing = (name for name in flatten(config) if name.rpartition(".")[2] in NO_INFLUENCE)
    return config, [*PLACE, *LENGTH, *SHARED, *moves_nothing]


def _told(error: Exception, path: Path, config: Mapping[str, Any]) -> EditCliError:
    """What nobody foresaw, in a line; its traceback is in the log of the run at `path`."""
    if isinstance(error, OSError) and is_refusal(error):
        return MissingError(f"{refusal(error, path)}; what was finished is kept, the same command goes on from there")
    if ran_out_of_memory(error):
        return OutOfMemory(memory_remedy(error, config))
    return Crashed(f"{type(error).__name__}: {error or 'no message'} (the traceback is in {path / LOG})")


def refuse_needed(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse to replace a run in whose directory lies something that a setting names: an edit, data, a model.

    Raises:
        UsageError: names the setting.
    """
    run = path.resolve()
    for key, value in flatten(config).items():
        if key in PLACE or not isinstance(value, str) or not value.strip(".~/"):
            continue
        named = expanded(value)
        if named.exists() and named.resolve().is_relative_to(run):
            raise UsageError(
                f"overwrite=true would delete {path}, in which {key}={value} lies: give this run a place of its own"
                " (tag=NAME or run_dir=DIR)"
            )


def seeds(config: dict[str, Any]) -> dict[str, int]:
    """Every seed of the configuration, by key."""
    found = flatten(config, SHARED)
    return {
        name: value for name, value in found.items() if name.rpartition(".")[2].endswith("seed") and value is not None
    }


def ran_out_of_memory(error: BaseException) -> bool:
    """Out of memory, as Python, CUDA or torch's CPU allocator say it."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def memory_remedy(error: BaseException, config: Mapping[str, Any]) -> str:
    """What was being done when memory ran out, and which of the settings that there are lower the need."""
    device = "the device" if type(error).__name__ == "OutOfMemoryError" else "this machine"
    phase, known = failed_in(error), flatten(config)
    keys = [key for key in ROOM.get(phase or "", ROOM_TO_ASK) if key in known]
    lower = f"lower {' or '.join(keys)}, or " if keys else ""
    return (
        f"{device} ran out of memory{f' in the phase {phase!r}' if phase else ''}: {lower}load the model smaller"
        " (model.dtype=bfloat16, model.quantize=4bit, model.device_map=auto); what was finished is kept, the same"
        " command goes on from there"
    )
