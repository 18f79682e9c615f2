"""Fine-tuning with periodic replay of past edits (baseline of Hartvigsen et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from edit_cli.config.schema import Count, Linked, Seed
from edit_cli.editors.base import Context
from edit_cli.editors.finetune.base import FinetuneConfig, FinetuneEditor, Tuned, all_right, moved, step, tuning
from edit_cli.editors.passes import in_batches, row_losses
from edit_cli.edits.edit import Edit, WeightDelta
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(FinetuneConfig):
    """Settings of fine-tuning with replay."""

    every: Count = 50
    """Facts after which all so far are replayed."""
    epochs: Count = 5
    """How many times, each in a random order."""
    batch_size: Count = 16
    """Facts in a step."""
    seed: Annotated[Seed, Linked("${seed}")] = 0
    """Of the orders."""


class Replay(FinetuneEditor[ReplayConfig]):
    """Adam on the new facts until every target token is the likeliest; now and then some passes over all facts so far,
    with a fresh optimizer.
    """

    Config = ReplayConfig

    def __init__(self, config: ReplayConfig, lm: LM, context: Context | None = None) -> None:
        super().__init__(config, lm, context)
        self.past: list[tuple[str, str]] = []  # (prompt, target) of every fact so far

    def edit(self, requests: Sequence[EditRequest]) -> WeightDelta:
        """Dense updates of the tuned parameters."""
        lm, config = self.lm, self.config
        new = [(request.text, request.target_new) for request in requests]
        every = [*self.past, *new]
        due = len(every) // config.every > len(self.past) // config.every
        with lm.monitor.phase("train"), tuning(lm, self.names) as weights:
            rows = lm.head.encode(new)
            for part in in_batches(rows, config.batch_size):
                self.fit(weights, [rows[part]], all_right)
            if due:
                self.replay(lm.head.encode(every), weights)
            delta = moved(weights, {"facts": [list(fact) for fact in new], "replayed": due})
        self.remember(delta)
        return delta

    def replay(self, rows: Sequence[Any], weights: Sequence[Tuned]) -> None:
        """Some passes over all facts."""
        config = self.config
        optimizer = torch.optim.Adam([weight.tuned for weight in weights], lr=config.lr)
        draw = torch.Generator().manual_seed(config.seed * 1_000_003 + len(rows))
        with self.lm.monitor.task("replay", config.epochs * len(rows)) as advance:
            for _ in range(config.epochs):
                order = torch.randperm(len(rows), generator=draw).tolist()
                for part in in_batches(rows, config.batch_size):
                    batch = [rows[i] for i in order[part]]
                    step(optimizer, weights, row_losses(self.answers(batch), len(batch)).mean())
                    advance(len(batch))

    def recall(self, edit: Edit) -> None:
        """The facts of `edit`, to be replayed."""
        self.past += [(prompt, target) for prompt, target in getattr(edit, "info", {}).get("facts", [])]
