"""Fine-tuning on the requests, plain or with every weight held near its old value (Zhu et al., 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from edit_cli.config.schema import Count, NonNegative, Positive
from edit_cli.editors.base import Context
from edit_cli.editors.finetune.base import FinetuneConfig, FinetuneEditor, Tuned, moved, tuning
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
    """Mean loss of a pass below which it is the last one, and of a batch below which nothing is learnt from it."""
    batch_size: Count = 64
    """Facts in a step."""
    weight_decay: NonNegative = 0.0
    """Weight decay of Adam."""
    norm_constraint: Positive | None = None
    """δ of ‖θ − θ₀‖_∞ ≤ δ, to which every weight is clamped after a step (FT-L), or null for none."""
    objective: Literal["target", "prompt_last"] = "target"
    """What is learnt: all target tokens, teacher-forced (target), or each of them from the prompt's last token
    (prompt_last, as released with ROME; the same for targets of one token)."""


class FT(FinetuneEditor[FTConfig]):
    """Adam on the likelihood of the new targets: projected gradient, where a norm constraint is set."""

    Config = FTConfig

    def __init__(self, config: FTConfig, lm: LM, context: Context | None = None) -> None:
        super().__init__(config, lm, context)
        if config.objective == "prompt_last" and lm.head.kind != "causal":
            raise UsageError("method.objective=prompt_last needs a causal language model: choose target")

    def edit(self, requests: Sequence[EditRequest]) -> WeightDelta:
        """Dense updates of the tuned parameters; float32 masters whatever the model's dtype."""
        lm, config = self.lm, self.config
        rows = lm.head.encode([(request.text, request.target_new) for request in requests])
        batches = [rows[part] for part in in_batches(rows, config.batch_size)]
        with lm.monitor.phase("train"), tuning(lm, self.names) as weights:
            losses = self.fit(weights, batches, lambda loss, _: loss < config.stop_loss, config.weight_decay)
            return moved(weights, {"losses": losses})

    def project(self, weight: Tuned) -> Tensor:
        """The weight, no further than `norm_constraint` from where it started."""
        bound = self.config.norm_constraint
        if bound is None:
            return weight.tuned
        return torch.maximum(torch.minimum(weight.tuned, weight.start + bound), weight.start - bound)

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
