"""Where a job's run lies, what identifies it, and what becomes of it when something goes wrong."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from edit_cli.config import registry
from edit_cli.config.identity import flatten
from edit_cli.config.origins import origins
from edit_cli.console import ConsoleMonitor
from edit_cli.datasets import Dataset
from edit_cli.errors import EditCliError, MissingError, OutOfMemory, UsageError
from edit_cli.experiment.job import Job
from edit_cli.files.disk import is_refusal, refusal
from edit_cli.files.paths import expanded
from edit_cli.runs.run import EDITS, LOG, MANIFEST, Run, write_log

# where things lie, who works on them, and who is told
PLACE = ("tag", "runs_dir", "run_dir", "overwrite", "processes", "cache_dir", "report", "trackers")
LENGTH = ("trials", "budget", "out")  # how long is searched, and where it is written: a search may go on for longer
SHARED = ("stats", "corpus")  # stand in the method's own settings, if it uses them
# last parts of keys that move no result: speed and room, and what is refused
NO_INFLUENCE = ("cache_dir", "batch_tokens", "edits_room", "made_for", "must_take")


@dataclass
class ReadOnlyRun:
    """A run that another process writes (see `results.Run`): what this one must know of it to take the same steps."""

    path: Path
    rank: int
    manifest: dict[str, Any] = field(default_factory=dict)
    finished: set[Any] = field(default_factory=set)

    @property
    def edits(self) -> Path:
        """Where edit directories go."""
        return self.path / EDITS

    def append(self, line: Mapping[str, Any]) -> None:
        """Take note of a line that the main process writes."""
        self.finished.add(itemgetter(*self.manifest["key"])(line))

    def log(self, message: str) -> None:
        """Add a line to the common log, for what only this process has seen."""
        write_log(self.path, f"process {self.rank}: {message}")


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


@contextmanager
def recorded(
    job: Job,
    path: Path,
    monitor: ConsoleMonitor,
    details: dict[str, Any],
    dataset: Dataset | None = None,
    key: Sequence[str] = ("case_id",),
    check: Callable[[], None] = lambda: None,
    belongs: Callable[[Any], bool] | None = None,
) -> Iterator[Run | ReadOnlyRun]:
    """The job's run directory, open for the block. Errors are written to its log, and its manifest says how it ended.

    Of several processes only the main one writes. key: what tells lines apart. check: refuses what cannot come to
    anything; a run that lies there is replaced only after it, and only if nothing in it is needed. belongs: whether a
    line of an identity is one of this job's; the ids of `dataset`, if nothing else is said.
    """
    config, overwrite = dict(job.config.plain), job.config.settings.overwrite
    config.pop("plugins", None)  # a file names no code: which there were is told beside the versions
    if dataset is not None:  # other records are another run, even if they come from a file of the same name
        about = dataset.describe()
        config["data"] = {"sha256": about["sha256"], "ids_sha256": about["ids_sha256"]}
        details = {**details, "dataset": about}
    ignore = [*PLACE, *LENGTH, *SHARED, *(name for name in flatten(config) if name.rpartition(".")[2] in NO_INFLUENCE)]
    chosen = {"method": job.choices.get("method"), "model": job.model_name}
    brought = {"plugins": found} if (found := registry.sources()) else {}
    typed = {"arguments": list(job.composed.arguments), "origins": origins(job.composed)}
    details = {**chosen, "seeds": seeds(config), "processes": job.process_group.size, **typed, **brought, **details}
    opened = nullcontext(ReadOnlyRun(path, job.process_group.rank))
    if job.process_group.is_main:
        if overwrite and (path / MANIFEST).exists():
            refuse_needed(path, config)
            check()
        own = frozenset(dataset.ids if dataset is not None else ())
        opened = Run.open(
            path,
            job.command,
            config,
            ignore=ignore,
            key=key,
            belongs=belongs or own.__contains__,
            overwrite=overwrite,
            details=details,
        )
    with opened as run:
        monitor.log = run.log if job.process_group.is_main else None
        try:
            run.manifest, run.finished = job.process_group.broadcast((run.manifest, run.finished))
            members = job.process_group.gather([os.getpid()])
            if monitor.log and len(members) > 1:
                run.log(f"{len(members)} processes: {', '.join(map(str, members))}")
            yield run
        except EditCliError as error:
            run.log(f"error: {error}")
            raise
        except KeyboardInterrupt:
            run.log("interrupted")
            raise
        except Exception as error:
            run.log(traceback.format_exc())
            if isinstance(error, OSError) and is_refusal(error):
                told = refusal(error, path)
                raise MissingError(f"{told}; what was finished is kept, the same command goes on from there") from error
            if ran_out_of_memory(error):
                raise OutOfMemory(_memory_remedy(error)) from error
            raise Crashed(
                f"{type(error).__name__}: {error or 'no message'} (the traceback is in {path / LOG})"
            ) from error
        finally:
            monitor.log = None


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


def _memory_remedy(error: BaseException) -> str:
    device = "the device" if type(error).__name__ == "OutOfMemoryError" else "this machine"
    return (
        f"{device} ran out of memory: lower protocol.batch_size or model.batch_tokens, or load the model in half the"
        " size (model.dtype=bfloat16); what was finished is kept, the same command goes on from there"
    )
