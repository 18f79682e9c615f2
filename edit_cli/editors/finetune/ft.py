"""Fine-tuning on the requests, plain or with every weight held near its old value (Zhu et al., 2020)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from edit_cli.config.schema import Count, Natural, NonNegative, Positive
from edit_cli.editors.base import Context
from edit_cli.editors.finetune.base import FinetuneConfig, FinetuneEditor, Tuned, moved, tuning
from edit_cli.editors.finetune.side_by_side import train_each
from edit_cli.editors.passes import in_batches
from edit_cli.edits.edit import WeightDelta
from edit_cli.errors import UsageError
from edit_cli.lm.heads.answers import Answers
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import pad_right
from edit_cli.requests import EditRequest


@dataclass(frozen=True, kw_only=True)
class FTConfig(FinetuneConfig):
    """Settings of fine-tuning."""

    lr: Positive = 5e-4
    """Learning rate of Adam."""
    steps: Count = 25
    """Passes over the facts at most."""
    stop_loss: NonNegative = 1e-2
    """Mean loss of a pass below which it is the last one, and of a batch below which nothing is learned from it."""
    batch_size: Count = 64
    """Facts in a step."""
    weight_decay: NonNegative = 0.0
    """Weight decay of Adam."""
    norm_constraint: Positive | None = None
    """δ of ‖θ − θ₀‖ ≤ δ, onto which the weights are projected after a step (FT-L), or null for none."""
    norm: Literal["linf", "l2"] = "linf"
    """Of which norm: every weight is clamped (linf), or the change of all tuned weights together is shortened (l2)."""
    unmodified: Natural = 0
    """Unmodified facts that are learned along with each modified one, from records which the run neither edits nor asks
    about."""
    objective: Literal["target", "prompt_last"] = "target"
    """What is learned: all target tokens, teacher-forced (target), or each of them from the prompt's last token
    (prompt_last, as released with ROME; the same for targets of one token)."""


class FT(FinetuneEditor[FTConfig]):
    """Adam on the likelihood of the new targets: projected gradient, where a norm constraint is set."""

    Config = FTConfig
    heads = ("causal", "seq2seq", "classifier", "image")

    def __init__(self, config: FTConfig, lm: LM, context: Context | None = None) -> None:
        super().__init__(config, lm, context)
        if config.objective == "prompt_last" and lm.head.kind != "causal":
            raise UsageError("method.objective=prompt_last needs a causal language model: choose target")

    def edit(self, requests: Sequence[EditRequest]) -> WeightDelta:
        """Dense updates of the tuned parameters; float32 masters whatever the model's dtype."""
        lm, config = self.lm, self.config
        rows = lm.head.encode(self.facts(requests))
        batches = [rows[part] for part in in_batches(rows, config.batch_size)]
        with lm.monitor.phase("train"), tuning(lm, self.names) as weights:
            losses = self.fit(weights, batches, lambda loss, _: loss < config.stop_loss, config.weight_decay)
            return self._moved(weights, losses)

    def edit_each(self, batches: Sequence[Sequence[EditRequest]]) -> list[WeightDelta] | None:
        """Of projections alone, where a pass is one step."""
        lm, config = self.lm, self.config
        if config.part != "mlp_out" or not config.layers:
            return None
        tasks = [lm.head.encode(self.facts(requests)) for requests in batches]
        if any(len(rows) > config.batch_size for rows in tasks):
            return None
        with lm.monitor.phase("train"):
            trained = train_each(self, tasks, config.batch_size, config.stop_loss, config.weight_decay)
        return None if trained is None else [self._moved(weights, losses) for weights, losses in trained]

    def _moved(self, weights: Sequence[Tuned], losses: list[float]) -> WeightDelta:
        steps = sum(loss >= self.config.stop_loss for loss in losses)  # the pass that finds them learned is none
        return moved(weights, {"losses": losses, "diagnosis": {"steps": steps}})

    def facts(self, requests: Sequence[EditRequest]) -> list[tuple[str, str]]:
        """(prompt, answer) of what is learned: each request, and behind it its share of unmodified facts.

        Raises:
            UsageError: the data set has too few of them.
        """
        modified = [(request.text, request.target_new) for request in requests]
        each = self.config.unmodified
        if not each:
            return modified
        wanted = each * len(modified)
        examples = self.context.examples
        others = [] if examples is None else examples.others()
        pairs = [(request.text, case.right_or(request.target_true)) for case in others for request in case.requests]
        found = [(prompt, answer) for prompt, answer in pairs if answer is not None]
        if len(found) < wanted:
            raise UsageError(
                f"method.unmodified={each} asks for {wanted:,} unmodified facts, and the data set has"
                f" {len(found):,} that this run neither edits nor asks about: choose a smaller number, fewer facts an"
                " edit (protocol.batch_size), or a larger file"
            )
        kept = random.Random(f"unmodified {modified[0]}").sample(found, wanted)
        return [fact for i, one in enumerate(modified) for fact in (one, *kept[i * each : (i + 1) * each])]

    def project(self, weights: Sequence[Tuned]) -> None:
        """The weights, no further than `norm_constraint` from where they started: the nearest point in the ball."""
        bound = self.config.norm_constraint
        if bound is None:
            return
        if self.config.norm == "linf":
            for weight in weights:
                weight.tuned.copy_(
                    torch.maximum(torch.minimum(weight.tuned, weight.start + bound), weight.start - bound)
                )
            return
        moves = [weight.tuned - weight.start for weight in weights]
        far = math.sqrt(math.fsum(move.double().square().sum().item() for move in moves))
        if far > bound:
            for weight, move in zip(weights, moves, strict=True):
                weight.tuned.copy_(weight.start + move * (bound / far))

    def answers(self, rows: Sequence[Any]) -> Answers:
        """By `objective`: every target token after those before it, or as if it were the first."""
        if self.config.objective == "target":
            return super().answers(rows)
        head, device = self.lm.head, self.lm.device
        ids, mask = pad_right([row.ids[: row.start] for row in rows], head.pad, device)
        number = torch.tensor([r for r, row in enumerate(rows) for _ in row.target], device=device)
        at = torch.tensor([row.start - 1 for row in rows for _ in row.target], device=device)
        logits = head.logits_at(ids, mask, number, at)
        labels = torch.tensor([i for row in rows for i in row.target], device=logits.device)
        return Answers(logits, labels, number.to(logits.device))
