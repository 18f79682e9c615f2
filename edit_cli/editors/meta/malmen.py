"""MALMEN: a network says what should become of each token's output, and one least-squares shift comes nearest to all
of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edit_cli.config.schema import Count, Natural, NonNegative, Positive
from edit_cli.distributed import SINGLE
from edit_cli.editors.locate.solver import ScaledIdentity, solve
from edit_cli.editors.meta.base import GradientEditor, Logs, StepConfig, StepSizes, TrainingConfig
from edit_cli.editors.meta.base_model_cache import BaseModelCache
from edit_cli.editors.meta.episodes import EpisodeEvaluation, sample_episodes
from edit_cli.editors.meta.factored_gradients import DenseShift, Gradient, Shift, gradients, largest, refuse_infinite
from edit_cli.editors.meta.hypernetwork import Hypernetwork
from edit_cli.editors.passes import in_batches
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.errors import UsageError
from edit_cli.lm.tokenization import Row
from edit_cli.requests import Case, EditRequest

Placed = tuple[Row, int]  # a row with the index of its subject's last token


@dataclass(frozen=True, kw_only=True)
class MALMENConfig(StepConfig):
    """Any number of facts can be edited; what was learned fits about `edits`."""

    last: Count = 6
    """How many of every stack, where no layers are given (published: 6 of GPT-2, GPT-J and BERT, 2 of T5-XL, 4 of
    T5-small)."""
    part: Literal["both", "out", "block"] = "out"
    second_in: bool = False
    edits: Count = 512
    """Facts edited together in training (published: 512 of zsRE, 1,024 of FEVER, up to 8,192)."""
    tokens: Literal["answer", "subject", "all"] = "answer"
    """Whose keys and gradients count: those that predict the answer (a classifier's first token; with an encoder and a
    decoder all), these and the subject's last token (causal models; without a subject these alone), or all that have a
    gradient."""
    rank: Count = 1920
    """Of the network's layers."""
    spread: NonNegative = 1.0
    """Standard deviation of their input matrices at first."""
    step_size: Positive = 1.0e-6
    """η of each matrix at first; small models need far more."""
    ridge: Positive = 1.0
    """λ of the least squares at first; its logarithm is learned."""
    step_lr: NonNegative = 1.0e-5
    """Learning rate of η and λ."""
    asked: Natural = 0
    """Facts, drawn from those edited together, whose prompts a step's loss asks about; 0: all, as published."""
    prompts: Count = 32
    """In one pass of the model; changes nothing but memory and time."""
    chunk: Count = 1024
    """Tokens in one pass of the network; changes nothing but memory and time."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=300, lr=1.0e-5, clip=1.0, validate_every=50, validation_edits=2, save_every=50, memory_mib=512
        )
    )
    """How it is trained; published: one epoch."""


class MALMEN(GradientEditor[MALMENConfig, "MalmenNet"]):
    """Massive Editing via Meta Learning (Tan et al., 2024): S = (UᵀU + λI)⁻¹ UᵀD for all tokens of thousands of facts
    (section 3).
    """

    Config = MALMENConfig
    mass_editor = True
    shares_cases = True

    def build(self) -> MalmenNet:
        if self.config.tokens == "subject" and self.lm.head.kind != "causal":
            raise UsageError(f"method.tokens=subject: {self.lm.name} is no causal model; choose answer or all")
        return MalmenNet(self.shapes, self.config)

    def groups(self, net: MalmenNet) -> list[dict[str, Any]]:
        return [
            {"params": list(net.hypernetwork.parameters())},
            {"params": [net.steps, net.log_ridges], "lr": self.config.step_lr},
        ]

    def loss(self, net: MalmenNet, batch: Sequence[Case]) -> tuple[Tensor, Logs]:
        """A stand-in for the mean loss over independent edits, whose gradient is the loss's; the loss itself is in
        the numbers.
        """
        size, process_group = self.config.edits, self.lm.process_group
        edits = [batch[first : first + size] for first in range(0, len(batch) - size + 1, size)]
        tokens = [
            self._tokens([case.requests[0] for case in process_group.share(cases)], self.cache) for cases in edits
        ]
        if net.training:  # all rows of a batch before any is normalized
            net.hypernetwork.take_in(
                [torch.cat([torch.cat(pair, -1) for pair in pairs]) for pairs in zip(*tokens, strict=True)],
                process_group,
            )
        stand_ins, logs = zip(*(self._meta_loss(net, *edit) for edit in zip(edits, tokens, strict=True)), strict=True)
        return torch.stack(stand_ins).mean(), _mean([(line, 1.0) for line in logs if line])

    def _meta_loss(
        self, net: MalmenNet, cases: Sequence[Case], tokens: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Logs]:
        """Algorithm 2. tokens: of this process's share of the cases.

        The model's pass and the network's never share a graph: between them stands G, the gradient by the shift. Of
        several processes each reads, asks and learns from its share; the least squares are of all tokens, and all solve
        them alike.
        """
        config, process_group = self.config, self.lm.process_group
        episodes = sample_episodes(cases, 1, config.draw)
        changes = [net.changes(number, *pair, config.chunk) for number, pair in enumerate(tokens)]
        whole = [
            (process_group.collect(u), process_group.collect(d.detach()))
            for (u, _), d in zip(tokens, changes, strict=True)
        ]
        if not all(bool(part.isfinite().all()) for pair in whole for part in pair):
            return net.steps.new_full((), math.nan), {}
        solved = [least_squares(u, d, ridge) for (u, d), ridge in zip(whole, net.ridges, strict=True)]
        shifts = {
            name: DenseShift(factors.dense().to(u).to(self.lm.device).requires_grad_())
            for name, factors, (u, _) in zip(self.modules, solved, whole, strict=True)
        }

        if net.training and 0 < config.asked < len(episodes):
            episodes = random.Random(f"{torch.initial_seed()}/{cases[0].id}").sample(episodes, config.asked)

        # the model's pass: G, summed over batches of prompts
        lines, wanted, mine = [], [shift.change for shift in shifts.values()], process_group.share(episodes)
        to_shift = [torch.zeros_like(change) for change in wanted]
        for part in in_batches(mine, config.prompts):
            share = len(mine[part]) / len(episodes)
            nll, kl, logs = EpisodeEvaluation(self.cache, mine[part], self.lowest).losses(shifts)
            loss = config.edit_weight * nll + config.locality_weight * kl
            lines.append(({**logs, "loss": float(loss.detach())}, share))
            if torch.is_grad_enabled():
                for total, gradient in zip(to_shift, torch.autograd.grad(loss, wanted), strict=True):
                    total += share * gradient
        logs = _mean([line for some in process_group.gather([lines]) for line in some])
        if not net.training:
            logs["shift"] = largest(self.lm, shifts)

        # the network's pass: each chunk's activations are computed again when `backward` comes to it
        stand_in = net.steps.new_zeros(())
        for number, (factors, change) in enumerate(zip(solved, changes, strict=True)):
            to_change, to_ridge = meta_gradient(factors, whole[number][0], process_group.sum(to_shift[number]))
            own = to_change.split(process_group.gather([len(change)]))[process_group.rank].to(change)
            stand_in = (
                stand_in
                + process_group.size * (own * change).sum().to(stand_in)  # gradients of processes are averaged
                + to_ridge.to(stand_in) * net.log_ridges[number]
            )
        return stand_in, logs

    @torch.no_grad()
    def edit(self, requests: Sequence[EditRequest]) -> WeightDelta:
        """One shift of each module for all requests.

        Raises:
            RejectedRequest: a gradient is no number.
        """
        net, lm = self.trained(), self.lm
        process_group = lm.process_group if len(requests) >= lm.process_group.size else SINGLE
        tokens = self._tokens(process_group.share(requests), BaseModelCache(lm))
        updates: dict[str, Factors] = {}
        for number, (name, (u, delta)) in enumerate(zip(self.modules, tokens, strict=True)):
            keys, changes = (
                process_group.collect(u),
                process_group.collect(net.changes(number, u, delta, self.config.chunk)),
            )
            refuse_infinite([Shift(changes, keys)])
            factors = least_squares(keys, changes, net.ridges[number])
            updates[name] = Factors(factors.left.float().contiguous(), factors.right.float().contiguous())
        sizes = {name: DenseShift(update.dense().to(lm.device)) for name, update in updates.items()}
        return WeightDelta(
            {f"{name}.weight": update for name, update in updates.items()}, {"shift": largest(lm, sizes)}
        ).compact(lm)

    def _tokens(self, requests: Sequence[EditRequest], cache: BaseModelCache) -> list[tuple[Tensor, Tensor]]:
        """(keys u (n, d_in), gradients δ (n, d_out)) of each module, of the tokens that count in all requests; in
        host memory.
        """
        every = self.lm.head.encode([(request.text, request.target_new) for request in requests])
        rows = sorted(zip(every, map(self._subject, requests, every), strict=True), key=lambda pair: len(pair[0].ids))
        parts: list[tuple[Tensor, ...]] = []
        for part in in_batches(rows, self.config.prompts):
            some = rows[part]

            def read(new: list[int], some: Sequence[Placed] = some) -> list[tuple[Tensor, ...]]:
                return self._read([some[i] for i in new])

            keys = [("tokens", tuple(self.modules), self.config.tokens, row.ids, row.target, at) for row, at in some]
            parts += cache.recall(keys, read)
        return [
            tuple(torch.cat([row[2 * n + side] for row in parts]) for side in (0, 1))  # type: ignore[misc]
            for n in range(len(self.modules))
        ]

    def _subject(self, request: EditRequest, row: Row) -> int:
        """The index of the subject's last token, -1 where it does not matter."""
        matters = self.config.tokens == "subject" and request.subject
        return row.token_at(request.subject_span[1] - 1) if matters else -1

    def _read(self, placed: Sequence[Placed]) -> list[tuple[Tensor, ...]]:
        """For each row, u and δ of the first module, then of the second, and so on."""
        whole = gradients(self.lm, [row for row, _ in placed], self.modules)
        kept = {name: self._counts(placed, gradient) for name, gradient in whole.items()}
        return [
            tuple(
                part[row][kept[name][row]].cpu()
                for name in self.modules
                for part in (whole[name].inputs, whole[name].outputs)
            )
            for row in range(len(placed))
        ]

    def _counts(self, placed: Sequence[Placed], gradient: Gradient) -> Tensor:
        """(rows, tokens) whether a token's key and gradient take part."""
        kept, kind = gradient.kept, self.lm.head.kind
        if self.config.tokens == "all" or kind == "seq2seq":
            return kept
        columns = torch.arange(kept.shape[1], device=kept.device)
        if kind == "classifier":
            return kept & (columns == 0)
        starts, subjects = (
            torch.tensor(which, device=kept.device)[:, None]
            for which in zip(*((row.start - 1, at) for row, at in placed), strict=True)
        )
        return kept & ((columns >= starts) | (columns == subjects))


class MalmenNet(StepSizes):
    """The network g, and of each module a step size η and a log λ."""

    def __init__(self, shapes: Sequence[tuple[int, int]], config: MALMENConfig) -> None:
        super().__init__(len(shapes), config)
        self.hypernetwork = Hypernetwork(shapes, config.rank, config.spread, outside=True)
        self.log_ridges = nn.Parameter(torch.full((len(shapes),), math.log(config.ridge)))

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
        step = self.sizes[number]
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


def _mean(lines: Sequence[tuple[Logs, float]]) -> Logs:
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
