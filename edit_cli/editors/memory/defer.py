"""DEFER (baseline of Hartvigsen et al., 2023, after SERAC): a trained router says whether a trained linear expert
answers for a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from edit_cli.config.schema import Count, NonNegative, Positive
from edit_cli.editors.memory.base import MemoryConfig, MemoryEditor, MemoryLayer, MemoryPatch
from edit_cli.editors.passes import Passes, at_prompt_end, in_batches, passes, row_losses, rows_right
from edit_cli.files import shapes
from edit_cli.files.tensors import Size, size
from edit_cli.lm.layout import widths
from edit_cli.lm.model import LM
from edit_cli.lm.weights.access import Undo
from edit_cli.requests import EditRequest

EXACT = 1e-6  # share of ‖ΔA‖ that factors may leave out
FIRST_RANK = 8  # that is tried
PARTS = ("router", "threshold", "offset")  # w (d_in,), b (), c (d_out,)


class DeferLayer(MemoryLayer):
    """g = σ(w·q + b) and o = A q + c, q being the input at the prompt's last token; where g ≥ ½, o is the output at
    every token.

    A is the sum of what the edits added to it: it is put together when it is needed.
    """

    def __init__(self, original: nn.Module, lm: LM, module: str, seed: int) -> None:
        super().__init__(original, lm, module)
        d_out, d_in = widths(original)
        draw, bound = torch.Generator().manual_seed(seed), d_in**-0.5  # as a fresh nn.Linear
        shapes = {"expert": (d_out, d_in), "router": (d_in,), "threshold": (), "offset": (d_out,)}
        start = {
            name: ((torch.rand(shape, generator=draw) * 2 - 1) * bound).to(lm.device) for name, shape in shapes.items()
        }
        self.start, self.small = start.pop("expert"), start
        self.steps: list[tuple[Tensor, Tensor]] = []
        self._expert: Tensor | None = self.start
        self.edits = 0

    @property
    def expert(self) -> Tensor:
        """A (d_out, d_in)."""
        if self._expert is None:
            self._expert = self.start.clone()
            for left, right in self.steps:
                self._expert += left @ right
        return self._expert

    def add(self, edit: MemoryPatch) -> Undo:
        before, edits, steps = self.small, self.edits, len(self.steps)
        ranks = edit.content["ranks"]
        lefts, rights = edit.tensors["left"].split(ranks, dim=1), edit.tensors["right"].split(ranks)
        for pair in zip(lefts, rights, strict=True):  # one after another, as they were made: sums hang on it
            left, right = (part.to(self.start, copy=True, memory_format=torch.contiguous_format) for part in pair)
            self._expert = self.expert + left @ right
            self.steps.append((left, right))
        self.small = {name: edit.tensors[name].to(self.start) for name in PARTS}
        self.edits += edit.content["facts"]

        def undo() -> None:
            del self.steps[steps:]
            self._expert, self.small, self.edits = None, before, edits

        return undo

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = self.original(states, *args, **kwargs)
        inside = self.rows(states)
        if inside is None or not self.steps:
            return output
        answer = self.decided(self.position, lambda: self._answers(at_prompt_end(inside, self.position)))
        if answer.dim() == 1:  # the prompt is not complete yet
            return output
        mine = ~answer.isnan().any(1)
        if not bool(mine.any()):
            return output
        plain = output.view(*inside.shape[:2], -1)
        return torch.where(mine[:, None, None], answer[:, None].to(output), plain).view_as(output)

    def _answers(self, queries: Tensor) -> Tensor:
        """(rows, d_out): o where the router takes the prompt, NaN where it defers."""
        queries = queries.to(self.start)
        taken = queries @ self.small["router"] + self.small["threshold"] >= 0
        return torch.where(taken[:, None], linear(queries, self.expert, self.small["offset"]), float("nan"))


class DeferContent(TypedDict):
    """What an edit says beside its tensors. ranks: of the steps by which its factors were made."""

    seed: int
    facts: shapes.Count
    ranks: list[shapes.Count]


class DeferPatch(MemoryPatch):
    """What an edit adds to A, in factors (content `ranks`: of each unit of facts), and the other parameters as they are
    after it.
    """

    layer: ClassVar[type[MemoryLayer]] = DeferLayer
    settings = ("seed",)
    holds = DeferContent
    axes: ClassVar = {"left": 1, "right": 0}
    counts = ("facts",)

    @classmethod
    def brings(cls, lm: LM, d_out: int, d_in: int, content: dict[str, Any]) -> dict[str, Size]:
        rank = sum(content["ranks"])
        return {
            "left": size(d_out, rank), "right": size(rank, d_in),
            "router": size(d_in), "threshold": size(), "offset": size(d_out),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DEFERConfig(MemoryConfig):
    """The projection's input is what the router reads, its output is what is replaced."""

    lr: Positive = 0.1
    """Learning rate of Adam on router and expert; 7e-5 for models of 7 B parameters."""
    steps: Count = 100
    """Most training steps."""
    stop_loss: NonNegative = 0.05
    """Loss below which training stops, once every target token is the likeliest."""
    batch_size: Count = 1
    """Facts that are trained together; the next ones go on from there."""


class DEFER(MemoryEditor[DEFERConfig]):
    """Router and expert are trained together: the layer gives g·o + (1 − g)·layer(x) while they are."""

    Config = DEFERConfig
    Patch = DeferPatch

    def edit(self, requests: Sequence[EditRequest]) -> DeferPatch:
        """The router and the expert, trained on from where earlier facts left them, `batch_size` facts at a time."""
        units = [requests[part] for part in in_batches(requests, self.config.batch_size)]
        return self.in_turn(units, self._unit, "router and expert")

    def _unit(self, requests: Sequence[EditRequest]) -> DeferPatch:
        """What facts that are trained together add to the layer that is attached."""
        layer = self.memory(seed=self.config.seed)
        present = {"expert": layer.expert, **layer.small}
        weights = {name: value.detach().clone().requires_grad_() for name, value in present.items()}
        rows = self.lm.head.encode([(request.text, request.target_new) for request in requests])
        with passes(self.lm, rows, self.module, self.layer, end=True) as run:
            self._train(run, weights, layer.original)
        trained = {name: value.detach() for name, value in weights.items()}
        left, right = factors(trained.pop("expert") - layer.expert)
        content = {"seed": self.config.seed, "facts": len(requests), "ranks": [len(right)]}
        return DeferPatch(self.module, layer.digest, {**trained, "left": left, "right": right}, content)

    def _train(self, run: Passes, weights: dict[str, Tensor], original: nn.Module) -> None:
        queries, count = run.queries.to(weights["expert"]), len(run.rows)
        plain = original(run.inputs.to(self.lm.dtype)).detach()  # whatever an attached expert says now
        optimizer = torch.optim.Adam(list(weights.values()), lr=self.config.lr)
        for _ in self.lm.monitor.counted("expert", self.config.steps):
            gate = torch.sigmoid(queries @ weights["router"] + weights["threshold"])[:, None, None]
            said = linear(queries, weights["expert"], weights["offset"])[:, None]

            def mix(output: Tensor, gate: Tensor = gate, said: Tensor = said) -> Tensor:
                return (gate * said).to(output) + (1 - gate).to(output) * plain

            found = run.answers(mix)
            losses = row_losses(found, count)
            if (
                bool(rows_right(found, count).all())
                and losses.max().item() < self.config.stop_loss
                and bool((gate >= 0.5).all())
            ):
                break
            gradients = torch.autograd.grad(losses.mean(), list(weights.values()))
            for weight, gradient in zip(weights.values(), gradients, strict=True):
                weight.grad = gradient
            optimizer.step()


def factors(change: Tensor) -> tuple[Tensor, Tensor]:
    """(d_out, r) and (r, d_in) whose product is `change` but for a share of `EXACT`.

    One fact's change has rank one, or nearly.

    A basis of random combinations of its columns is tried and widened until it holds (Halko et al., 2011): products, no
    decomposition of the whole matrix while its rank is low.
    """
    draw, size = torch.Generator().manual_seed(0), FIRST_RANK
    basis = torch.eye(change.shape[0], dtype=change.dtype, device=change.device)
    while size < min(change.shape) // 2:
        mixed = change @ torch.randn(change.shape[1], size, generator=draw).to(change)
        found, _ = torch.linalg.qr(change @ (change.T @ torch.linalg.qr(mixed)[0]))
        if float((change - found @ (found.T @ change)).norm()) <= EXACT * float(change.norm()):
            basis = found
            break
        size *= 4
    left, values, right = torch.linalg.svd(basis.T @ change, full_matrices=False)
    left_out = values.flip(0).square().cumsum(0).flip(0).sqrt()
    rank = max(int((left_out > EXACT * values.norm()).sum()), 1)
    return basis @ left[:, :rank] * values[:rank], right[:rank].contiguous()
