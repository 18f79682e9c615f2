"""Trained editors, trained for a few seconds: what tests of them share."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from edit_cli import checkpoints
from edit_cli.datasets.world import WorldEdits
from edit_cli.editors.trainable import TrainableEditor
from edit_cli.lm.model import LM
from edit_cli.requests import Case
from edit_cli.training.loop import train


@cache
def statements(split: str) -> tuple[Case, ...]:
    """Edits of the embedded world, with locality prompts."""
    return WorldEdits(name="world", split=split).load().cases


def brief(editor: TrainableEditor, folder: Path, steps: int = 20) -> TrainableEditor:
    """The same editor, to be trained for a few steps and looked up in `folder`."""
    training = replace(
        editor.training,
        steps=steps,
        edits=min(editor.training.edits, 4),
        validate_every=steps,
        validation_edits=4,
        save_every=steps,
        trackers=[],
    )
    return replace(editor, training=training, cache_dir=str(folder))


def keep_trained(editor: TrainableEditor, lm: LM, folder: Path) -> None:
    """Train `editor` (see `brief`) on the world and leave the checkpoint where it looks for it, unless it is there."""
    identity = editor.identity(lm)
    place = checkpoints.place(folder, identity, type(editor).__name__.lower(), lm.name)
    if not place.exists():
        done = train(
            editor,
            lm,
            statements("train")[:120],
            statements("validation")[:40],
            folder / "at-work" / place.name,
            "test",
            lambda line: None,
        )
        about = {**identity, "model": {"name": lm.name}, "dataset": {"name": "world"}}
        checkpoints.save(place, done.net, about)
