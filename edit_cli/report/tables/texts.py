"""Texts in tables: records and runs may hold anything, so what a terminal would obey is shown instead of sent."""

from __future__ import annotations

from typing import Any

from rich import text as rich_text

from edit_cli.terminal import visible


class Text(rich_text.Text):
    """rich's, which would drop some control characters silently and send the others."""

    def __init__(self, text: str = "", style: Any = "", **options: Any) -> None:
        super().__init__(visible(text), style, **options)

    def append(self, text: Any, style: Any = None) -> Text:
        super().append(visible(text) if isinstance(text, str) else text, style)
        return self
