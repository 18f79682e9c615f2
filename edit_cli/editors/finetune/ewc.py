"""Fine-tuning with elastic weight consolidation (Kirkpatrick et al., 2017) towards the most recent edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edit_cli.editors.finetune.base import Tuned, moved, parameters_of, step, tuning
from edit_cli.editors.old import Editor, require_layers
from edit_cli.editors.passes import row_losses, rows_right
from edit_cli.edits.edit import Edit, WeightDelta
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest


@dataclass(frozen=True)
class Anchor:
    """The tuned weights right after an edit, and the squared gradients of its loss there, by parameter."""

    weights: dict[str, Tensor]
    fisher: dict[str, Tensor]


@dataclass(kw_only=True)
class EWC(Editor):
    """loss + strength · Σ_i F_i (θ_i − θ*_i)², Adam, until every target token is the likeliest.

    F: mean of the squared gradients of the `remembered` most recent edits; θ*: mean of the weights right after each of
    them.
    """

    heads = ("causal", "seq2seq", "classifier")

    layers: list[int]
    part: str = "mlp_out"
    lr: float = 1.0e-2
    steps: int = 100
    strength: float = 0.1
    remembered: int = 10
    _anchors: list[Anchor] = field(default_factory=list, init=False, repr=False)

    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> WeightDelta:
        """Dense updates of the tuned parameters."""
        facts = [(request.text, request.target_new) for request in requests]
        rows = lm.head.encode(facts)
        with lm.monitor.phase("train"), tuning(lm, self._names(lm)) as weights:
            optimizer = torch.optim.Adam([weight.tuned for weight in weights], lr=self.lr)
            for _ in lm.monitor.counted("fine-tuning", self.steps):
                found = lm.head.answers(rows, end=True)
                if bool(rows_right(found, len(rows)).all()):
                    break
                step(optimizer, weights, row_losses(found, len(rows)).mean() + self.strength * self._distance(weights))
            delta = moved(weights, {"facts": [list(fact) for fact in facts]})
        self._remember(lm, delta)
        return delta

    def _distance(self, weights: Sequence[Tuned]) -> Tensor:
        """Σ F (θ − θ*)², differentiable by what the model computes with."""
        total = weights[0].present.new_zeros(())
        for weight in weights if self._anchors else ():
            fisher = torch.stack([anchor.fisher[weight.name] for anchor in self._anchors]).mean(0)
            goal = torch.stack([anchor.weights[weight.name] for anchor in self._anchors]).mean(0)
            present = weight.present if weight.present.shape == goal.shape else weight.tuned
            total = total + (fisher * (present - goal).square()).sum().to(total)
        return total

    def _remember(self, lm: LM, edit: WeightDelta) -> None:
        facts = [(prompt, target) for prompt, target in edit.info["facts"]]
        with lm.edited(edit), tuning(lm, self._names(lm)) as weights:
            loss = row_losses(lm.head.answers(lm.head.encode(facts), end=True), len(facts)).mean()
            gradients = torch.autograd.grad(loss, [weight.present for weight in weights])
            fisher = {
                weight.name: gradient.to(weight.start).square()
                for weight, gradient in zip(weights, gradients, strict=True)
            }
            self._anchors.append(Anchor({weight.name: weight.start for weight in weights}, fisher))
        del self._anchors[: -self.remembered]

    def _names(self, lm: LM) -> list[str]:
        return parameters_of(lm, require_layers(self.layers, lm), self.part)

    @property
    def looks_back(self) -> int:
        """As many as there are anchors."""
        return self.remembered

    def recall(self, lm: LM, edit: Edit) -> None:
        """The weights and gradients right after `edit`, which is about to be attached."""
        if isinstance(edit, WeightDelta) and "facts" in edit.info:
            self._remember(lm, edit)

    def reset(self) -> None:
        self._anchors = []
