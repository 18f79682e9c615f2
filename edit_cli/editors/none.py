"""No editing: the row that every other one is held against."""

from __future__ import annotations

from collections.abc import Sequence

from edit_cli.editors.base import Editor, EditorConfig
from edit_cli.edits.edit import WeightDelta
from edit_cli.requests import EditRequest


class NoEditing(Editor[EditorConfig]):
    """The model as it is, asked as any edited one: an edit that changes nothing."""

    Config = EditorConfig
    mass_editor = True
    heads = ("causal", "seq2seq", "classifier", "image")
    experts = True

    def edit(self, requests: Sequence[EditRequest]) -> WeightDelta:
        """An edit of no weight."""
        return WeightDelta()
