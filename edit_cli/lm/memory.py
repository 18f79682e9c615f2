"""How much memory is free where a model is to go."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

# of a container, in either version of control groups: its limit, and what is used of it
GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def free(device: torch.device) -> int | None:
    """Bytes that may still be taken there; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return _free_on_host() if device.type == "cpu" else None


def taken() -> int:
    """Bytes of host memory that this process holds."""
    return psutil.Process().memory_info().rss


def _free_on_host() -> int:
    """Of the machine, or of what a container may use of it."""
    return min([psutil.virtual_memory().available, *_left_in_container()])


def _left_in_container() -> list[int]:
    """Pages of files that can be dropped count as free."""
    found = []
    for limit, used in GROUPS:
        try:
            lines = (used.parent / "memory.stat").read_text().splitlines()
            spare = {name: int(value) for name, value in map(str.split, lines)}
            droppable = spare.get("total_inactive_file", spare.get("inactive_file", 0))
            found.append(max(int(limit.read_text()) - int(used.read_text()) + droppable, 0))
        except (OSError, ValueError):  # no such group, or one without a limit ("max")
            continue
    return found
