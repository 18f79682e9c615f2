"""WISE's side memory: a copy of one value matrix, in shards that are merged; a prompt is answered by it if its
activation score is high enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NotRequired, Self, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from edit_cli.editors.memory.base import MemoryLayer, MemoryPatch
from edit_cli.files.shapes import Count, Rule, at_least
from edit_cli.files.tensors import Size, size
from edit_cli.lm.layout import widths
from edit_cli.lm.model import LM
from edit_cli.lm.prompt_position import PromptPosition
from edit_cli.lm.weights.access import Undo

Score = Literal["mean", "last"]  # tokens of a prompt that its score is taken over


@dataclass(frozen=True)
class SideMemory:
    """One side memory: shift (d_out, d_in) of the value matrix, and ε, the least score of the facts that it holds."""

    shift: Tensor
    epsilon: float


class WiseLayer(MemoryLayer):
    """The value matrix W_v and side memories W_v + Δ.

    Each row is answered by the memory that it activates most, if it does so enough.

    finished: memories that are not written to any more. shift: Δ of the one at work, None before its first fact.
    """

    def __init__(self, original: nn.Module, lm: LM, module: str, about: dict[str, Any]) -> None:
        super().__init__(original, lm, module)
        self.about, self.shape, self.device = about, widths(original), lm.device
        self.edits, self.shards, self.least = 0, 0, float("inf")
        self.finished: list[SideMemory] = []
        self.merged = False  # whether the first of the finished is itself a merged one
        self.shift: Tensor | None = None
        self._mask: tuple[int, Tensor] | None = None

    def mask(self, shard: int) -> Tensor:
        """(d_out, d_in) bool: the random subspace that a shard writes to."""
        if self._mask is None or self._mask[0] != shard:
            drawn = mask_of(self.about["seed"], shard, self.shape, self.about["mask_ratio"])
            self._mask = shard, drawn.to(self.device)
        return self._mask[1]

    @property
    def room(self) -> int:
        """Facts that the memory at work still takes before it is finished."""
        return self.about["shard_every"] - self.edits % self.about["shard_every"]

    @property
    def bytes(self) -> int:
        return 4 * math.prod(self.shape) * len(self.finished) + 4 * int(self.mask(self.shards).sum()) * (
            self.shift is not None
        )

    def whole(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"finished.{number}": side.shift for number, side in enumerate(self.finished)}
        if self.shift is not None:
            tensors["values"] = self.shift[self.mask(self.shards)]
        counts = {"edits": self.edits, "shards": self.shards, "merged": self.merged}
        least = self.least if self.shift is not None else None
        return tensors, {
            "about": self.about,
            "units": [],
            "whole": {**counts, "least": least, "epsilons": [s.epsilon for s in self.finished]},
        }

    def _become(self, whole: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """What `whole` says."""
        self.edits, self.shards, self.merged = (whole[name] for name in ("edits", "shards", "merged"))
        self.finished = [
            SideMemory(tensors[f"finished.{n}"].to(self.device), epsilon) for n, epsilon in enumerate(whole["epsilons"])
        ]
        if whole["least"] is not None:
            self.least, self.shift = whole["least"], torch.zeros(self.shape, device=self.device)
            self.shift[self.mask(self.shards)] = tensors["values"].to(self.shift)

    def add(self, edit: MemoryPatch) -> Undo:
        if "whole" in edit.content:  # the memory is empty, and goes with this edit
            self._become(edit.content["whole"], edit.tensors)
        undo = [self._take(unit, edit.tensors[f"values.{unit['shard']}"]) for unit in edit.content["units"]]

        def take_back() -> None:
            for step in reversed(undo):
                step()

        return take_back

    def _take(self, unit: dict[str, Any], values: Tensor) -> Undo:
        """Facts of one shard: its values, in the order of its mask; then it may be finished, and the finished ones
        merged.
        """
        before = (self.edits, self.shards, self.least, self.finished, self.merged, self.shift)
        fresh, mask = self.shift is None, self.mask(unit["shard"])
        self.shift = shift = torch.zeros(self.shape, device=self.device) if self.shift is None else self.shift
        earlier = shift[mask]
        shift[mask] = values.to(shift)
        self.edits += unit["facts"]
        self.least = min(self.least, unit["score"])
        if self.edits % self.about["shard_every"] == 0:
            self.finished = [*self.finished, SideMemory(shift, self.least)]
            self.shift, self.least, self.shards = None, float("inf"), self.shards + 1
            if self.about["merge_every"] and self.edits % self.about["merge_every"] == 0:
                self._merge()

        def undo() -> None:
            self.edits, self.shards, self.least, self.finished, self.merged, self.shift = before
            if not fresh:
                shift[self.mask(unit["shard"])] = earlier

        return undo

    def _merge(self) -> None:
        """The finished memories in one, what was merged before counting 0.6; or only the new ones, each group apart."""
        if self.about["retrieve"]:
            size = self.about["merge_every"] // self.about["shard_every"]
            apart, new, weights = self.finished[:-size], self.finished[-size:], [1.0 / size] * size
        else:
            count = len(self.finished) - self.merged
            apart, new = [], self.finished
            weights = ([0.6] if self.merged else []) + [(0.4 if self.merged else 1.0) / count] * count
            self.merged = True
        shift = ties([side.shift for side in new], weights, self.about["density"])
        self.finished = [*apart, SideMemory(shift, min(side.epsilon for side in new))]

    @property
    def memories(self) -> list[SideMemory]:
        return self.finished + ([SideMemory(self.shift, self.least)] if self.shift is not None else [])

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = self.original(states, *args, **kwargs)
        inside = self.rows(states)
        if inside is None:
            return output
        memories = self.memories
        chosen = self.decided(
            self.position,
            lambda: route(inside, self.position, memories, self.about["act_ratio"], self.about["score"]),
        )
        answered = output.view(*inside.shape[:2], -1)
        for number in chosen[chosen >= 0].unique().tolist():
            mine = (chosen == number).to(states.device)
            answered = answered.clone()
            answered[mine] += linear(inside[mine].float(), memories[number].shift.to(states.device)).to(output)
        return answered.view_as(output)


def activation_score(inputs: Tensor, shift: Tensor) -> Tensor:
    """Δ_act (…): how far a memory's output is from the original's, ‖A W_v' − A W_v‖₂, of inputs (…, d_in)."""
    return linear(inputs.float(), shift.to(inputs.device)).norm(dim=-1)


def pooled_score(scores: Tensor, tokens: Tensor, which: Score) -> Tensor:
    """(rows,): of scores (rows, tokens) the mean over the tokens that count, or that of the last one."""
    if which == "last":
        return (scores * (tokens.flip(1).cumsum(1).flip(1) == 1) * tokens).sum(1)
    return (scores * tokens).sum(1) / tokens.sum(1).clamp_min(1)


def route(
    inputs: Tensor, position: PromptPosition, memories: Sequence[SideMemory], act_ratio: float, which: Score = "mean"
) -> Tensor:
    """(rows,) number of the memory that answers, −1 for the model itself. The score is that of the prompt's tokens."""
    prompt = position.prompt.to(inputs.device)
    scores = torch.stack([pooled_score(activation_score(inputs, side.shift), prompt, which) for side in memories])
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
    elected = sum((weight * shift for weight, shift in zip(weights, trimmed, strict=True)), torch.zeros_like(total))
    sign = elected.sign()
    for weight, shift in zip(weights, trimmed, strict=True):
        agrees = (shift.sign() == sign) & (shift != 0)
        total += torch.where(agrees, weight * shift, 0)
        share += weight * agrees
    return total / share.clamp_min(1e-12)


def mask_of(seed: int, shard: int, shape: tuple[int, int], ratio: float) -> Tensor:
    """(d_out, d_in) bool: the random subspace that a shard writes to."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + shard)) < ratio


class WiseAbout(TypedDict):
    """Settings that the memory goes by."""

    score: Score
    act_ratio: float
    mask_ratio: Annotated[float, Rule(lambda share: 0 < share <= 1, "a share above 0, at most 1")]
    shard_every: Annotated[int, at_least(1)]
    merge_every: Annotated[int, at_least(1)] | None
    density: Annotated[float, Rule(lambda share: 0 < share <= 1, "a share above 0, at most 1")]
    seed: Annotated[int, at_least(0, 2**32)]


class WiseUnit(TypedDict):
    shard: Annotated[int, at_least(0, 2**32)]
    facts: Count
    score: float


class WiseWhole(TypedDict):
    edits: Count
    shards: Annotated[int, at_least(0, 2**32)]
    merged: bool
    least: float | None
    epsilons: list[float]


class WiseContent(TypedDict):
    """What an edit says beside its tensors. whole: of one that stands for all before it."""

    about: WiseAbout
    units: list[WiseUnit]
    whole: NotRequired[WiseWhole]
    stands_for: NotRequired[str]


class WisePatch(MemoryPatch):
    """What the shards hold after some facts: their values under the mask, which is drawn again from its seed."""

    layer: ClassVar[type[MemoryLayer]] = WiseLayer
    settings = ("about",)
    holds = WiseContent

    @classmethod
    def brings(cls, lm: LM, d_out: int, d_in: int, content: dict[str, Any]) -> dict[str, Size]:
        wanted, about = {}, content["about"]

        def masked(shard: int) -> Size:
            return size(int(mask_of(about["seed"], shard, (d_out, d_in), about["mask_ratio"]).sum()))

        for unit in content["units"]:
            wanted[f"values.{unit['shard']}"] = masked(unit["shard"])
        if (whole := content.get("whole")) is not None:
            wanted |= {f"finished.{number}": size(d_out, d_in) for number in range(len(whole["epsilons"]))}
            if whole["least"] is not None:
                wanted["values"] = masked(whole["shards"])
        return wanted

    @classmethod
    def concatenate(cls, patches: Sequence[Self], layer: WiseLayer) -> Self:
        """As any edit's, with one unit a shard."""
        joined = super().concatenate(patches, layer)
        units: list[dict[str, Any]] = []
        for unit in joined.content["units"]:
            if units and units[-1]["shard"] == unit["shard"]:
                earlier = units.pop()
                facts, score = earlier["facts"] + unit["facts"], min(earlier["score"], unit["score"])
                unit = {**unit, "facts": facts, "score": score}
            units.append(unit)
        joined.content["units"] = units
        return joined
