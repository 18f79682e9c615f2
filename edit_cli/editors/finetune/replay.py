"""Fine-tuning with periodic replay of past edits (baseline of Hartvigsen et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from edit_cli.editors.finetune.base import Tuned, moved, parameters_of, step, tuning
from edit_cli.editors.old import Editor, require_layers
from edit_cli.editors.passes import row_losses, rows_right
from edit_cli.edits.edit import Edit, WeightDelta
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import Row
from edit_cli.requests import EditRequest


@dataclass(kw_only=True)
class Replay(Editor):
    """Adam on the new facts until every target token is the likeliest; now and then some passes over all facts so far.

    layers; part: "mlp_out" (the MLP's output projections) or "block" (all weights of the blocks). every: facts after
    which all so far are replayed, `epochs` times in random order, with a fresh optimiser. batch_size: facts in a step.
    """

    heads = ("causal", "seq2seq", "classifier")

    layers: list[int]
    part: str = "mlp_out"
    lr: float = 1.0e-2
    steps: int = 100
    every: int = 50
    epochs: int = 5
    batch_size: int = 16
    seed: int = 0
    _past: list[tuple[str, str]] = field(default_factory=list, init=False, repr=False)

    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> WeightDelta:
        """Dense updates of the tuned parameters."""
        new = [(request.text, request.target_new) for request in requests]
        with (
            lm.monitor.phase("train"),
            tuning(lm, parameters_of(lm, require_layers(self.layers, lm), self.part)) as weights,
        ):
            rows = lm.head.encode(new)
            for first in range(0, len(rows), self.batch_size):
                self._learn(lm, rows[first : first + self.batch_size], weights)
            replays = (len(self._past) + len(new)) // self.every - len(self._past) // self.every
            self._past += new
            for _ in range(min(replays, 1)):
                self._replay(lm, lm.head.encode(self._past), weights)
            return moved(weights, {"facts": [list(fact) for fact in new], "replayed": replays > 0})

    def _learn(self, lm: LM, rows: Sequence[Row], weights: Sequence[Tuned]) -> None:
        optimizer = torch.optim.Adam([weight.tuned for weight in weights], lr=self.lr)
        for _ in range(self.steps):
            found = lm.head.answers(rows, end=True)
            if bool(rows_right(found, len(rows)).all()):
                break
            step(optimizer, weights, row_losses(found, len(rows)).mean())

    def _replay(self, lm: LM, rows: Sequence[Row], weights: Sequence[Tuned]) -> None:
        optimizer = torch.optim.Adam([weight.tuned for weight in weights], lr=self.lr)
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + len(rows))
        with lm.monitor.task("replay", self.epochs * len(rows)) as advance:
            for _ in range(self.epochs):
                order = torch.randperm(len(rows), generator=draw).tolist()
                for first in range(0, len(rows), self.batch_size):
                    batch = [rows[i] for i in order[first : first + self.batch_size]]
                    step(optimizer, weights, row_losses(lm.head.answers(batch, end=True), len(batch)).mean())
                    advance(len(batch))

    def recall(self, lm: LM, edit: Edit) -> None:
        """The facts of `edit`, to be replayed."""
        self._past += [(prompt, target) for prompt, target in getattr(edit, "info", {}).get("facts", [])]

    def reset(self) -> None:
        self._past = []
