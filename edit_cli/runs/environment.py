"""What a run was made with: code, libraries, devices.

No host names, users or paths: manifests are meant to be shared.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import edit_cli

PACKAGES = (
    "torch", "transformers", "tokenizers", "accelerate", "datasets", "safetensors", "hydra-core", "omegaconf",
    "numpy", "scipy", "scikit-learn", "nltk",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """{"versions", "devices", "threads", "cpus", "platform", "git"}, JSON-able."""
    import torch

    return {
        "versions": versions(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] or ["cpu"],
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "git": git_state(),
    }


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of the libraries that results may depend on (those that are
    installed).
    """
    found = {"edit-cli": edit_cli.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(package: Path | None = None) -> dict[str, Any] | None:
    """{"commit", "dirty"} of the checkout that `package` (default: the running edit_cli) belongs to.

    None without git or outside a checkout; an installed copy that merely lies inside someone's repository is not part
    of it.
    """
    package = package or Path(edit_cli.__file__).parent
    if not _git(package, "ls-files", "--", "__init__.py"):
        return None
    commit = _git(package, "rev-parse", "HEAD")
    return (
        {"commit": commit, "dirty": bool(_git(package, "status", "--porcelain", "--untracked-files=no"))}
        if commit
        else None
    )


def _git(directory: Path, *arguments: str) -> str:
    """Output of a git command, or nothing if it fails."""
    try:
        command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
