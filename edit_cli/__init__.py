"""edit-cli: an experiment runner for editing the knowledge of language models.

In Python, `load` a model, `edit` it, `evaluate` the edit, `save` it, `attach` it again and `undo` some of its
facts (docs/python.md); `read` gives a run as tables of pandas (docs/reading-results.md).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edit_cli.api import attach as attach
    from edit_cli.api import edit as edit
    from edit_cli.api import evaluate as evaluate
    from edit_cli.api import in_chat as in_chat
    from edit_cli.api import load as load
    from edit_cli.api import save as save
    from edit_cli.api import undo as undo
    from edit_cli.report.tables.frames import read as read

__version__ = "0.1.0"
_WHERE = dict.fromkeys(("attach", "edit", "evaluate", "in_chat", "load", "save", "undo"), "api")
_WHERE["read"] = "report.tables.frames"


def __getattr__(name: str) -> Any:
    """What is asked for is imported then, so that `import edit_cli` stays light."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"edit_cli.{_WHERE[name]}"), name)
