"""LocFT-BF: fine-tuning as it is done elsewhere, on all facts together and in one place (Yang et al., 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch

from edit_cli.config.schema import Count, Layers, Linked, NonNegative, Positive, Seed, Share
from edit_cli.editors.base import Context
from edit_cli.editors.cost import Cost
from edit_cli.editors.finetune.base import FinetuneConfig, FinetuneEditor, moved, tuning
from edit_cli.editors.passes import in_batches
from edit_cli.edits.edit import WeightDelta
from edit_cli.lm.heads.answers import Answers
from edit_cli.lm.heads.causal import CausalHead
from edit_cli.lm.layout import Layout
from edit_cli.lm.model import LM
from edit_cli.lm.outline import Outline
from edit_cli.requests import EditRequest


@dataclass(frozen=True, kw_only=True)
class LocFTConfig(FinetuneConfig):
    """Settings of localized, breadth-first fine-tuning."""

    layers: Layers | None = None  # type: ignore[assignment]
    """Layers that are tuned; null: the one at `depth`."""
    depth: Share = 0.7
    """Where that layer is, as a share of the model's depth; 1: the last one."""
    lr: Positive = 5e-4
    """Learning rate of Adam."""
    steps: Count = 25
    """Passes over all facts at most."""
    batch_size: Count = 100
    """Facts in a step; each pass draws the batches anew."""
    stop_loss: NonNegative = 1e-2
    """Mean loss, in nats a token, below which facts count as reached, once every token is the likeliest: of a batch,
    which is then not learned from, and of a pass, which is then the last one."""
    end: bool = True
    """Learn the token that ends a text after the answer, so that the model stops there; encoder-decoders always do."""
    seed: Annotated[Seed, Linked("${seed}")] = 0
    """Of the order of the facts."""


class LocFT(FinetuneEditor[LocFTConfig]):
    """Breadth first: a pass learns a little of every fact, where editors by fine-tuning learn one to its end before
    they turn to the next, which undoes it.
    """

    Config = LocFTConfig
    mass_editor = True

    def __init__(self, config: LocFTConfig, lm: LM, context: Context | None = None) -> None:
        super().__init__(placed(config, lm.layout), lm, context)
        self.ends = (lm.head.end,) if config.end and isinstance(lm.head, CausalHead) else ()

    @classmethod
    def cost(cls, config: LocFTConfig, outline: Outline, lengths: Sequence[int]) -> Cost | None:
        return super().cost(placed(config, outline.layout), outline, lengths)

    def edit(self, requests: Sequence[EditRequest]) -> WeightDelta:
        """Dense updates of the tuned parameters; float32 masters whatever the model's dtype."""
        lm, config = self.lm, self.config
        rows = lm.head.encode([(request.text, request.target_new) for request in requests], new=len(self.ends))
        batches = Shuffled(rows, config.batch_size, config.seed)
        with lm.monitor.phase("train"), tuning(lm, self.names) as weights:
            losses = self.fit(weights, batches, lambda loss, wrong: loss < config.stop_loss and wrong == 0)
            return moved(weights, {"losses": losses})

    def answers(self, rows: Sequence[Any]) -> Answers:
        """Scores of the answers and, of running text, of the token that ends it."""
        return super().answers([replace(row, ids=(*row.ids, *self.ends)) for row in rows] if self.ends else rows)


class Shuffled:
    """Batches of rows, in another order at every pass; the same orders again for the same seed."""

    def __init__(self, rows: Sequence[Any], size: int, seed: int) -> None:
        self.rows, self.size, self.draw = rows, size, torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[list[Any]]:
        order = torch.randperm(len(self.rows), generator=self.draw).tolist()
        for part in in_batches(self.rows, self.size):
            yield [self.rows[i] for i in order[part]]


def placed(config: LocFTConfig, layout: Layout) -> LocFTConfig:
    """With the layer at a share of the depth (22 of 32 at 0.7), where none are given."""
    if config.layers is not None:
        return config
    return replace(config, layers=[min(int(config.depth * layout.depth), layout.depth - 1)])
