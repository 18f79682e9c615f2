"""KE: a network reads the edit as text and says how much of each gradient to take, and what to add to it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

from edit_cli.editors.meta.base import TrainableEditor
from edit_cli.editors.meta.episodes import DrawOptions, Lesson, Trial, draw, judged
from edit_cli.editors.meta.factored_gradients import Gradient, Shift, gradients, largest, refuse_infinite
from edit_cli.editors.meta.hypernetwork import edited_modules, shapes_of
from edit_cli.editors.passes import row_losses, rows_right
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.errors import UsageError
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import Row, pad_right
from edit_cli.requests import Case, EditRequest
from edit_cli.writing import bare

ANSWER_TOKENS = 8  # of the model's own answer, where a request does not tell the old one


@dataclass
class BoundOptions:
    """On the KL of answers that must stay: keys of `method.bound`.

    active: false for a weighted sum of both losses instead.

    start: the bound m at first; after a validation with more than `above` percent of edits right it is multiplied by
    `shrink`, down to `least`. lr: of its multiplier λ, which climbs and never falls below 0.
    """

    active: bool = True
    start: float = 1.0e-3
    shrink: float = 0.8
    above: float = 90.0
    least: float = 1.0e-5
    lr: float = 0.1


@dataclass(kw_only=True)
class KE(TrainableEditor):
    """Editing Factual Knowledge in Language Models (De Cao et al., 2021): ΔW = s σ(η) (∇W ⊙ A + B), with A and B of
    rank one (section 4).

    layers: none for the last `last` of every stack; part: both matrices of their MLPs, the "out" one, or every matrix
    of the "block" (as published, of all blocks). second_in: of gated MLPs, edit the second input matrix too.
    condition: the text that the network reads, of the {old} answer, the {new} one and the {prompt}.
    hidden, width, inner: of the LSTM in one direction, of what it makes of the text, and of each matrix's own layer.
    scale: s, the most that a gradient is multiplied by.
    step_size: above 0, the untrained network gives −step_size ∇W; 0: it begins at random, as published.
    learn_words: train the network's copy of the model's embeddings, too.
    rounds: edit again what is not right yet, so many times in all (the paper's "loop": 5).
    others: facts in a training batch beside each that is edited, whose prompts must keep their answers, too (as
    published: the rest of a batch of 256).
    wordings: learn from a rephrased prompt, too (the paper's P_x). smoothing: of the labels in the training loss.
    bound: the paper's constraint. edit_weight, locality_weight: of NLL + KL where it is not active, and at validation.
    """

    heads = ("causal", "seq2seq", "classifier")
    remembers = True
    NO_RECIPE = (*TrainableEditor.NO_RECIPE, "rounds")
    LATER: ClassVar[dict[str, Any]] = {**TrainableEditor.LATER, "others": 0}

    layers: list[int] = field(default_factory=list)
    last: int = 3
    part: str = "both"
    second_in: bool = True
    condition: str = "{old} >> {new} || {prompt}"
    hidden: int = 128
    width: int = 1024
    inner: int = 128
    scale: float = 1.0
    step_size: float = 0.0
    learn_words: bool = True
    rounds: int = 1
    others: int = 0
    wordings: bool = False
    smoothing: float = 0.1
    edit_weight: float = 1.0
    locality_weight: float = 1.0
    bound: BoundOptions = field(default_factory=BoundOptions)
    draw: DrawOptions = field(default_factory=DrawOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale <= 0 or self.rounds < 1:
            raise UsageError(f"method.scale={self.scale} and method.rounds={self.rounds} must be above 0")
        if self.others < 0:
            raise UsageError(f"method.others={self.others}: give a number of facts, or 0 for none")
        if lacking := [name for name in ("old", "new", "prompt") if f"{{{name}}}" not in self.condition]:
            raise UsageError(f"method.condition={self.condition}: it must hold {{{lacking[0]}}}")

    @property
    def cases_per_edit(self) -> int:
        return 1 + self.others

    @property
    def cases_per_trial(self) -> int:
        return 1

    def build(self, lm: LM) -> KeNet:
        modules, _ = self._modules(lm)
        words = lm.model.get_input_embeddings().weight
        net = KeNet(words, modules, shapes_of(lm, modules), self.hidden, self.width, self.inner, self.scale)
        net.bound.fill_(self.bound.start)
        net.words.requires_grad_(self.learn_words)
        if self.step_size > 0:
            net.begin_as_descent(self.step_size)
        net.multiplier.requires_grad_(self.bound.active)
        return net

    def groups(self, net: KeNet) -> list[dict[str, Any]]:
        others = [parameter for parameter in net.parameters() if parameter is not net.multiplier]
        return [{"params": others}, {"params": [net.multiplier], "lr": self.bound.lr}]

    def loss(self, net: KeNet, lm: LM, batch: Sequence[Case]) -> tuple[Tensor, dict[str, float]]:
        """The Lagrangian NLL + λ (KL − m) of equation 4, which falls by the network and climbs by λ; the mean over
        independent edits.
        """
        modules, lowest = self._modules(lm)
        edited, lessons = self._lessons(batch, self.cases_per_edit if net.training else self.cases_per_trial)
        memory = self.memory(lm)
        rows = memory.rows(lm, [pair for lesson in lessons for pair in lesson.inner])
        found = memory.gradients(lm, rows, modules) if memory.works(lm) else gradients(lm, rows, modules)
        shifts = net(
            found, *self.read(lm, [case.requests[0] for case in edited], self.scratch(lm).setdefault("old", {}))
        )
        trial = Trial(lm, lessons, lowest, memory)
        answers = trial.answers(shifts)
        nll, kl, told = judged(answers, trial.base, trial.outer)
        if not net.training:
            told["shift"] = largest(lm, shifts)
        if not net.training or not self.bound.active:
            return self.edit_weight * nll + self.locality_weight * kl, told
        smooth = row_losses(answers, len(trial.outer), self.smoothing)[trial.outer.to(answers.rows.device)].mean()
        told |= {"bound": float(net.bound), "multiplier": float(net.multiplier.detach())}
        return smooth + climbing(net.multiplier).squeeze() * (kl - net.bound), told

    def after_step(self, net: KeNet) -> None:
        with torch.no_grad():
            net.multiplier.clamp_(min=0)

    def after_validation(self, net: KeNet, found: dict[str, Any]) -> None:
        if found["es"] > self.bound.above:
            net.bound.mul_(self.bound.shrink).clamp_(min=self.bound.least)

    @torch.no_grad()
    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> WeightDelta:
        """Of every request its own change, added up; as factors of one column more than a request has tokens."""
        net = self.trained(lm)
        modules, _ = self._modules(lm)
        rows = lm.head.encode([(request.text, request.target_new) for request in requests])
        texts, mask = self.read(lm, requests, {})
        wrong, steps = torch.arange(len(rows), device=texts.device), []
        shift = 0.0
        with ExitStack() as stack:
            for left in reversed(range(self.rounds)):
                shifts = net(gradients(lm, [rows[i] for i in wrong.tolist()], modules), texts[wrong], mask[wrong])
                refuse_infinite(shifts.values())
                steps.append({name: shifts[name].factors() for name in modules})
                shift = max(shift, largest(lm, shifts))
                if left:
                    stack.enter_context(
                        lm.edited(WeightDelta({f"{name}.weight": factors for name, factors in steps[-1].items()}))
                    )
                    wrong = self._wrong(lm, rows).to(texts.device)
                    if not len(wrong):
                        break
        return WeightDelta(
            {f"{name}.weight": _joined([step[name] for step in steps]) for name in modules}, {"shift": shift}
        ).compact(lm)

    def read(self, lm: LM, requests: Sequence[EditRequest], known: dict[str, str]) -> tuple[Tensor, Tensor]:
        """(ids, mask) of the conditions, both (requests, tokens).

        known: the model's own answers so far, where requests name no old one.
        """
        asked = list(dict.fromkeys(r.text for r in requests if r.target_true is None and r.text not in known))
        known.update(zip(asked, lm.generate(asked, ANSWER_TOKENS) if asked else [], strict=True))
        old = [known[r.text].strip() if r.target_true is None else bare(r.target_true) for r in requests]
        texts = [
            self.condition.format(old=answer, new=bare(r.target_new), prompt=r.text)
            for answer, r in zip(old, requests, strict=True)
        ]
        return pad_right(lm.tokenizer(texts)["input_ids"], lm.head.pad, lm.device)

    def _modules(self, lm: LM) -> tuple[list[str], int]:
        return edited_modules(lm, self.layers, self.last, self.part, self.second_in)

    def _lessons(self, batch: Sequence[Case], size: int) -> tuple[list[Case], list[Lesson]]:
        """Of every `size` cases the first is edited, and must work on its own prompt; those of the others must stay."""
        edited = list(batch[::size])
        lessons = []
        for number, drawn in enumerate(draw(edited, 1, self.draw)):
            others = [case.requests[0] for case in batch[number * size + 1 : (number + 1) * size]]
            kept = tuple((request.text, request.target_true or request.target_new) for request in others)
            lessons.append(
                Lesson(drawn.inner, drawn.inner + (drawn.outer if self.wordings else ()), drawn.local + kept)
            )
        return edited, lessons

    @staticmethod
    def _wrong(lm: LM, rows: Sequence[Row]) -> Tensor:
        """Numbers of the rows that the model does not answer rightly yet."""
        return (~rows_right(lm.head.answers(rows, end=True), len(rows))).nonzero()[:, 0]


class KeNet(nn.Module):
    """An LSTM that reads conditions, and two layers for every edited matrix (section 4.2).

    words: the model's embeddings, where its own begin. shapes: (d_in, d_out) of each module.
    """

    def __init__(
        self,
        words: Tensor,
        modules: Sequence[str],
        shapes: Sequence[tuple[int, int]],
        hidden: int,
        width: int,
        inner: int,
        scale: float,
    ) -> None:
        super().__init__()
        self.modules_edited, self.shapes, self.scale = list(modules), list(shapes), scale
        self.words = nn.Embedding.from_pretrained(words.detach().float().clone(), freeze=False)
        self.lstm = nn.LSTM(words.shape[1], hidden, batch_first=True, bidirectional=True)
        self.text = nn.Linear(2 * hidden, width)
        self.own = nn.ModuleList(
            nn.Sequential(
                weight_norm(nn.Linear(width, inner)), nn.Tanh(), weight_norm(nn.Linear(inner, 2 * (d_in + d_out) + 1))
            )
            for d_in, d_out in shapes
        )
        self.multiplier = nn.Parameter(torch.ones(1))  # FSDP takes no parameter without dimensions
        self.register_buffer("bound", torch.zeros(()))

    @torch.no_grad()
    def begin_as_descent(self, size: float) -> None:
        """Let ΔW be −size ∇W, whatever the text: B is 0, softmax(α) is 1 / d_out, the gate a half."""
        for (d_in, d_out), own in zip(self.shapes, self.own, strict=True):
            last = own[-1]
            last.parametrizations.weight.original0.zero_()
            last.bias.zero_()
            last.bias[:d_in] = -2 * d_out * size / self.scale

    def forward(self, gradient: dict[str, Gradient], ids: Tensor, mask: Tensor) -> dict[str, Shift]:
        """s σ(η) (∇W ⊙ A + B) of each module and edit; a row of gradients and a condition (edits, tokens) each."""
        text = self.conditions(ids, mask)
        parts = zip(self.modules_edited, self.shapes, self.own, strict=True)
        return {name: self._shift(own, shape, gradient[name], text) for name, shape, own in parts}

    def conditions(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(edits, width): what the LSTM makes of texts, of its last states in both directions."""
        packed = pack_padded_sequence(self.words(ids), mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        return torch.tanh(self.text(torch.cat([last[0], last[1]], -1)))

    def _shift(self, own: nn.Module, shape: tuple[int, int], gradient: Gradient, text: Tensor) -> Shift:
        """A = softmax(α) γᵀ over a gradient of factors δ, u is the same with factors softmax(α) ⊙ δ, γ ⊙ u: nothing
        is made dense.
        """
        d_in, d_out = shape
        mask_in, mask_out, added_in, added_out, gate = own(text).split([d_in, d_out, d_in, d_out, 1], -1)
        delta = gradient.outputs.to(text)
        step = self.scale * gate.sigmoid()[:, None]
        left = torch.cat([mask_out.softmax(-1)[:, None] * delta, added_out.softmax(-1)[:, None]], 1)
        right = torch.cat([mask_in[:, None] * gradient.inputs.to(text), added_in[:, None]], 1)
        return Shift(step * left, right)


def climbing(multiplier: Tensor) -> Tensor:
    """The same value, whose gradient points the other way: what is minimised climbs by it."""
    return 2 * multiplier.detach() - multiplier


def _joined(parts: Sequence[Factors]) -> Factors:
    return Factors(torch.cat([part.left for part in parts], 1), torch.cat([part.right for part in parts]))
