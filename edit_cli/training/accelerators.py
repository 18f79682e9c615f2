"""An Accelerator for a training: precision, accumulation and trackers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edit_cli.editors.meta.base import TrainingConfig
from edit_cli.errors import UsageError
from edit_cli.lm.model import LM
from edit_cli.training.trackers import missing, named, remedy, require

KEY = "method.training.trackers"


@contextmanager
def accelerated(lm: LM, config: TrainingConfig, folder: Path) -> Iterator[Any]:
    """An Accelerator on the model's device, with the trackers that are installed; those that write files do so in
    `folder`.

    Raises:
        UsageError: a precision that the device lacks, or a tracker that is not installed.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    trackers = _trackers(lm, config.trackers)
    AcceleratorState._reset_state()  # an earlier training in this process may have had another precision
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=config.accumulate, mixed_precision=config.precision,
            cpu=lm.device.type == "cpu",
            log_with=trackers or None, project_dir=str(folder) if trackers else None,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"method.training.precision={config.precision}: {str(error).splitlines()[0]}") from None
    if trackers:
        names = {tracker: named(tracker, folder) for tracker in trackers}
        accelerator.init_trackers("edit-cli", config={}, init_kwargs=names)
    try:
        yield accelerator
    finally:
        AcceleratorState._reset_state()


def _trackers(lm: LM, wanted: Sequence[str]) -> list[str]:
    """Those that are installed: without TensorBoard, which nobody need have asked for, the curves are on disk alone."""
    lacking = missing(wanted, KEY)
    if others := [name for name in lacking if name != "tensorboard"]:
        require(others, KEY)
    if lacking:
        lm.monitor.note(
            f"TensorBoard is not installed, so the curves are in the run directory alone ({remedy('tensorboard')})"
        )
    return [name for name in wanted if name not in lacking]
