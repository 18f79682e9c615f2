"""Fine-tuning on the requests, plain or with every weight held near its old value (Zhu et al., 2020)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edit_cli.edits import WeightDelta
from edit_cli.editors.base import Editor, require_layers
from edit_cli.errors import UsageError
from edit_cli.lm.hooks import exact
from edit_cli.lm.model import LM
from edit_cli.lm.places import Place
from edit_cli.lm.tokens import Row, pad_right
from edit_cli.requests import EditRequest


@dataclass(kw_only=True)
class FT(Editor):
    """Adam on the likelihood of the new targets, on the parameters of a few layers.

    layers; part: "mlp_out" (the MLP's output projection, as published) or "block" (all weights of the block).
    norm_constraint: δ of ‖θ − θ₀‖_∞ ≤ δ, enforced after every step (projected gradient); null for none.
    objective: "target" — teacher-forced cross-entropy of all target tokens; "prompt_last" — every target token is predicted
    from the last prompt token, as released with ROME (the same for targets of one token).
    steps: passes over the requests in batches of `batch_size`; it stops once the mean loss of a pass is below `stop_loss`.
    """

    layers: list[int]
    part: str = "mlp_out"
    lr: float = 5.0e-4
    steps: int = 25
    batch_size: int = 64
    weight_decay: float = 0.0
    norm_constraint: float | None = None
    objective: str = "target"
    stop_loss: float = 1.0e-2

    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> WeightDelta:
        """Dense updates of the tuned parameters; float32 masters whatever the model's dtype."""
        if self.objective not in ("target", "prompt_last"):
            raise UsageError(f"method.objective={self.objective}: choose target or prompt_last")
        if self.norm_constraint is not None and self.norm_constraint <= 0:
            raise UsageError(f"method.norm_constraint={self.norm_constraint}: give a positive bound, or null for none")
        rows = lm.head.encode([(request.text, request.target_new) for request in requests])
        with lm.monitor.phase("train"), tuning(lm, self._names(lm)) as weights:
            losses = self._train(lm, rows, weights)
            return WeightDelta({weight.name: weight.tuned.detach() - weight.start for weight in weights}, {"losses": losses})

    def _names(self, lm: LM) -> list[str]:
        layers = require_layers(self.layers, lm)
        if self.part == "mlp_out":
            return [f"{lm.layout.mlp_out(layer)}.weight" for layer in layers]
        if self.part == "block":
            return [f"{lm.layout.block(n)}.{name}" for n in layers for name, _ in lm.module(lm.layout.block(n)).named_parameters()]
        raise UsageError(f"method.part={self.part}: choose mlp_out or block")

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
                    gradients = torch.autograd.grad(loss, [weight.present for weight in weights])
                    for weight, gradient in zip(weights, gradients, strict=True):
                        weight.tuned.grad = gradient.to(weight.tuned)
                    optimizer.step()
                    self._project(weights)
                losses.append(total / len(rows))
                advance(1)
                if losses[-1] < self.stop_loss:
                    break
        return losses

    @torch.no_grad()
    def _project(self, weights: Sequence[Tuned]) -> None:
        for weight in weights:
            if self.norm_constraint is not None:
                low, high = weight.start - self.norm_constraint, weight.start + self.norm_constraint
                weight.tuned.copy_(torch.maximum(torch.minimum(weight.tuned, high), low))
            weight.place.assign(weight.tuned)

    def _loss(self, lm: LM, rows: Sequence[Row]) -> Tensor:
        """Mean over rows of the mean negative log-likelihood of their target tokens."""
        last = self.objective == "prompt_last"
        ids, mask = pad_right([row.ids[: row.start] if last else row.ids[:-1] for row in rows], lm.head.pad, lm.device)
        where = [(r, row.start - 1 + (0 if last else j)) for r, row in enumerate(rows) for j in range(len(row.target))]
        at = torch.tensor(where, device=lm.device)
        labels = torch.tensor([i for row in rows for i in row.target], device=lm.device)
        share = torch.tensor([1.0 / len(row.target) / len(rows) for row in rows for _ in row.target], device=lm.device)
        logits = lm.head.logits_at(ids, mask, at[:, 0], at[:, 1])
        return (nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="none") * share.to(logits)).sum()


@dataclass(frozen=True)
class Tuned:
    """A weight at work: `start` and `tuned`, at least float32, the second to be trained; `present`, by which the loss is differentiated."""

    name: str
    place: Place
    start: Tensor
    tuned: Tensor
    present: Tensor


@contextmanager
def tuning(lm: LM, names: Sequence[str]) -> Iterator[list[Tuned]]:
    """The parameters ready to be trained. Every bit is restored on leaving."""
    with ExitStack() as stack:
        weights = []
        for name in names:
            place = lm.place(name)
            start = exact(lm.masters[name] if name in lm.masters else place.value()).clone()
            stack.callback(place.keep())
            weights.append(Tuned(name, place, start, start.clone().requires_grad_(), stack.enter_context(place.tunable())))
        yield weights
