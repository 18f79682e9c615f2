"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """`path` with a leading ~ or ~user filled in; that of a user who does not exist stays as it is."""
    return Path(os.path.expanduser(path))
