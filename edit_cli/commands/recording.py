"""Where a job's run lies, what identifies it, and what becomes of it when something goes wrong."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edit_cli.commands.job import Job
from edit_cli.config import Settings, plain_containers
from edit_cli.console import ConsoleMonitor
from edit_cli.datasets import Dataset
from edit_cli.errors import EditCliError, OutOfMemory
from edit_cli.identity import flatten
from edit_cli.results import LOG, Run

PLACE = ("tag", "runs_dir", "run_dir", "overwrite", "cache_dir")  # where things lie
SHARED = ("stats", "corpus")  # stand in the method's own settings, if it uses them
NO_INFLUENCE = ("cache_dir", "batch_tokens")  # last parts of keys that move nothing but speed and memory


class Crashed(EditCliError):
    """An error that nobody foresaw. Its traceback is in the run's log."""

    exit_code = 1


def run_path(job: Job, settings: Settings, *parts: str) -> Path:
    """runs/COMMAND/PARTS…/METHOD[-TAG], unless `run_dir` says otherwise. In a sweep, `run_dir` holds a folder a job."""
    leaf = job.choices["method"] + (f"-{slug(job.tag)}" if job.tag else "")
    if settings.run_dir is not None:
        chosen = Path(settings.run_dir).expanduser()
        return chosen.joinpath(*parts, leaf) if job.in_sweep else chosen
    return Path(settings.runs_dir).expanduser().joinpath(job.command, *parts, leaf)


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^\w.=,+-]+", "_", text).strip("._") or "_"


@contextmanager
def recorded(
    job: Job,
    settings: Settings,
    path: Path,
    monitor: ConsoleMonitor,
    details: dict[str, Any],
    dataset: Dataset | None = None,
    key: Sequence[str] = ("case_id",),
) -> Iterator[Run]:
    """The job's run directory, open for the block. Errors are written to its log, and its manifest says how it ended."""
    config = plain_containers(job.config)
    if dataset is not None:  # other records are another run, even if they come from a file of the same name
        about = dataset.describe()
        config["data"] = {"sha256": about["sha256"], "ids_sha256": about["ids_sha256"]}
        details = {**details, "dataset": about}
    ignore = [*PLACE, *SHARED, *(name for name in flatten(config) if name.rpartition(".")[2] in NO_INFLUENCE)]
    chosen = {group: job.choices.get(group) for group in ("method", "model")}
    details = {**chosen, "seeds": seeds(config), **details}
    with Run.open(path, job.command, config, ignore=ignore, key=key, overwrite=settings.overwrite, details=details) as run:
        monitor.log = run.log
        try:
            yield run
        except EditCliError as error:
            run.log(f"error: {error}")
            raise
        except KeyboardInterrupt:
            run.log("interrupted")
            raise
        except Exception as error:
            run.log(traceback.format_exc())
            if ran_out_of_memory(error):
                raise OutOfMemory(_memory_remedy(error)) from error
            raise Crashed(f"{type(error).__name__}: {error or 'no message'} (the traceback is in {path / LOG})") from error
        finally:
            monitor.log = None


def seeds(config: dict[str, Any]) -> dict[str, int]:
    """Every seed of the configuration, by key."""
    found = flatten(config, SHARED)
    return {name: value for name, value in found.items() if name.rpartition(".")[2].endswith("seed") and value is not None}


def ran_out_of_memory(error: BaseException) -> bool:
    """Out of memory, as Python, CUDA or torch's CPU allocator say it."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _memory_remedy(error: BaseException) -> str:
    device = "the device" if type(error).__name__ == "OutOfMemoryError" else "this machine"
    return (
        f"{device} ran out of memory: lower protocol.batch_size or model.batch_tokens, or load the model in half the size "
        "(model.dtype=bfloat16); what was finished is kept, the same command goes on from there"
    )
