"""Fine-tuning on the requests, plain or with every weight held near its old value (Zhu et al., 2020)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edit_cli.edits import WeightDelta
from edit_cli.editors.base import Editor, require_layers
from edit_cli.errors import UsageError
from edit_cli.lm.model import LM
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
        with lm.monitor.phase("train"), tuning(lm, self._names(lm)) as (start, tuned):
            losses = self._train(lm, rows, start, tuned)
            return WeightDelta({name: tuned[name].detach() - start[name] for name in tuned}, {"losses": losses})

    def _names(self, lm: LM) -> list[str]:
        layers = require_layers(self.layers, lm)
        if self.part == "mlp_out":
            return [f"{lm.layout.mlp_out(layer)}.weight" for layer in layers]
        if self.part == "block":
            return [f"{lm.layout.block(n)}.{name}" for n in layers for name, _ in lm.module(lm.layout.block(n)).named_parameters()]
        raise UsageError(f"method.part={self.part}: choose mlp_out or block")

    def _train(self, lm: LM, rows: Sequence[Row], start: dict[str, Tensor], tuned: dict[str, Tensor]) -> list[float]:
        optimizer = torch.optim.Adam(tuned.values(), lr=self.lr, weight_decay=self.weight_decay)
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
                    parameters = [lm.parameter(name) for name in tuned]
                    for master, gradient in zip(tuned.values(), torch.autograd.grad(loss, parameters), strict=True):
                        master.grad = gradient.to(master)
                    optimizer.step()
                    self._project(lm, start, tuned)
                losses.append(total / len(rows))
                advance(1)
                if losses[-1] < self.stop_loss:
                    break
        return losses

    @torch.no_grad()
    def _project(self, lm: LM, start: dict[str, Tensor], tuned: dict[str, Tensor]) -> None:
        for name, master in tuned.items():
            if self.norm_constraint is not None:
                bound = self.norm_constraint
                master.copy_(torch.maximum(torch.minimum(master, start[name] + bound), start[name] - bound))
            lm.parameter(name).data.copy_(master)

    def _loss(self, lm: LM, rows: Sequence[Row]) -> Tensor:
        """Mean over rows of the mean negative log-likelihood of their target tokens."""
        last = self.objective == "prompt_last"
        ids, mask = pad_right([row.ids[: row.start] if last else row.ids[:-1] for row in rows], lm.head.pad, lm.device)
        where = [(r, row.start - 1 + (0 if last else j)) for r, row in enumerate(rows) for j in range(len(row.target))]
        at = torch.tensor(where, device=lm.device)
        labels = torch.tensor([i for row in rows for i in row.target], device=lm.device)
        share = torch.tensor([1.0 / len(row.target) / len(rows) for row in rows for _ in row.target], device=lm.device)
        logits = lm.head.logits_at(ids, mask, at[:, 0], at[:, 1])
        return (nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="none") * share).sum()


@contextmanager
def tuning(lm: LM, names: Sequence[str]) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """(start, tuned): float32 copies of the parameters, the second to be trained. Every bit is restored on leaving."""
    originals = {name: lm.parameter(name).detach().clone() for name in names}
    exact = {name: lm.masters.get(name, w.to(torch.promote_types(w.dtype, torch.float32))) for name, w in originals.items()}
    tuned = {name: w.clone().requires_grad_() for name, w in exact.items()}
    for name in names:
        lm.parameter(name).requires_grad_(True)
    try:
        yield exact, tuned
    finally:
        for name, original in originals.items():
            lm.parameter(name).requires_grad_(False)
            lm.parameter(name).data.copy_(original)
