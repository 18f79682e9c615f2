"""Figures that an editor offers of its own: it gives the data, `report` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edit_cli.editors.base import Editor
from edit_cli.report.figures import patch_heatmap
from edit_cli.requests import Case

DRAWERS = {patch_heatmap.NAME: patch_heatmap.draw}


def draw_own(editor: Editor[Any], cases: Sequence[Case], directory: Path, title: str) -> list[str]:
    """Draw what the editor shows of the attached edits of `cases` (in their order); the names of the figures,
    without suffix.
    """
    shown = editor.figures([request for case in cases for request in case.requests])
    for name, data in shown.items():
        DRAWERS[name](**data, directory=directory, title=title)
    return list(shown)
