"""Fine-tuning on the requests, plain or with every weight held near its old value (Zhu et al., 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edit_cli.editors.finetune.base import Tuned, parameters_of, step, tuning
from edit_cli.editors.old import Editor, require_layers
from edit_cli.editors.passes import row_losses
from edit_cli.edits.edit import WeightDelta
from edit_cli.errors import UsageError
from edit_cli.lm.answers import Answers
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import Row, pad_right
from edit_cli.requests import EditRequest


@dataclass(kw_only=True)
class FT(Editor):
    """Adam on the likelihood of the new targets, on the parameters of a few layers.

    layers; part: "mlp_out" (the MLP's output projection, as published) or "block" (all weights of the block).
    norm_constraint: δ of ‖θ − θ₀‖_∞ ≤ δ, enforced after every step (projected gradient); null for none.
    objective: "target" — teacher-forced cross-entropy of all target tokens; "prompt_last" — every target token is
    predicted from the last prompt token, as released with ROME (the same for targets of one token).
    steps: passes over the requests in batches of `batch_size`; it stops once the mean loss of a pass is below
    `stop_loss`.
    """

    heads = ("causal", "seq2seq", "classifier")

    layers: list[int]
    part: str = "mlp_out"
    lr: float = 5.0e-4
    steps: int = 25
    batch_size: int = 64
    weight_decay: float = 0.0
    norm_constraint: float | None = None
    objective: str = "target"
    stop_loss: float = 1.0e-2

    def __post_init__(self) -> None:
        if self.objective not in ("target", "prompt_last"):
            raise UsageError(f"method.objective={self.objective}: choose target or prompt_last")
        if self.norm_constraint is not None and self.norm_constraint <= 0:
            raise UsageError(f"method.norm_constraint={self.norm_constraint}: give a positive bound, or null for none")

    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> WeightDelta:
        """Dense updates of the tuned parameters; float32 masters whatever the model's dtype."""
        if self.objective == "prompt_last" and lm.head.kind != "causal":
            raise UsageError("method.objective=prompt_last needs a causal language model: choose target")
        rows = lm.head.encode([(request.text, request.target_new) for request in requests])
        with lm.monitor.phase("train"), tuning(lm, self._names(lm)) as weights:
            losses = self._train(lm, rows, weights)
            return WeightDelta(
                {weight.name: weight.tuned.detach() - weight.start for weight in weights}, {"losses": losses}
            )

    def _names(self, lm: LM) -> list[str]:
        return parameters_of(lm, require_layers(self.layers, lm), self.part)

    def _train(self, lm: LM, rows: Sequence[Row], weights: Sequence[Tuned]) -> list[float]:
        optimizer = torch.optim.Adam([weight.tuned for weight in weights], lr=self.lr, weight_decay=self.weight_decay)
        losses: list[float] = []
        with lm.monitor.task("fine-tuning", self.steps) as advance:
            for _ in range(self.steps):
                total = 0.0
                for first in range(0, len(rows), self.batch_size):
                    batch = rows[first : first + self.batch_size]
                    loss = self._loss(lm, batch)
                    total += loss.item() * len(batch)
                    if loss.item() < self.stop_loss:
                        continue
                    step(optimizer, weights, loss, self._held)
                losses.append(total / len(rows))
                advance(1)
                if losses[-1] < self.stop_loss:
                    break
        return losses

    def _held(self, weight: Tuned) -> Tensor:
        """The weight, no further than `norm_constraint` from where it started."""
        if self.norm_constraint is None:
            return weight.tuned
        low, high = weight.start - self.norm_constraint, weight.start + self.norm_constraint
        return torch.maximum(torch.minimum(weight.tuned, high), low)

    def _loss(self, lm: LM, rows: Sequence[Row]) -> Tensor:
        """Mean over rows of the mean negative log-likelihood of their target tokens."""
        found = lm.head.answers(rows, end=True) if self.objective == "target" else _from_last_prompt_token(lm, rows)
        return row_losses(found, len(rows)).mean()


def _from_last_prompt_token(lm: LM, rows: Sequence[Row]) -> Answers:
    """Every target token as if it were the first."""
    ids, mask = pad_right([row.ids[: row.start] for row in rows], lm.head.pad, lm.device)
    number = torch.tensor([r for r, row in enumerate(rows) for _ in row.target], device=lm.device)
    at = torch.tensor([row.start - 1 for row in rows for _ in row.target], device=lm.device)
    logits = lm.head.logits_at(ids, mask, number, at)
    labels = torch.tensor([i for row in rows for i in row.target], device=logits.device)
    return Answers(logits, labels, number.to(logits.device))
