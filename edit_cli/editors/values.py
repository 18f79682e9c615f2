"""Value optimisation, shared by the locate-then-edit family and batched over edits.

For each edit i a shift δ_i is added to what leaves `site` at the subject's last token, and made to minimise

    L_i = mean over contexts of NLL(target)  +  kl · KL(P_δ ‖ P_0) at "{subject} is a"  +  decay · ‖δ_i‖ / ‖v_0‖²

Losses of different edits share nothing, so their sum optimises each one alone: Adam is element-wise, an edit that is done
leaves the batch (masking its gradient would let Adam's momentum move it on), and clamping is per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from edit_cli.editors.contexts import BARE, Contexts, rows_in_contexts
from edit_cli.errors import UsageError
from edit_cli.lm.hooks import on_output
from edit_cli.lm.model import LM
from edit_cli.lm.reading import Tap, read
from edit_cli.lm.tokens import pad_right
from edit_cli.monitor import Advance
from edit_cli.requests import EditRequest

Site = Literal["block", "mlp_out"]


@dataclass
class ValueOptions:
    """Settings of the optimisation (locate-then-edit, sections 7 and 9).

    steps: forward passes; one update fewer. stop_loss: an edit below it is done (tested before the update).
    clamp_norm_factor: ‖δ‖ ≤ factor · ‖v_0‖. kl_position: "subject" as released, "last" as the paper words it.
    batch_edits: edits optimised together; changes speed and memory only.
    """

    steps: int = 20
    lr: float = 0.5
    weight_decay: float = 0.5
    clamp_norm_factor: float = 0.75
    kl_factor: float = 0.0625
    kl_prompt: str = "{} is a"
    kl_position: str = "subject"
    stop_loss: float = 0.05
    batch_edits: int = 25


@dataclass
class Values:
    """Targets v_0 + δ and where they started, (d, n) float32; final loss and number of forward passes of each edit."""

    target: Tensor
    initial: Tensor
    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


def optimise_values(lm: LM, requests: Sequence[EditRequest], layer: int, site: Site, options: ValueOptions, contexts: Contexts) -> Values:
    """Target states of every request at `site` of `layer`: the block's output (MEMIT) or the MLP projection's (ROME)."""
    if options.kl_position not in ("subject", "last"):
        raise UsageError(f"method.value.kl_position={options.kl_position}: choose subject or last")
    if "{}" not in options.kl_prompt:
        raise UsageError("method.value.kl_prompt must hold the slot {}")
    rows, positions = rows_in_contexts(lm, requests, BARE, with_target=False)
    module = lm.layout.block(layer) if site == "block" else lm.layout.mlp_out(layer)
    (initial,) = read(lm, rows, positions, [Tap(module, "output")])
    found = Values(initial.T.clone(), initial.T.clone())
    with lm.monitor.phase("value"), lm.monitor.task("optimising values", len(requests)) as advance:
        for start in range(0, len(requests), options.batch_edits):
            chunk = slice(start, start + options.batch_edits)
            problem = _Problem(lm, requests[chunk], layer, site, options, contexts, initial[chunk])
            shift, losses, steps = problem.minimise(advance)
            found.target[:, chunk] += shift.T
            found.losses += losses
            found.steps += steps
    return found


class _Problem:
    """One batch of edits. Rows are ordered edit by edit: its contexts, then its KL row."""

    def __init__(
        self, lm: LM, requests: Sequence[EditRequest], layer: int, site: Site, options: ValueOptions, contexts: Contexts, initial: Tensor
    ) -> None:
        self.lm, self.layer, self.site, self.options = lm, layer, site, options
        self.initial_norm = initial.norm(dim=1)
        self.count = len(requests)
        contextual, lookup = rows_in_contexts(lm, requests, contexts, with_target=True)
        kl = [EditRequest(options.kl_prompt, request.subject, "") for request in requests]
        kl_rows, kl_lookup = rows_in_contexts(lm, kl, BARE, with_target=False)
        each = len(contexts.texts)
        self.inputs, self.lookup, self.targets, self.where, self.kl_at = [], [], [], [], []
        for edit in range(self.count):
            for row, at in list(zip(contextual, lookup, strict=True))[edit * each : (edit + 1) * each]:
                self._add(row.ids[:-1], at)
                self.where.append(list(range(row.start - 1, len(row.ids) - 1)))
                self.targets.append(row.target)
            self._add(kl_rows[edit].ids, kl_lookup[edit])
            self.kl_at.append(kl_lookup[edit] if options.kl_position == "subject" else len(kl_rows[edit].ids) - 1)
        self.each = each + 1

    def _add(self, ids: tuple[int, ...], lookup: int) -> None:
        self.inputs.append(ids)
        self.lookup.append(lookup)

    def minimise(self, advance: Advance) -> tuple[Tensor, list[float], list[int]]:
        """(δ (n, d), final losses, forward passes used)."""
        options, device = self.options, self.lm.device
        result = torch.zeros(self.count, self.lm.layout.width, device=device)
        losses, steps = [0.0] * self.count, [0] * self.count
        active = list(range(self.count))
        shift = result.clone()
        momentum, variance = torch.zeros_like(shift), torch.zeros_like(shift)
        batch, reference = None, None
        for step in range(options.steps):
            batch = batch or _Batch(self, active)
            shift = shift.detach().requires_grad_()
            loss, distribution = batch.losses(shift, reference)
            reference = distribution.detach() if reference is None else reference
            values = loss.detach().tolist()
            done = [value < options.stop_loss or step == options.steps - 1 for value in values]
            for row, edit in enumerate(active):
                losses[edit], steps[edit] = values[row], step + 1
                if done[row]:
                    result[edit] = shift[row].detach()
            if any(done):
                keep = [row for row, finished in enumerate(done) if not finished]
                advance(len(done) - len(keep))
                if not keep:
                    break
            (gradient,) = torch.autograd.grad(loss.sum(), shift)
            shift = shift.detach()
            if any(done):
                active = [active[row] for row in keep]
                shift, gradient, momentum, variance, reference = (x[keep] for x in (shift, gradient, momentum, variance, reference))
                batch = None
            # Adam with its default betas; every edit in the batch has made the same number of updates
            momentum = 0.9 * momentum + 0.1 * gradient
            variance = 0.999 * variance + 0.001 * gradient.square()
            scale = (variance / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            shift = shift - options.lr * momentum / (1 - 0.9 ** (step + 1)) / scale
            limit = options.clamp_norm_factor * self.initial_norm[active]
            shift = shift * (limit / shift.norm(dim=1).clamp_min(1e-30)).clamp(max=1.0)[:, None]
        return result, losses, steps


class _Batch:
    """The rows of the edits that are still being optimised, padded, with the constant states below the site computed once."""

    def __init__(self, problem: _Problem, active: list[int]) -> None:
        self.problem = problem
        lm, each = problem.lm, problem.each
        rows = [edit * each + j for edit in active for j in range(each)]
        self.ids, self.mask = pad_right([problem.inputs[r] for r in rows], lm.head.pad, lm.device)
        device = lm.device
        self.lookup = torch.tensor([problem.lookup[r] for r in rows], device=device)
        self.owner = torch.arange(len(active), device=device).repeat_interleave(each)
        self.initial_norm = problem.initial_norm[active]
        where, labels, share, owner = [], [], [], []
        for place, edit in enumerate(active):
            for j in range(each - 1):
                context = edit * (each - 1) + j
                columns, target = problem.where[context], problem.targets[context]
                where += [(place * each + j, column) for column in columns]
                labels += target
                share += [1.0 / len(target) / (each - 1)] * len(target)
                owner += [place] * len(target)
        where += [(place * each + each - 1, problem.kl_at[edit]) for place, edit in enumerate(active)]
        self.where = torch.tensor(where, device=device)
        self.labels = torch.tensor(labels, device=device)
        self.share = torch.tensor(share, device=device)
        self.label_owner = torch.tensor(owner, device=device)
        self.states = self._constant_states()

    def _constant_states(self) -> Tensor | None:
        """What leaves the last block that no shift reaches, (rows, tokens, width); None if a shift reaches all of them."""
        problem = self.problem
        self.frozen = problem.layer if problem.site == "block" else problem.layer - 1
        if self.frozen < 0:
            return None
        lm, seen = problem.lm, []
        with torch.no_grad(), on_output(lm.module(lm.layout.block(self.frozen)), lambda hidden: seen.append(hidden.clone())):
            lm.head.logits_at(self.ids, self.mask, self.where[:1, 0], self.where[:1, 1])
        return seen[0]

    def losses(self, shift: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """(loss of every edit (n,), log-probabilities at the KL position (n, vocabulary))."""
        problem, options = self.problem, self.problem.options
        lm = problem.lm
        rows = torch.arange(len(self.owner), device=shift.device)

        def inject(states: Tensor) -> Tensor:
            moved = states.clone()
            moved[rows, self.lookup] += shift[self.owner].to(states)
            return moved

        with ExitStack() as stack:
            if problem.site == "block":
                stack.enter_context(lm.skipping(self.frozen, inject(self.states)))
            else:
                if self.states is not None:
                    stack.enter_context(lm.skipping(self.frozen, self.states))
                stack.enter_context(on_output(lm.module(lm.layout.mlp_out(problem.layer)), inject))
            logits = lm.head.logits_at(self.ids, self.mask, self.where[:, 0], self.where[:, 1])
        log_probs = logits.log_softmax(-1)
        targets, kl = log_probs[: len(self.labels)], log_probs[len(self.labels) :]
        picked = targets.gather(1, self.labels[:, None])[:, 0]
        nll = torch.zeros(len(kl), device=shift.device).index_add(0, self.label_owner, -picked * self.share)
        base = kl.detach() if reference is None else reference
        divergence = (kl.exp() * (kl - base)).sum(-1)
        decay = shift.norm(dim=1) / self.initial_norm**2
        return nll + options.kl_factor * divergence + options.weight_decay * decay, kl
