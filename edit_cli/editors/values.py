"""Value optimisation, shared by the locate-then-edit family and batched over edits.

For each edit i a shift δ_i is added to what leaves `site` at the subject's last token, and made to minimise

    L_i = mean over contexts of NLL(target)  +  kl · KL(P_δ ‖ P_0) at "{subject} is a"  +  decay · ‖δ_i‖ / ‖v_0‖²

Losses of different edits share nothing, so their sum optimises each one alone: Adam is element-wise with a step count an
edit, clamping is per row, and an edit that is done leaves the batch (masking its gradient would let momentum move it on)
while one from the queue takes its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from edit_cli.editors.contexts import BARE, Contexts, rows_in_contexts
from edit_cli.errors import OutOfMemory, UsageError
from edit_cli.lm.model import LM
from edit_cli.lm.reading import Tap, read
from edit_cli.lm.resume import Resumption, Span
from edit_cli.requests import EditRequest

Site = Literal["block", "mlp_out"]


@dataclass
class ValueOptions:
    """Settings of the optimisation (locate-then-edit, sections 7 and 9).

    steps: forward passes; one update fewer. stop_loss: an edit below it is done (tested before the update).
    clamp_norm_factor: ‖δ‖ ≤ factor · ‖v_0‖. kl_position: "subject" as released, "last" as the paper words it.
    batch_tokens: tokens a step, null for a default by device; halved when memory runs out. Changes speed and memory only.
    """

    steps: int = 20
    lr: float = 0.5
    weight_decay: float = 0.5
    clamp_norm_factor: float = 0.75
    kl_factor: float = 0.0625
    kl_prompt: str = "{} is a"
    kl_position: str = "subject"
    stop_loss: float = 0.05
    batch_tokens: int | None = None


@dataclass
class Values:
    """Targets v_0 + δ and where they started, (d, n) float32; final loss and number of forward passes of each edit."""

    target: Tensor
    initial: Tensor
    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Task:
    """Rows of one edit, its contexts and last the KL row, with the target ids of each context."""

    spans: list[Span]
    targets: list[tuple[int, ...]]

    @property
    def tokens(self) -> int:
        """Tokens that are run anew at every step."""
        return sum(len(span.ids) - span.start for span in self.spans)


def optimise_values(lm: LM, requests: Sequence[EditRequest], layer: int, site: Site, options: ValueOptions, contexts: Contexts) -> Values:
    """Target states of every request at `site` of `layer`: the block's output (MEMIT) or the MLP projection's (ROME).

    Raises:
        OutOfMemory: a single edit does not fit.
    """
    with lm.monitor.phase("value"), lm.monitor.task("optimising values", len(requests)) as advance:
        tasks = _tasks(lm, requests, options, contexts)
        rows, positions = rows_in_contexts(lm, requests, BARE, with_target=False)
        module = lm.layout.block(layer) if site == "block" else lm.layout.mlp_out(layer)
        (initial,) = read(lm, rows, positions, [Tap(module, "output")])
        search = _Search(lm, tasks, layer, site, options, initial)
        while search.unfinished:
            advance(search.step())
    target = (initial + search.shift).T.contiguous()
    return Values(target, initial.T.contiguous(), search.losses, search.steps)


def _tasks(lm: LM, requests: Sequence[EditRequest], options: ValueOptions, contexts: Contexts) -> list[_Task]:
    if options.kl_position not in ("subject", "last"):
        raise UsageError(f"method.value.kl_position={options.kl_position}: choose subject or last")
    if options.kl_prompt.count("{}") != 1:
        raise UsageError("method.value.kl_prompt must hold the slot {} once")
    rows, lookup = rows_in_contexts(lm, requests, contexts, with_target=True)
    kl_requests = [EditRequest(options.kl_prompt, request.subject, "") for request in requests]
    kl_rows, kl_lookup = rows_in_contexts(lm, kl_requests, BARE, with_target=False)
    each, tasks = len(contexts.texts), []
    for edit, (kl_row, kl_at) in enumerate(zip(kl_rows, kl_lookup, strict=True)):
        mine = slice(edit * each, (edit + 1) * each)
        spans = [Span(r.ids[:-1], at, tuple(range(r.start - 1, len(r.ids) - 1))) for r, at in zip(rows[mine], lookup[mine], strict=True)]
        kl_wanted = kl_at if options.kl_position == "subject" else len(kl_row.ids) - 1
        spans.append(Span(kl_row.ids[: kl_wanted + 1], kl_at, (kl_wanted,)))
        tasks.append(_Task(spans, [row.target for row in rows[mine]]))
    return tasks


class _Search:
    """Adam over all edits. `batch` holds those at work, `waiting` is the queue, alike in length beside each other."""

    def __init__(self, lm: LM, tasks: Sequence[_Task], layer: int, site: Site, options: ValueOptions, initial: Tensor) -> None:
        self.lm, self.tasks, self.options = lm, tasks, options
        self.frozen = layer if site == "block" else layer - 1
        self.module = None if site == "block" else lm.layout.mlp_out(layer)
        self.initial_norm = initial.norm(dim=1)
        self.shift = torch.zeros_like(initial)
        self.momentum, self.variance = torch.zeros_like(initial), torch.zeros_like(initial)
        self.losses, self.steps = [0.0] * len(tasks), [0] * len(tasks)
        self.budget = options.batch_tokens or (16384 if lm.device.type == "cuda" else 256)
        self.waiting = deque(sorted(range(len(tasks)), key=lambda i: (tasks[i].tokens, i)))
        self.batch: _Batch | None = None
        self.reuse_prefix: bool | None = None  # not known until tried

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.batch)

    def step(self) -> int:
        """One forward and backward pass over the batch; the number of edits that are done with it."""
        try:
            self._fill()
            edits = self.batch.edits
            shift = self.shift[edits].requires_grad_()
            loss = self.batch.losses(shift, self)
            values = loss.detach().tolist()
            going = [row for row, edit in enumerate(edits) if self._goes_on(edit, values[row])]
            gradient = torch.autograd.grad(loss.sum(), shift)[0][going] if going else None
        except torch.OutOfMemoryError:
            self._halve()
            return 0
        for edit, value in zip(edits, values, strict=True):
            self.losses[edit] = value
            self.steps[edit] += 1
        if going:
            self._update([edits[row] for row in going], gradient)
        if len(going) < len(edits):
            self.batch = self.batch.select(going) if going else None
        return len(edits) - len(going)

    def _goes_on(self, edit: int, loss: float) -> bool:
        return loss >= self.options.stop_loss and self.steps[edit] + 1 < self.options.steps

    def _fill(self) -> None:
        """Let edits from the queue take free places, once half of the batch is free."""
        held = self.batch.tokens if self.batch else 0
        if not self.waiting or held > self.budget // 2:
            return
        edits: list[int] = []
        while self.waiting and (not (held or edits) or held + self.tasks[self.waiting[0]].tokens <= self.budget):
            edits.append(self.waiting.popleft())
            held += self.tasks[edits[-1]].tokens
        if edits:
            try:
                fresh = self._build(edits)
            except torch.OutOfMemoryError:
                self.waiting.extendleft(reversed(edits))
                raise
            self.batch = self.batch.join(fresh) if self.batch else fresh

    def _build(self, edits: list[int]) -> _Batch:
        if self.reuse_prefix is None:
            batch = _Batch.of(self, edits, True)
            self.reuse_prefix = batch.takes_prefix(self)
            if self.reuse_prefix:
                return batch
            self.lm.monitor.note(f"{self.lm.name} does not take a cached prefix as it is: whole rows are run instead (slower, the same values)")
        return _Batch.of(self, edits, self.reuse_prefix)

    def _halve(self) -> None:
        """Go on with half of the batch after running out of memory; a step that was not finished is made again."""
        edits = self.batch.edits if self.batch else []
        if len(edits) == 1 or (not edits and self.budget <= 1):
            raise OutOfMemory("one edit alone does not fit into memory: take fewer or shorter prefixes (method.context) or a smaller model.dtype")
        self.budget = max(self.budget // 2, 1)
        if edits:
            half = len(edits) // 2
            self.waiting.extendleft(reversed(edits[half:]))
            self.batch = self.batch.select(list(range(half)))
        torch.cuda.empty_cache()

    def _update(self, edits: list[int], gradient: Tensor) -> None:
        """Adam with its default betas and an own step count for every edit, then the clamp."""
        count = torch.tensor([self.steps[i] for i in edits], dtype=gradient.dtype, device=gradient.device)[:, None]
        momentum = 0.9 * self.momentum[edits] + 0.1 * gradient
        variance = 0.999 * self.variance[edits] + 0.001 * gradient.square()
        scale = (variance / (1 - 0.999**count)).sqrt() + 1e-8
        shift = self.shift[edits] - self.options.lr * momentum / (1 - 0.9**count) / scale
        limit = self.options.clamp_norm_factor * self.initial_norm[edits]
        self.shift[edits] = shift * (limit / shift.norm(dim=1).clamp_min(1e-30)).clamp(max=1.0)[:, None]
        self.momentum[edits], self.variance[edits] = momentum, variance


@dataclass
class _Batch:
    """Some edits, their rows with the constant part computed, and which logits belong to what."""

    edits: list[int]
    tasks: list[_Task]
    passes: Resumption

    @classmethod
    def of(cls, search: _Search, edits: list[int], reuse_prefix: bool) -> _Batch:
        tasks = [search.tasks[i] for i in edits]
        return cls(edits, tasks, Resumption(search.lm, [span for task in tasks for span in task.spans], search.frozen, reuse_prefix))

    def __post_init__(self) -> None:
        device = self.passes.ids.device
        labels, share, label_owner, label_at, kl_at, position = [], [], [], [], [], 0
        for number, task in enumerate(self.tasks):
            for target in task.targets:
                labels += target
                share += [1.0 / len(target) / len(task.targets)] * len(target)
                label_owner += [number] * len(target)
                label_at += range(position, position + len(target))
                position += len(target)
            kl_at.append(position)
            position += 1
        self.labels, self.label_owner, self.label_at, self.kl_at = (
            torch.tensor(values, device=device) for values in (labels, label_owner, label_at, kl_at)
        )
        self.share = torch.tensor(share, dtype=self.passes.base.dtype, device=device)
        self.owner = torch.tensor([n for n, task in enumerate(self.tasks) for _ in task.spans], device=device)
        self.reference = self.passes.base[self.kl_at].log_softmax(-1)

    @property
    def tokens(self) -> int:
        return sum(task.tokens for task in self.tasks)

    def select(self, keep: list[int]) -> _Batch:
        """Only the edits at these places."""
        rows = torch.isin(self.owner, torch.tensor(keep, device=self.owner.device)).nonzero()[:, 0]
        return _Batch([self.edits[i] for i in keep], [self.tasks[i] for i in keep], self.passes.select(rows))

    def join(self, other: _Batch) -> _Batch:
        return _Batch(self.edits + other.edits, self.tasks + other.tasks, self.passes.join(other.passes))

    def takes_prefix(self, search: _Search) -> bool:
        with torch.no_grad():
            return self.passes.agrees(self.passes.logits(lambda states, rows, columns: states, search.module))

    def losses(self, shift: Tensor, search: _Search) -> Tensor:
        """Loss of every edit (n,) for its shift (n, d)."""
        options = search.options

        def add(states: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
            moved = states.clone()
            moved[rows, columns] += shift[self.owner].to(states)
            return moved

        logits = self.passes.logits(add, search.module)
        losses = torch.nn.functional.cross_entropy(logits[self.label_at], self.labels, reduction="none") * self.share
        nll = torch.zeros_like(shift[:, 0]).index_add(0, self.label_owner, losses)
        kl = logits[self.kl_at].log_softmax(-1)
        divergence = (kl.exp() * (kl - self.reference)).sum(-1)
        decay = shift.norm(dim=1) / search.initial_norm[self.edits] ** 2
        return nll + options.kl_factor * divergence + options.weight_decay * decay
