"""Trackers by the names that accelerate knows: TensorBoard, W&B, MLflow, trackio, …"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from edit_cli.config.build import did_you_mean
from edit_cli.errors import MissingError, UsageError

Log = Callable[[Mapping[str, float], int], None]

EXTRAS = {"tensorboard": "'edit-cli[tensorboard]'"}  # what pip installs; others by their own names
PACKAGES = {"comet_ml": "comet-ml"}
NAMED_BY = {"wandb": "name", "trackio": "name", "mlflow": "run_name"}  # what else calls a run by names of its own


def missing(names: Sequence[str], key: str) -> list[str]:
    """Those that are not installed.

    Raises:
        UsageError: accelerate knows none of that name; names `key`, the setting.
    """
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = sorted(kind.value for kind in LoggerType if kind.value != "all")
    there = set(map(str, get_available_trackers()))
    for name in names:
        if name not in known:
            raise UsageError(f"{key}: {name} is none that accelerate knows{did_you_mean(name, known)}")
    return [name for name in names if name not in there]


def remedy(name: str) -> str:
    """What installs a tracker."""
    return f"pip install {EXTRAS.get(name) or PACKAGES.get(name, name)}"


def require(names: Sequence[str], key: str) -> None:
    """Raises:
    UsageError: accelerate knows no such tracker, or it is not installed; says what to install.
    """
    for name in missing(names, key):
        raise UsageError(f"{key}: {name} is not installed: {remedy(name)}, or leave it out")


def named(tracker: str, folder: Path) -> dict[str, str]:
    """What a tracker is given so that it calls a run as its folder is called."""
    return {NAMED_BY[tracker]: folder.name if folder.is_absolute() else str(folder)} if tracker in NAMED_BY else {}


@contextmanager
def reporting(names: Sequence[str], project: str, folder: Path, config: Mapping[str, Any]) -> Iterator[Log]:
    """What tells the trackers {name: value} at a step, for the block. Those that write files do so in `folder`.

    Raises:
        MissingError: one does not start, for want of a library, an account or a network of its own.
    """
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers write to its log, which asks it whose turn it is
    with ExitStack() as started:
        at_work = []
        for name in names:
            cls = LOGGER_TYPE_TO_CLASS[name]
            place = [str(folder)] if cls.requires_logging_directory else []
            tracker = cls(project, *place, **named(name, folder))
            try:
                tracker.start()
                started.callback(tracker.finish)
                tracker.store_init_configuration(dict(config))
            except Exception as error:  # whatever a program of others may raise
                why = str(error).strip().splitlines() or ["no message"]
                raise MissingError(f"{name} does not start ({type(error).__name__}: {why[0]}): leave it out") from error
            at_work.append(tracker)

        def log(values: Mapping[str, float], step: int) -> None:
            for tracker in at_work:
                tracker.log(dict(values), step=step)

        yield log
