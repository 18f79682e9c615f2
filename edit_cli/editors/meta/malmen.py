"""MALMEN: a network says what should become of each token's output, and one least-squares shift comes nearest to all
of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edit_cli.distributed import ALONE
from edit_cli.editors.locate.solver import ScaledIdentity, solve
from edit_cli.editors.meta.base import TrainableEditor
from edit_cli.editors.meta.base_model_cache import Memory
from edit_cli.editors.meta.episodes import DrawOptions, Trial, draw
from edit_cli.editors.meta.factored_gradients import DenseShift, Gradient, Shift, gradients, largest, refuse_infinite
from edit_cli.editors.meta.hypernetwork import Hypernetwork, edited_modules, shapes_of
from edit_cli.editors.passes import in_batches
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.errors import UsageError
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import Row
from edit_cli.requests import Case, EditRequest

TOKENS = ("answer", "subject", "all")
Line = dict[str, float]
Told = tuple[Row, int]  # with the place of its subject's last token


@dataclass(kw_only=True)
class MALMEN(TrainableEditor):
    """Massive Editing via Meta Learning (Tan et al., 2024): S = (UᵀU + λI)⁻¹ UᵀD for all tokens of thousands of facts
    (section 3).

    layers: none for the last `last` of every stack; part, second_in: as in MEND.
    edits: facts edited together in training. Any number can be edited; what was learnt fits about as many.
    tokens: whose keys and gradients count: "answer", those that predict it (a classifier's first token; with an encoder
    and a decoder all), "subject": these and the subject's last token (causal models; without a subject these alone), or
    "all" that have a gradient. rank, spread: of the network's layers. step_size: η at first; log_step: log η is learnt.
    ridge: λ at first, whose logarithm is learnt.
    step_lr: learning rate of η and λ.
    edit_weight, locality_weight: of the new answers and of KL in the loss (the paper's c_loc is the second, the first
    is 1).
    asked: facts whose prompts a step's loss asks about, drawn at random from those edited together; 0: all of them.
    prompts: in one pass of the model; chunk: tokens in one pass of the network. Neither changes anything but memory and
    time.
    """

    heads = ("causal", "seq2seq", "classifier")
    remembers = True
    mass_editor = True
    shares_cases = True

    layers: list[int] = field(default_factory=list)
    last: int = 6
    part: str = "out"
    second_in: bool = False
    edits: int = 512
    tokens: str = "answer"
    rank: int = 1920
    spread: float = 1.0
    step_size: float = 1.0e-6
    log_step: bool = False
    ridge: float = 1.0
    step_lr: float = 1.0e-5
    edit_weight: float = 1.0
    locality_weight: float = 1.0
    asked: int = 0
    prompts: int = 32
    chunk: int = 1024
    draw: DrawOptions = field(default_factory=DrawOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens not in TOKENS:
            raise UsageError(f"method.tokens={self.tokens}: choose {', '.join(TOKENS[:-1])} or {TOKENS[-1]}")
        for name in ("edits", "prompts", "chunk", "step_size", "ridge"):
            if getattr(self, name) <= 0:
                raise UsageError(f"method.{name}={getattr(self, name)}: give more than 0")
        if self.asked < 0:
            raise UsageError(f"method.asked={self.asked}: give a number of facts, or 0 for all of them")

    @property
    def cases_per_edit(self) -> int:
        return self.edits

    def build(self, lm: LM) -> MalmenNet:
        modules, _ = self._modules(lm)
        return MalmenNet(
            Hypernetwork(shapes_of(lm, modules), self.rank, self.spread, outside=True),
            self.step_size,
            self.log_step,
            self.ridge,
        )

    def groups(self, net: MalmenNet) -> list[dict[str, Any]]:
        return [
            {"params": list(net.hypernetwork.parameters())},
            {"params": [net.steps, net.log_ridges], "lr": self.step_lr},
        ]

    def loss(self, net: MalmenNet, lm: LM, batch: Sequence[Case]) -> tuple[Tensor, Line]:
        """A stand-in for the mean loss over independent edits, whose gradient is the loss's; the loss itself is in
        the numbers.
        """
        modules, _ = self._modules(lm)
        edits = [batch[first : first + self.edits] for first in range(0, len(batch) - self.edits + 1, self.edits)]
        tokens = [
            self._tokens(lm, [case.requests[0] for case in lm.team.share(cases)], modules, self.memory(lm))
            for cases in edits
        ]
        if net.training:  # all rows of a batch before any is normalised
            net.hypernetwork.take_in(
                [torch.cat([torch.cat(pair, -1) for pair in pairs]) for pairs in zip(*tokens, strict=True)], lm.team
            )
        found = [self._meta_loss(net, lm, *edit) for edit in zip(edits, tokens, strict=True)]
        stand_ins, told = zip(*found, strict=True)
        return torch.stack(stand_ins).mean(), _mean([(line, 1.0) for line in told if line])

    def _meta_loss(
        self, net: MalmenNet, lm: LM, cases: Sequence[Case], tokens: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Line]:
        """Algorithm 2. tokens: of this process's share of the cases.

        The model's pass and the network's never share a graph: between them stands G, the gradient by the shift. Of
        several processes each reads, asks and learns from its share; the least squares are of all tokens, and all solve
        them alike.
        """
        modules, lowest = self._modules(lm)
        lessons, memory, team = draw(cases, 1, self.draw), self.memory(lm), lm.team
        changes = [net.changes(number, *pair, self.chunk) for number, pair in enumerate(tokens)]
        whole = [(team.collect(u), team.collect(d.detach())) for (u, _), d in zip(tokens, changes, strict=True)]
        if not all(bool(part.isfinite().all()) for pair in whole for part in pair):
            return net.steps.new_full((), math.nan), {}
        solved = [least_squares(u, d, ridge) for (u, d), ridge in zip(whole, net.ridges, strict=True)]
        shifts = {
            name: DenseShift(factors.dense().to(u).to(lm.device).requires_grad_())
            for name, factors, (u, _) in zip(modules, solved, whole, strict=True)
        }

        if net.training and 0 < self.asked < len(lessons):
            lessons = random.Random(f"{torch.initial_seed()}/{cases[0].id}").sample(lessons, self.asked)

        # the model's pass: G, summed over batches of prompts
        lines, wanted, mine = [], [shift.change for shift in shifts.values()], team.share(lessons)
        to_shift = [torch.zeros_like(change) for change in wanted]
        for part in in_batches(mine, self.prompts):
            share = len(mine[part]) / len(lessons)
            nll, kl, told = Trial(lm, mine[part], lowest, memory).losses(shifts)
            loss = self.edit_weight * nll + self.locality_weight * kl
            lines.append(({**told, "loss": float(loss.detach())}, share))
            if torch.is_grad_enabled():
                for total, found in zip(to_shift, torch.autograd.grad(loss, wanted), strict=True):
                    total += share * found
        told = _mean([line for some in team.gather([lines]) for line in some])
        if not net.training:
            told["shift"] = largest(lm, shifts)

        # the network's pass: each chunk's activations are computed again when `backward` comes to it
        stand_in = net.steps.new_zeros(())
        for number, (factors, change) in enumerate(zip(solved, changes, strict=True)):
            to_change, to_ridge = meta_gradient(factors, whole[number][0], team.sum(to_shift[number]))
            own = to_change.split(team.gather([len(change)]))[team.rank].to(change)
            stand_in = (
                stand_in
                + team.size * (own * change).sum().to(stand_in)  # gradients of processes are averaged
                + to_ridge.to(stand_in) * net.log_ridges[number]
            )
        return stand_in, told

    @torch.no_grad()
    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> WeightDelta:
        """One shift of each module for all requests.

        Raises:
            RejectedRequest: a gradient is no number.
        """
        net = self.trained(lm)
        modules, _ = self._modules(lm)
        team = lm.team if len(requests) >= lm.team.size else ALONE
        tokens = self._tokens(lm, team.share(requests), modules)
        updates = {}
        for number, (name, (u, delta)) in enumerate(zip(modules, tokens, strict=True)):
            keys, changes = team.collect(u), team.collect(net.changes(number, u, delta, self.chunk))
            refuse_infinite([Shift(changes, keys)])
            factors = least_squares(keys, changes, net.ridges[number])
            updates[f"{name}.weight"] = Factors(factors.left.float().contiguous(), factors.right.float().contiguous())
        sizes = {
            name: DenseShift(update.dense().to(lm.device))
            for name, update in zip(modules, updates.values(), strict=True)
        }
        return WeightDelta(updates, {"shift": largest(lm, sizes)}).compact(lm)

    def _tokens(
        self, lm: LM, requests: Sequence[EditRequest], modules: Sequence[str], memory: Memory | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """(keys u (n, d_in), gradients δ (n, d_out)) of each module, of the tokens that count in all requests; in
        host memory.
        """
        every = lm.head.encode([(request.text, request.target_new) for request in requests])
        rows = sorted(zip(every, map(self._subject, requests, every), strict=True), key=lambda pair: len(pair[0].ids))
        parts: list[tuple[Tensor, ...]] = []
        for part in in_batches(rows, self.prompts):
            some = rows[part]

            def find(new: list[int], some: Sequence[Told] = some) -> list[tuple[Tensor, ...]]:
                return self._found(lm, [some[i] for i in new], modules)

            if memory is not None and memory.works(lm):
                parts += memory.recall(
                    [("tokens", tuple(modules), self.tokens, row.ids, row.target, at) for row, at in some], find
                )
            else:
                parts += find(list(range(len(some))))
        return [
            tuple(torch.cat([found[2 * n + side] for found in parts]) for side in (0, 1)) for n in range(len(modules))
        ]

    def _subject(self, request: EditRequest, row: Row) -> int:
        """The place of the subject's last token, -1 where it does not matter."""
        return row.token_at(request.subject_span[1] - 1) if self.tokens == "subject" and request.subject else -1

    def _found(self, lm: LM, told: Sequence[Told], modules: Sequence[str]) -> list[tuple[Tensor, ...]]:
        """For each row, u and δ of the first module, then of the second, and so on."""
        rows = [row for row, _ in told]
        found = gradients(lm, rows, modules)
        kept = {name: self._counts(lm, told, gradient) for name, gradient in found.items()}
        return [
            tuple(
                part[row][kept[name][row]].cpu()
                for name in modules
                for part in (found[name].inputs, found[name].outputs)
            )
            for row in range(len(rows))
        ]

    def _counts(self, lm: LM, told: Sequence[Told], gradient: Gradient) -> Tensor:
        """(rows, tokens) whether a token's key and gradient take part."""
        kept = gradient.kept
        if self.tokens == "all" or lm.head.kind == "seq2seq":
            return kept
        columns = torch.arange(kept.shape[1], device=kept.device)
        if lm.head.kind == "classifier":
            return kept & (columns == 0)
        starts, subjects = (
            torch.tensor(which, device=kept.device)[:, None]
            for which in zip(*((row.start - 1, at) for row, at in told), strict=True)
        )
        return kept & ((columns >= starts) | (columns == subjects))

    def _modules(self, lm: LM) -> tuple[list[str], int]:
        if self.tokens == "subject" and lm.head.kind != "causal":
            raise UsageError(f"method.tokens=subject: {lm.name} is no causal model; choose answer or all")
        return edited_modules(lm, self.layers, self.last, self.part, self.second_in)


class MalmenNet(nn.Module):
    """The network g, and of each module a step size η and a log λ."""

    def __init__(self, hypernetwork: Hypernetwork, step_size: float, log_step: bool, ridge: float) -> None:
        super().__init__()
        self.hypernetwork, self.log_step = hypernetwork, log_step
        self.steps = nn.Parameter(
            torch.full((len(hypernetwork.shapes),), math.log(step_size) if log_step else step_size)
        )
        self.log_ridges = nn.Parameter(torch.full((len(hypernetwork.shapes),), math.log(ridge)))

    @property
    def ridges(self) -> list[float]:
        """λ of each module."""
        return self.log_ridges.detach().exp().tolist()

    def changes(self, number: int, keys: Tensor, deltas: Tensor, chunk: int) -> Tensor:
        """D (n, d_out) of one module; its activations live for one chunk of tokens at a time, forth and back."""
        parts = zip(keys.split(chunk), deltas.split(chunk), strict=True)
        return torch.cat(
            [checkpoint(self._changes, number, u, d, use_reentrant=False, preserve_rng_state=False) for u, d in parts]
        )

    def _changes(self, number: int, u: Tensor, delta: Tensor) -> Tensor:
        """−η (u·ũ) δ̃: what MEND's shift by this token alone would do to the token's own output (equation 5)."""
        step = self.steps[number].exp() if self.log_step else self.steps[number]
        keys = u.to(step.device)
        better, moved = self.hypernetwork.improved(number, torch.cat([keys, delta.to(keys)], -1)).split(
            [u.shape[-1], delta.shape[-1]], -1
        )
        return (-step * (keys * better).sum(-1, keepdim=True) * moved).to(u.device)


@torch.no_grad()
def least_squares(keys: Tensor, changes: Tensor, ridge: float) -> Factors:
    """The shift W + S that comes nearest to U Sᵀ = D (equation 4), float64: Sᵀ = (UᵀU + λI)⁻¹ UᵀD, with the factors Dᵀ
    and U (UᵀU + λI)⁻¹.

    keys: U (n, d_in); changes: D (n, d_out); ridge: λ.
    """
    return solve(changes.double().T, keys.double().T, ScaledIdentity(keys.shape[1], keys.device), ridge)


@torch.no_grad()
def meta_gradient(solved: Factors, keys: Tensor, to_shift: Tensor) -> tuple[Tensor, Tensor]:
    """(∂L/∂D (n, d_out), ∂L/∂log λ) from G = ∂L/∂S (d_out, d_in), float64.

    With M = (UᵀU + λI)⁻¹ Gᵀ they are U M and −λ ⟨M, Sᵀ⟩. The solution's second factor U (UᵀU + λI)⁻¹ gives the first,
    and, as λ (UᵀU + λI)⁻¹ = I − (UᵀU + λI)⁻¹ UᵀU, the second too.
    """
    weighted, towards, keys = solved.right, to_shift.to(solved.right), keys.double()
    ridged = towards - towards @ keys.T @ weighted  # λ Mᵀ
    return weighted @ towards.T, -(ridged * solved.dense()).sum()


def _mean(lines: Sequence[tuple[Line, float]]) -> Line:
    """Weighted means by name; of shifts the largest."""
    total = sum(weight for _, weight in lines)
    names = lines[0][0] if lines else ()
    return {
        name: (
            max(line[name] for line, _ in lines)
            if name == "shift"
            else sum(line[name] * weight for line, weight in lines) / total
        )
        for name in names
    }
