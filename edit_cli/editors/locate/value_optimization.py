"""Value optimization, shared by the locate-then-edit family and batched over edits.

For each edit i a shift δ_i is added to what leaves `site` at the subject's last token, and made to minimize

    L_i = mean over contexts of NLL(target)  +  kl · KL(P_δ ‖ P_0) at "{subject} is a"  +  decay · ‖δ_i‖ / ‖v_0‖²

Losses of different edits share nothing, so their sum optimizes each one alone: Adam is element-wise with a step count
an edit, clamping is per row, and an edit that is done leaves the batch (masking its gradient would let momentum move it
on) while one from the queue takes its place.

An edit is one fact, or several about one subject that share a shift (`groups`): then L_i is the mean over all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from edit_cli.editors.locate.context_prefixes import BARE, Contexts, rows_in_contexts
from edit_cli.editors.locate.value_batch import Batch, Task, ValueConfig
from edit_cli.editors.locate.value_store import Value, ValueStore
from edit_cli.errors import OutOfMemory
from edit_cli.files.tensors import Size, size
from edit_cli.lm.fast.suffix_pass import SuffixRow
from edit_cli.lm.layout import attention_out
from edit_cli.lm.model import LM
from edit_cli.lm.reading import HookPoint, read
from edit_cli.lm.tokenization import Row
from edit_cli.requests import EditRequest
from edit_cli.wording import many

Site = Literal["block", "mlp_out", "branches"]


@dataclass
class Values:
    """Targets v_0 + δ and where they started, (d, n) float32; final loss and number of forward passes of each edit, and
    whether it was good enough before its passes were used up. taken: whether an earlier run had found it, which is not
    kept with the rest.
    """

    target: Tensor
    initial: Tensor
    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    reached: list[bool] = field(default_factory=list)
    taken: list[bool] = field(default_factory=list)

    def of(self, number: int) -> Values:
        """Those of one edit."""
        one = slice(number, number + 1)
        told = (self.losses[one], self.steps[one], self.reached[one], self.taken[one])
        return Values(self.target[:, one], self.initial[:, one], *told)

    @classmethod
    def joined(cls, parts: Sequence[Values]) -> Values:
        """Those of several edits together."""
        target, initial = (torch.cat(each, dim=1) for each in zip(*((p.target, p.initial) for p in parts), strict=True))
        losses, steps, reached, taken = (
            [told for part in parts for told in getattr(part, name)] for name in ("losses", "steps", "reached", "taken")
        )
        return cls(target, initial, losses, steps, reached, taken)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, to be kept in a file."""
        told = {"losses": torch.float64, "steps": torch.int64, "reached": torch.int64}
        return {
            "target": self.target.cpu(),
            "initial": self.initial.cpu(),
            **{name: torch.tensor(getattr(self, name), dtype=dtype) for name, dtype in told.items()},
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Values:
        """What `tensors` made plain."""
        losses, steps, reached = (tensors[name].tolist() for name in ("losses", "steps", "reached"))
        return cls(tensors["target"].to(device), tensors["initial"].to(device), losses, steps, list(map(bool, reached)))

    @staticmethod
    def sizes(width: int, count: int) -> dict[str, Size]:
        """Of its tensors, for so many edits."""
        states, numbers = size(width, count), Size((count,), index=True)
        return {"target": states, "initial": states, "losses": size(count), "steps": numbers, "reached": numbers}


def shifted_modules(lm: LM, layer: int, site: Site) -> list[str]:
    """Modules to whose outputs a shift is added: the block (MEMIT), the MLP's projection (ROME), or this and the
    attention's (PMET).
    """
    if site == "block":
        return [lm.layout.block(layer)]
    mlp_out = lm.layout.mlp_out(layer)
    return [mlp_out] if site == "mlp_out" else [mlp_out, attention_out(lm.model, lm.layout, layer)]


def optimize_values(
    lm: LM,
    requests: Sequence[EditRequest],
    layer: int,
    site: Site,
    options: ValueConfig,
    contexts: Contexts,
    groups: Sequence[Sequence[int]] | None = None,
) -> Values:
    """Target states at `site` of `layer`, one a group of requests (null: one a request), that of the first of
    `shifted_modules`.

    groups: indices of requests that share one target; a group's first request is where it starts from.

    Raises:
        OutOfMemory: a single edit does not fit.
    """
    groups = groups or [[i] for i in range(len(requests))]
    with lm.monitor.phase("value"):
        tasks = _tasks(lm, requests, options, contexts, groups)
        rows, positions = rows_in_contexts(lm, [requests[group[0]] for group in groups], BARE, with_target=False)
        mine = lm.process_group.share(list(zip(tasks, rows, positions, strict=True)))
        found = lm.process_group.gather(_found(lm, mine, layer, site, options))
        target, initial, losses, steps, reached, taken = zip(*found, strict=True)
        ends, starts = (torch.stack(columns, dim=1).to(lm.device) for columns in (target, initial))
        return Values(ends, starts, list(losses), list(steps), list(reached), list(taken))


Part = tuple[Task, Row, int]  # an edit's task, and its bare prompt with the position of its subject


def _found(lm: LM, parts: Sequence[Part], layer: int, site: Site, options: ValueConfig) -> list[Value]:
    """The value of each part: of the unedited model those that are kept, if that is wanted, and others by a search."""
    if not options.reuse or lm.attached:
        return _search(lm, parts, layer, site, options)
    store = ValueStore(lm, layer, site, options)
    asked = [(asdict(task), row.ids, position) for task, row, position in parts]
    values = store.taken(asked)
    missing = [number for number, value in enumerate(values) if value is None]
    fresh = _search(lm, [parts[number] for number in missing], layer, site, options)
    store.keep([asked[number] for number in missing], fresh)
    looked_for = iter(fresh)
    return [value or next(looked_for) for value in values]


def _search(lm: LM, parts: Sequence[Part], layer: int, site: Site, options: ValueConfig) -> list[Value]:
    if not parts:
        return []
    tasks, rows, positions = zip(*parts, strict=True)
    modules = shifted_modules(lm, layer, site)
    initial = torch.stack(read(lm, rows, positions, [HookPoint(module, "output") for module in modules]), dim=1)
    places: list[str | None] = [None] if site == "block" else [*modules]
    search = _Search(lm, tasks, layer if site == "block" else layer - 1, places, options, initial)
    with lm.monitor.task(f"steps to {many(len(tasks), 'value')}", len(tasks) * options.steps) as advance:
        while search.unfinished:
            advance(search.step())
    target = initial + search.shift
    states = (target[:, 0].cpu(), initial[:, 0].cpu())
    return list(map(Value, *states, search.losses, search.steps, search.reached))


def _tasks(
    lm: LM,
    requests: Sequence[EditRequest],
    options: ValueConfig,
    contexts: Contexts,
    groups: Sequence[Sequence[int]] | None = None,
) -> list[Task]:
    groups = groups or [[i] for i in range(len(requests))]
    rows, lookup = rows_in_contexts(lm, requests, contexts, with_target=True)
    kl_requests = [EditRequest(options.kl_prompt, requests[group[0]].subject, "") for group in groups]
    kl_rows, kl_lookup = rows_in_contexts(lm, kl_requests, BARE, with_target=False)
    each, tasks = len(contexts.texts), []
    for group, kl_row, kl_at in zip(groups, kl_rows, kl_lookup, strict=True):
        mine = [index for request in group for index in range(request * each, (request + 1) * each)]
        suffixes = [
            SuffixRow(rows[i].ids[:-1], lookup[i], tuple(range(rows[i].start - 1, len(rows[i].ids) - 1))) for i in mine
        ]
        kl_wanted = kl_at if options.kl_position == "subject" else len(kl_row.ids) - 1
        suffixes.append(SuffixRow(kl_row.ids[: kl_wanted + 1], kl_at, (kl_wanted,)))
        tasks.append(Task(suffixes, [rows[i].target for i in mine]))
    return tasks


class _Search:
    """Adam over all edits. `batch` holds those at work, `waiting` is the queue, alike in length beside each other.

    shift, momentum, variance: (edits, modules, width).
    """

    def __init__(
        self,
        lm: LM,
        tasks: Sequence[Task],
        frozen: int,
        modules: list[str | None],
        options: ValueConfig,
        initial: Tensor,
    ) -> None:
        self.lm, self.tasks, self.options = lm, tasks, options
        self.frozen, self.modules = frozen, modules
        self.initial_norm = initial.norm(dim=-1)
        self.shift = torch.zeros_like(initial)
        self.momentum, self.variance = torch.zeros_like(initial), torch.zeros_like(initial)
        self.nll_factor = torch.ones_like(initial[:, 0, 0])
        self.losses, self.steps, self.hits = [0.0] * len(tasks), [0] * len(tasks), [0] * len(tasks)
        self.reached = [False] * len(tasks)
        self.budget = options.batch_tokens or (16384 if lm.device.type == "cuda" else 512)
        self.waiting = deque(sorted(range(len(tasks)), key=lambda i: (tasks[i].tokens, i)))
        self.batch: Batch | None = None
        self.shortcuts: bool | None = None  # not known until tried

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.batch)

    def step(self) -> int:
        """One forward and backward pass over the batch; by how many steps the end is nearer. Those that an edit which
        is done was spared count among them.
        """
        try:
            batch = self._filled()
            edits = batch.edits
            shift = self.shift[edits].requires_grad_()
            scores = batch.scores(shift, self.nll_factor[edits], self.initial_norm[edits], self.options)
            losses, terms, hits = scores.loss.tolist(), scores.kl_term.tolist(), scores.hit.tolist()
            reached = [self._reached(edit, *said) for edit, *said in zip(edits, losses, terms, hits, strict=True)]
            going = [
                row for row, edit in enumerate(edits) if not reached[row] and self.steps[edit] + 1 < self.options.steps
            ]
            gradient = torch.autograd.grad(scores.loss.sum(), shift)[0][going] if going else shift[:0]
        except torch.OutOfMemoryError:
            self._halve()
            return 0
        for edit, loss, hit, done in zip(edits, losses, hits, reached, strict=True):
            self.losses[edit], self.reached[edit] = loss, done
            self.steps[edit] += 1
            self.hits[edit] += hit
        if self.options.settle_kl is not None:
            self.nll_factor[edits] = torch.where(scores.hit, self.options.settle_nll, 1.0).to(self.nll_factor)
        if going:
            self._update([edits[row] for row in going], gradient)
        if len(going) < len(edits):
            self.batch = batch.select(going) if going else None
        spared = sum(self.options.steps - self.steps[edit] for row, edit in enumerate(edits) if reached[row])
        return len(edits) + spared

    def _reached(self, edit: int, loss: float, kl_term: float, hit: bool) -> bool:
        options = self.options
        often = options.mpes is not None and self.hits[edit] + hit >= options.mpes
        settled = hit and options.settle_kl is not None and kl_term <= options.settle_kl
        return bool(loss < options.stop_loss or often or settled)

    def _filled(self) -> Batch:
        """Let edits from the queue take free places, once half of the batch is free."""
        held = self.batch.tokens if self.batch else 0
        edits: list[int] = []
        room = held <= self.budget // 2
        while (
            room and self.waiting and (not (held or edits) or held + self.tasks[self.waiting[0]].tokens <= self.budget)
        ):
            edits.append(self.waiting.popleft())
            held += self.tasks[edits[-1]].tokens
        if edits:
            try:
                fresh = self._build(edits)
            except torch.OutOfMemoryError:
                self.waiting.extendleft(reversed(edits))
                raise
            self.batch = self.batch.join(fresh) if self.batch else fresh
        assert self.batch is not None  # a step is only asked for while edits are left
        return self.batch

    def _build(self, edits: list[int]) -> Batch:
        if self.shortcuts is None:
            batch = self._batch(edits, True)
            self.shortcuts = batch.takes_shortcuts()
            if self.shortcuts:
                return batch
            self.lm.monitor.note(
                f"{self.lm.name} does not take a cached prefix as it is: whole rows are run (slower, the same values)"
            )
        return self._batch(edits, self.shortcuts)

    def _batch(self, edits: list[int], shortcuts: bool) -> Batch:
        return Batch.of(self.lm, edits, [self.tasks[i] for i in edits], self.frozen, self.modules, shortcuts)

    def _halve(self) -> None:
        """Go on with half of the batch after running out of memory; a step that was not finished is made again."""
        batch = self.batch
        edits = batch.edits if batch else []
        if len(edits) == 1 or (not edits and self.budget <= 1):
            remedy = "take fewer or shorter prefixes (method.context) or a smaller model.dtype"
            raise OutOfMemory(f"one edit alone does not fit into memory: {remedy}")
        self.budget = max(self.budget // 2, 1)
        if batch:
            half = len(edits) // 2
            self.waiting.extendleft(reversed(edits[half:]))
            self.batch = batch.select(list(range(half)))
        torch.cuda.empty_cache()

    def _update(self, edits: list[int], gradient: Tensor) -> None:
        """Adam with its default betas and an own step count for every edit, then the clamp."""
        count = torch.tensor([self.steps[i] for i in edits], dtype=gradient.dtype, device=gradient.device)[
            :, None, None
        ]
        momentum = 0.9 * self.momentum[edits] + 0.1 * gradient
        variance = 0.999 * self.variance[edits] + 0.001 * gradient.square()
        scale = (variance / (1 - 0.999**count)).sqrt() + 1e-8
        shift = self.shift[edits] - self.options.lr * momentum / (1 - 0.9**count) / scale
        limit = self.options.clamp_norm_factor * self.initial_norm[edits]
        self.shift[edits] = shift * (limit / shift.norm(dim=-1).clamp_min(1e-30)).clamp(max=1.0)[..., None]
        self.momentum[edits], self.variance[edits] = momentum, variance
