"""Editors that are quick to make: trained for a few seconds, with less text and fewer steps than good edits need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from embedded import Prepared
from hydra import compose, initialize_config_module
from torch import nn

from edit_cli.config.build import register_resolvers
from edit_cli.datasets.counterfact import CounterFact
from edit_cli.datasets.world import WorldEdits
from edit_cli.editors.base import Examples, Method
from edit_cli.editors.meta import checkpoints
from edit_cli.editors.meta.base import TrainableConfig, TrainableEditor
from edit_cli.editors.meta.hypernetwork import LowRankLayer
from edit_cli.experiment.examples import OtherRecords
from edit_cli.experiment.setup import method_of
from edit_cli.lm.model import LM
from edit_cli.requests import Case
from edit_cli.statistics.corpora import WORLD
from edit_cli.training.loop import Training

E = TypeVar("E", bound=TrainableEditor[Any, Any])
FEW_LINES = "\n".join(WORLD.read_text(encoding="utf-8").splitlines()[:60])
QUICK = {
    "tpatcher": ("method.memory_size=1000", "method.validation_size=300", "method.top_memory=100", "method.steps=126"),
    "ike": ("method.demonstrations=4",),
    "wise": ("method.steps=30", "method.context.per_start=1"),
    "kn": ("method.steps=3", "method.context.per_start=1"),
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


def changed(editor: E, **settings: Any) -> E:
    """Another editor on the same model, with these settings."""
    return type(editor)(replace(editor.config, **settings), editor.lm)


def brief(config: TrainableConfig, folder: Path, steps: int = 20) -> TrainableConfig:
    """The same settings, to be trained for a few steps and looked up in `folder`."""
    training = replace(
        config.training,
        steps=steps,
        edits=min(config.training.edits, 4),
        validate_every=steps,
        validation_edits=4,
        save_every=steps,
        trackers=[],
    )
    return replace(config, training=training, cache_dir=str(folder))


def trained(editor: E, folder: Path, steps: int = 20) -> E:
    """The same editor, `brief`, with its checkpoint in `folder`."""
    made = type(editor)(brief(editor.config, folder, steps), editor.lm)
    keep_trained(made, folder)
    return made


def keep_trained(editor: TrainableEditor[Any, Any], folder: Path) -> None:
    """Train `editor` on the world and leave the checkpoint where it looks for it, unless it is there."""
    identity = editor.identity()
    place = checkpoints.place(folder, identity, type(editor).__name__.lower(), editor.lm.name)
    if not checkpoints.find(folder, identity):
        done = Training(
            editor,
            statements("train")[:120],
            statements("validation")[:40],
            folder / "at-work" / place.name,
            "test",
            lambda line: None,
        ).run()
        about = {**identity, "model": {"name": editor.lm.name}, "dataset": {"name": "world"}}
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
    if isinstance(method.config, TrainableConfig):
        method = replace(method, config=brief(method.config, folder))
        for lm in models:
            keep_trained(method.begin(lm), folder)
    return Prepared(method, examples_of(method))


def examples_of(method: Method) -> Examples | None:
    """Records beside the edited ones, for methods that learn some of them along (ft-mixed)."""
    learns_some = getattr(method.config, "unmodified", 0)
    return OtherRecords(CounterFact("counterfact", records="world"), []) if learns_some else None


def low_rank_layers(net: nn.Module) -> list[LowRankLayer]:
    """Those of a hypernetwork or of a part of it, in their order."""
    return [part for part in net.modules() if isinstance(part, LowRankLayer)]
