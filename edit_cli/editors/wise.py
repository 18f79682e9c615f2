"""WISE (Wang et al., 2024): edits go to a side memory of one feed-forward value matrix; a prompt is answered by it if it is one of its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu

from edit_cli.corpora import Corpus
from edit_cli.editors.base import Editor
from edit_cli.editors.contexts import ContextOptions
from edit_cli.editors.memory import MemoryLayer, MemoryPatch, module_of
from edit_cli.editors.passes import passes, row_losses
from edit_cli.editors.queries import inputs_of_rows
from edit_cli.errors import UsageError
from edit_cli.lm.focus import Focus
from edit_cli.lm.layout import widths
from edit_cli.lm.model import LM
from edit_cli.lm.places import Undo
from edit_cli.requests import EditRequest

DOCUMENTS = 2000  # of the corpus, from which irrelevant sentences are drawn


@dataclass(frozen=True)
class Side:
    """One side memory: shift (d_out, d_in) of the value matrix, and ε, the least score of the facts that it holds."""

    shift: Tensor
    epsilon: float


class WiseLayer(MemoryLayer):
    """The value matrix W_v and side memories W_v + Δ. Each row is answered by the memory it stirs most, if it does so enough.

    finished: memories that are not written to any more. shift: Δ of the one at work, None before its first fact.
    """

    def __init__(self, original: nn.Module, lm: LM, module: str, about: dict[str, Any]) -> None:
        super().__init__(original, lm, module)
        self.about, self.shape, self.device = about, widths(original), lm.device
        self.edits, self.shards, self.least = 0, 0, float("inf")
        self.finished: list[Side] = []
        self.merged = False  # whether the first of the finished is itself a merged one
        self.shift: Tensor | None = None
        self._mask: tuple[int, Tensor] | None = None

    def mask(self, shard: int) -> Tensor:
        """(d_out, d_in) bool: the random subspace that a shard writes to."""
        if self._mask is None or self._mask[0] != shard:
            draw = torch.Generator().manual_seed(self.about["seed"] * 1_000_003 + shard)
            self._mask = shard, (torch.rand(self.shape, generator=draw) < self.about["mask_ratio"]).to(self.device)
        return self._mask[1]

    @property
    def room(self) -> int:
        """Facts that the memory at work still takes before it is finished."""
        return self.about["shard_every"] - self.edits % self.about["shard_every"]

    def add(self, edit: MemoryPatch) -> Undo:
        undo: list[Undo] = []
        for unit in edit.content["units"]:
            undo.append(self._take(unit, edit.tensors.get(f"values.{unit['shard']}")))

        def take_back() -> None:
            for step in reversed(undo):
                step()

        return take_back

    def _take(self, unit: dict[str, Any], values: Tensor) -> Undo:
        """Facts of one shard: its values, in the order of its mask; then it may be finished, and the finished ones merged."""
        before = (self.edits, self.shards, self.least, self.finished, self.merged, self.shift)
        shift, mask = self.shift, self.mask(unit["shard"])
        earlier = None if shift is None else shift[mask]
        if shift is None:
            self.shift = torch.zeros(self.shape, device=self.device)
        self.shift[mask] = values.to(self.shift)
        self.edits += unit["facts"]
        self.least = min(self.least, unit["score"])
        if self.edits % self.about["shard_every"] == 0:
            self.finished = [*self.finished, Side(self.shift, self.least)]
            self.shift, self.least, self.shards = None, float("inf"), self.shards + 1
            if self.about["merge_every"] and self.edits % self.about["merge_every"] == 0:
                self.finished, self.merged = [self._merge()], True

        def undo() -> None:
            self.edits, self.shards, self.least, self.finished, self.merged, self.shift = before
            if shift is not None:
                shift[self.mask(unit["shard"])] = earlier

        return undo

    def _merge(self) -> Side:
        """All finished memories in one; what was merged before counts 0.6."""
        new = len(self.finished) - self.merged
        weights = ([0.6] if self.merged else []) + [(0.4 if self.merged else 1.0) / new] * new
        shift = ties([side.shift for side in self.finished], weights, self.about["density"])
        return Side(shift, min(side.epsilon for side in self.finished))

    @property
    def memories(self) -> list[Side]:
        return self.finished + ([Side(self.shift, self.least)] if self.shift is not None else [])

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = self.original(states, *args, **kwargs)
        inside = self.rows(states)
        if inside is None:
            return output
        memories = self.memories
        chosen = self.decided(self.watch.focus, lambda: route(inside, self.watch.focus, memories, self.about["act_ratio"]))
        answered = output.view(*inside.shape[:2], -1)
        for number in chosen[chosen >= 0].unique().tolist():
            mine = (chosen == number).to(states.device)
            answered = answered.clone()
            answered[mine] += linear(inside[mine].float(), memories[number].shift.to(states.device)).to(output)
        return answered.view_as(output)


def stir(inputs: Tensor, shift: Tensor) -> Tensor:
    """Δ_act (…): how far a memory's output is from the original's, ‖A W_v' − A W_v‖₂, of inputs (…, d_in)."""
    return linear(inputs.float(), shift.to(inputs.device)).norm(dim=-1)


def mean_over(scores: Tensor, tokens: Tensor) -> Tensor:
    """(rows,): mean of scores (rows, tokens) over the tokens that count."""
    return (scores * tokens).sum(1) / tokens.sum(1).clamp_min(1)


def route(inputs: Tensor, focus: Focus, memories: Sequence[Side], act_ratio: float) -> Tensor:
    """(rows,) number of the memory that answers, −1 for the model itself. The score is the mean over the prompt's tokens."""
    prompt = focus.prompt.to(inputs.device)
    scores = torch.stack([mean_over(stir(inputs, side.shift), prompt) for side in memories])
    highest, number = scores.max(0)
    least = torch.tensor([side.epsilon for side in memories], device=inputs.device)[number]
    return torch.where(highest > act_ratio * least, number, -1)


def ties(shifts: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """TIES merging (Yadav et al., 2023): keep each one's largest entries, elect a sign, average what agrees with it."""
    trimmed = []
    for shift in shifts:
        kept = max(int(density * shift.numel()), 1)
        least = shift.abs().flatten().kthvalue(shift.numel() - kept + 1).values
        trimmed.append(torch.where(shift.abs() >= least, shift, 0))
    total, share = torch.zeros_like(shifts[0]), torch.zeros_like(shifts[0])
    sign = sum(weight * shift for weight, shift in zip(weights, trimmed, strict=True)).sign()
    for weight, shift in zip(weights, trimmed, strict=True):
        agrees = (shift.sign() == sign) & (shift != 0)
        total += torch.where(agrees, weight * shift, 0)
        share += weight * agrees
    return total / share.clamp_min(1e-12)


class WisePatch(MemoryPatch):
    """What the shards hold after some facts: their values under the mask, which is drawn again from its seed."""

    layer: ClassVar[type[MemoryLayer]] = WiseLayer

    def begin(self, original: nn.Module, lm: LM) -> WiseLayer:
        return WiseLayer(original, lm, self.module, self.content["about"])


@dataclass(kw_only=True)
class Wise(Editor):
    """Side memory with activation routing, and sharded subspaces that are merged.

    layer, module: the value matrix. alpha, beta, gamma: margins of the routing loss
    max(0, Δ(x_i) − α) + max(0, β − Δ(x_e)) + max(0, γ − (Δ(x_e) − Δ(x_i))), x_i being irrelevant sentences of `corpus`.
    act_ratio: share of ε above which a memory answers. mask_ratio: ρ. shard_every: facts a shard holds. merge_every: facts after which all
    shards are merged; null keeps them apart and asks the one that is stirred most (WISE-Retrieve). density: kept by TIES.
    lr, steps, weight_decay: SGD under the mask, every entry within `bound` of the original. It stops once the loss is below `stop_loss`
    and has moved by `stop_change` at most.
    """

    layer: int
    module: str = "mlp_out"
    alpha: float = 5.0
    beta: float = 20.0
    gamma: float = 10.0
    act_ratio: float = 0.88
    mask_ratio: float = 0.2
    shard_every: int = 500
    merge_every: int | None = 1000
    density: float = 0.53
    lr: float = 1.0
    steps: int = 70
    weight_decay: float = 1.0e-5
    bound: float = 1.0
    stop_loss: float = 0.02
    stop_change: float = 1.0e-4
    irrelevant: int = 1
    corpus: Corpus | None = None
    context: ContextOptions = field(default_factory=lambda: ContextOptions(per_start=2))
    batch_size: int = 1
    seed: int = 0

    @property
    def layers(self) -> list[int]:
        return [self.layer]

    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> WisePatch:
        """The side memory trained on, `batch_size` facts at a time."""
        self._refuse_wrong_numbers()
        name = module_of(lm, self.layer, self.module)
        self._prefixes(lm)  # takes everything off and puts it on again: the layers that stand there now are others after it
        patches: list[WisePatch] = []
        left = list(requests)
        with ExitStack() as stack, lm.monitor.phase("train"), lm.monitor.task("side memory", len(left)) as advance:
            while left:
                layer = WisePatch.present(lm, name)
                size = min(self.batch_size, layer.room if layer else self.shard_every)
                patches.append(self._unit(lm, name, layer, left[:size]))
                stack.enter_context(lm.edited(patches[-1]))
                advance(len(left[:size]))
                del left[:size]
        return joined(patches)

    def _unit(self, lm: LM, name: str, layer: WiseLayer | None, requests: Sequence[EditRequest]) -> WisePatch:
        """Facts that are trained together."""
        fresh = layer or WiseLayer(lm.module(name), lm, name, self._about())
        if layer is None:
            fresh.close()
        shard, mask = fresh.shards, fresh.mask(fresh.shards)
        start = torch.zeros(fresh.shape, device=lm.device) if fresh.shift is None else fresh.shift.clone()
        shift, score = self._train(lm, name, requests, start, mask, fresh.edits)
        content = {"about": fresh.about, "units": [{"shard": shard, "facts": len(requests), "score": score}]}
        return WisePatch(name, layer.digest if layer else "", {f"values.{shard}": shift[mask]}, content)

    def _train(
        self, lm: LM, name: str, requests: Sequence[EditRequest], shift: Tensor, mask: Tensor, number: int
    ) -> tuple[Tensor, float]:
        """Δ after the facts, and the least score of their bare prompts."""
        prefixes = self._prefixes(lm)
        rows = lm.head.encode([(prefix + r.text, r.target_new) for r in requests for prefix in prefixes])
        elsewhere = self._irrelevant(lm, name, requests, number)
        original, last = lm.weight(name).float().to(lm.device), float("inf")
        with passes(lm, rows, name, self.layer) as run:
            inputs, prompt = run.inputs.float(), run.focus.prompt
            present = WisePatch.present(lm, name)
            plain = None if present is None else present.original(inputs.to(lm.dtype)).detach()  # whatever earlier memories say
            for _ in range(self.steps):
                shift.requires_grad_()
                moved = linear(inputs, shift)
                losses = row_losses(run.answers(lambda output: (output if plain is None else plain) + moved.to(output)), len(rows))
                far = mean_over(moved.norm(dim=-1), prompt)
                near = torch.stack([stir(x, shift).mean() for x in elsewhere])
                routing = relu(near - self.alpha).mean() + relu(self.beta - far).mean() + relu(self.gamma - (far[:, None] - near)).mean()
                loss = losses.mean() + routing.to(losses)
                if loss.item() <= self.stop_loss and abs(last - loss.item()) <= self.stop_change:
                    break
                last = loss.item()
                (gradient,) = torch.autograd.grad(loss, [shift])
                with torch.no_grad():
                    step = self.lr * (gradient + self.weight_decay * (original + shift)) * mask
                    shift = (shift - step).clamp(-self.bound, self.bound)
        shift = shift.detach()
        return shift, float(mean_over(stir(inputs, shift), prompt)[:: len(prefixes)].min())

    def _irrelevant(self, lm: LM, name: str, requests: Sequence[EditRequest], number: int) -> list[Tensor]:
        """Inputs (tokens, d_in) on sentences of the corpus that name none of the subjects."""
        kept = self.scratch(lm)
        if "sentences" not in kept:
            if self.corpus is None:
                raise UsageError("method.corpus has no value: WISE needs text that its memory must not answer (corpus=NAME)")
            documents = islice(self.corpus.documents(self.seed), DOCUMENTS)
            kept["sentences"] = [part.strip() for text in documents for part in text.split(". ") if len(part.split()) > 3]
        draw = random.Random(f"{self.seed} {number}")
        subjects = [request.subject or request.text for request in requests]
        usable = [text for text in draw.sample(kept["sentences"], min(len(kept["sentences"]), 20 * self.irrelevant * len(requests)))]
        usable = [text for text in usable if not any(subject in text for subject in subjects)][: self.irrelevant * len(requests)]
        if not usable:
            raise UsageError("method.corpus has no sentence that names none of the subjects: give more text (corpus=NAME)")
        return inputs_of_rows(lm, name, [row.ids for row in lm.head.encode([(text, None) for text in usable])])

    def _prefixes(self, lm: LM) -> list[str]:
        kept = self.scratch(lm)
        if "prefixes" not in kept:
            kept["prefixes"] = self.context.build(lm).texts
        return kept["prefixes"]

    def _about(self) -> dict[str, Any]:
        names = ("act_ratio", "mask_ratio", "shard_every", "merge_every", "density", "seed")
        return {name: getattr(self, name) for name in names}

    def _refuse_wrong_numbers(self) -> None:
        if not 0 < self.mask_ratio <= 1 or not 0 < self.density <= 1:
            raise UsageError(f"method.mask_ratio={self.mask_ratio}, method.density={self.density}: give shares above 0, at most 1")
        if self.shard_every < 1 or (self.merge_every and self.merge_every % self.shard_every):
            raise UsageError(f"method.merge_every={self.merge_every}: give a multiple of method.shard_every={self.shard_every}, or null")


def joined(patches: Sequence[WisePatch]) -> WisePatch:
    """One patch for facts that were trained one after another; of each shard only the last values count."""
    tensors = {key: value for patch in patches for key, value in patch.tensors.items()}
    units: list[dict[str, Any]] = []
    for unit in (unit for patch in patches for unit in patch.content["units"]):
        if units and units[-1]["shard"] == unit["shard"]:
            earlier = units.pop()
            unit = {**unit, "facts": earlier["facts"] + unit["facts"], "score": min(earlier["score"], unit["score"])}
        units.append(unit)
    return WisePatch(patches[0].module, patches[0].before, tensors, {**patches[0].content, "units": units})
