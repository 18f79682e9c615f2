"""Editors that are quick to make: trained for a few seconds, with less text and fewer steps than good edits need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

from embedded import Prepared
from hydra import compose, initialize_config_module

from edit_cli.commands.parts import method_of
from edit_cli.config.build import register_resolvers
from edit_cli.datasets.world import WorldEdits
from edit_cli.editors.meta import checkpoints
from edit_cli.editors.meta.base import TrainableEditor
from edit_cli.editors.old import OldMethod
from edit_cli.lm.model import LM
from edit_cli.requests import Case
from edit_cli.statistics.corpora import WORLD
from edit_cli.training.loop import train

FEW_LINES = "\n".join(WORLD.read_text(encoding="utf-8").splitlines()[:60])
QUICK = {
    "tpatcher": ("method.memory_size=1000", "method.validation_size=300", "method.top_memory=100", "method.steps=126"),
    "ike": ("method.demonstrations=4",),
    "wise": ("method.steps=30", "method.context.per_start=1"),
    "lora": ("method.steps=20",),
    "ultraedit": ("method.begin_with=0",),
    "retrain": ("method.corpus=FEW",),
    "enn": ("method.trains=edited", "method.layers=[4, 5]", "method.steps=2"),
    "malmen": ("method.edits=4", "method.rank=8"),
}


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


def quick_editor(folder: Path, name: str, models: Iterable[LM], *overrides: str) -> Prepared:
    """As the command line would build it for the embedded model; a trained one is trained on each of `models`.

    folder: of statistics and checkpoints.
    """
    register_resolvers()
    with initialize_config_module("edit_cli.conf", version_base="1.3"):
        settings = [f"method={name}", f"cache_dir={folder}", "stats.tokens=6000", *QUICK.get(name, ())]
        config = compose("evaluate", [*settings, *overrides])
    if "corpus" in config.method and config.method.corpus == "FEW":
        (folder / "few.txt").write_text(FEW_LINES, encoding="utf-8")
        config.method.corpus = str(folder / "few.txt")
    method = method_of(config.method)
    if isinstance(method.config, TrainableEditor):
        made = brief(method.config, folder)
        for lm in models:
            keep_trained(made, lm, folder)
        return Prepared(OldMethod(made))
    return Prepared(method)
