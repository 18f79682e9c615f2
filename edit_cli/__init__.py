"""edit-cli: an experiment runner for editing the knowledge of language models.

`edit_cli.read(RUN)` gives a run as tables of pandas (docs/reading-results.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edit_cli.report.frames import read as read

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What is asked for is imported then, so that `import edit_cli` stays light."""
    if name != "read":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return import_module("edit_cli.report.frames").read
