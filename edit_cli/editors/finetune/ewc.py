"""Fine-tuning with elastic weight consolidation (Kirkpatrick et al., 2017) towards the most recent edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edit_cli.config.schema import Count, NonNegative
from edit_cli.editors.base import Context
from edit_cli.editors.finetune.base import FinetuneConfig, FinetuneEditor, Tuned, all_right, moved, tuning
from edit_cli.editors.passes import row_losses
from edit_cli.edits.edit import Edit, WeightDelta
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest


@dataclass(frozen=True, kw_only=True)
class EWCConfig(FinetuneConfig):
    """Settings of elastic weight consolidation."""

    strength: NonNegative = 0.1
    """How strongly weights are pulled to where recent edits left them."""
    remembered: Count = 10
    """How many recent edits that are."""


@dataclass(frozen=True)
class Anchor:
    """The tuned weights right after an edit, and the squared gradients of its loss there, by parameter."""

    weights: dict[str, Tensor]
    fisher: dict[str, Tensor]


class EWC(FinetuneEditor[EWCConfig]):
    """loss + strength · Σ_i F_i (θ_i − θ*_i)², Adam, until every target token is the likeliest.

    F: mean of the squared gradients of the `remembered` most recent edits; θ*: mean of the weights right after each of
    them.
    """

    Config = EWCConfig

    def __init__(self, config: EWCConfig, lm: LM, context: Context | None = None) -> None:
        super().__init__(config, lm, context)
        self.anchors: list[Anchor] = []  # of the most recent edits, the latest last

    def edit(self, requests: Sequence[EditRequest]) -> WeightDelta:
        """Dense updates of the tuned parameters."""
        facts = [(request.text, request.target_new) for request in requests]
        with self.lm.monitor.phase("train"), tuning(self.lm, self.names) as weights:
            self.fit(weights, [self.lm.head.encode(facts)], all_right)
            delta = moved(weights, {"facts": [list(fact) for fact in facts]})
        self.remember(delta)
        return delta

    def penalty(self, weights: Sequence[Tuned]) -> Tensor:
        """strength · Σ F (θ − θ*)², differentiable by what the model computes with."""
        total = weights[0].present.new_zeros(())
        for weight in weights if self.anchors else ():
            fisher = torch.stack([anchor.fisher[weight.name] for anchor in self.anchors]).mean(0)
            goal = torch.stack([anchor.weights[weight.name] for anchor in self.anchors]).mean(0)
            present = weight.present if weight.present.shape == goal.shape else weight.tuned
            total = total + (fisher * (present - goal).square()).sum().to(total)
        return self.config.strength * total

    @property
    def looks_back(self) -> int:  # type: ignore[override]  # of the class where it does not depend on settings
        """As many as there are anchors."""
        return self.config.remembered

    def recall(self, edit: Edit) -> None:
        """The weights and gradients right after `edit`, which is not attached."""
        if not isinstance(edit, WeightDelta) or "facts" not in edit.info:
            return
        facts = [(prompt, target) for prompt, target in edit.info["facts"]]
        with self.lm.edited(edit), tuning(self.lm, self.names) as weights:
            loss = row_losses(self.answers(self.lm.head.encode(facts)), len(facts)).mean()
            gradients = torch.autograd.grad(loss, [weight.present for weight in weights])
            fisher = {
                weight.name: gradient.to(weight.start).square()
                for weight, gradient in zip(weights, gradients, strict=True)
            }
            self.anchors.append(Anchor({weight.name: weight.start for weight in weights}, fisher))
        del self.anchors[: -self.config.remembered]
