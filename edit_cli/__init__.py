"""edit-cli: an experiment runner for editing the knowledge of language models.

In Python: `load` a model, `edit` it, `evaluate` the edit, `save` it and `attach` it again (docs/python.md).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edit_cli.api import attach, edit, evaluate, load, save

__version__ = "0.1.0"
__all__ = ["__version__", "attach", "edit", "evaluate", "load", "save"]


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is asked for."""
    if name in __all__:
        from edit_cli import api

        return getattr(api, name)
    raise AttributeError(f"module 'edit_cli' has no attribute {name!r}")
