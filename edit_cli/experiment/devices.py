"""One GPU a worker, for jobs that joblib runs side by side on one machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from edit_cli.files.lock import acquire

VISIBLE = "CUDA_VISIBLE_DEVICES"
CLAIMED = "EDIT_CLI_GPU"  # what this process has: it keeps it from job to job


def take_one(folder: Path) -> None:
    """Let this process, which must not have used a GPU yet, see one that no other worker has; if all are taken, all.

    folder: where workers tell each other which they have.
    """
    if CLAIMED in os.environ:
        return
    devices = visible()
    if len(devices) > 1 and (device := claim(folder, devices)) is not None:
        os.environ[VISIBLE] = os.environ[CLAIMED] = device


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if given := os.environ.get(VISIBLE):
        return given.split(",")
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def claim(folder: Path, devices: Sequence[str]) -> str | None:
    """The first device that no other process has claimed here; this one has it until it ends. None: all are taken."""
    for device in devices:
        place = folder / f"gpu-{device}"
        place.mkdir(parents=True, exist_ok=True)
        if acquire(place) is not None:
            return device
    return None
