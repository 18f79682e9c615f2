"""Some edits of a value optimization at work: their rows, with the constant part computed, and what is scored on
them.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor

from edit_cli.config.schema import Config, Count, FilePath, Linked, NonNegative, Positive
from edit_cli.errors import UsageError
from edit_cli.lm.fast.suffix_pass import SuffixForward, SuffixRow
from edit_cli.lm.hooks import on_output
from edit_cli.lm.model import LM


@dataclass(frozen=True, kw_only=True)
class ValueConfig(Config):
    """Settings of the optimization (locate-then-edit, sections 7, 9, 11 and 14)."""

    place = "method.value"

    steps: Count = 20
    """Forward passes; one update fewer."""
    lr: Positive = 0.5
    """Learning rate of Adam."""
    weight_decay: NonNegative = 0.5
    """Times ‖δ‖ / ‖v_0‖²."""
    clamp_norm_factor: Positive = 0.75
    """‖δ‖ stays below this multiple of ‖v_0‖."""
    kl_factor: NonNegative = 0.0625
    """Keeps what the model says of `kl_prompt`."""
    kl_prompt: str = "{} is a"
    """The prompt about the subject whose answer stays."""
    kl_position: Literal["subject", "last"] = "subject"
    """Where its answer is read: at the subject's last token, as released, or at the prompt's, as the paper words it."""
    stop_loss: NonNegative = 0.05
    """An edit whose loss is below it is done (tested before the update)."""
    mpes: Count | None = None
    """ENCORE's early stop: an edit is done after so many passes in which every target token was the likeliest, in every
    context."""
    settle_kl: NonNegative | None = None
    """PMET's: once every target token is the likeliest, an edit is done if its KL term is at most this."""
    settle_nll: NonNegative = 0.1
    """PMET's: how often the NLL then counts, from the next pass on."""
    batch_tokens: Count | None = None
    """Tokens a step; null: by device, halved when memory runs out. Changes speed and memory only."""
    reuse: bool = False
    """Take values of the unedited model that an earlier run has found in the same way, and keep those that are found
    now. The same but for rounding, which hangs on the facts that are searched together."""
    cache_dir: Annotated[FilePath, Linked("${cache_dir}/values")] = "~/.cache/edit-cli/values"
    """Where they are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_prompt.count("{}") != 1:
            raise UsageError("method.value.kl_prompt must hold the slot {} once")

    @property
    def watches_hits(self) -> bool:
        """Whether it matters which target tokens are the likeliest."""
        return self.mpes is not None or self.settle_kl is not None


@dataclass(frozen=True)
class Task:
    """Rows of one edit, its contexts and last the KL row, with the target ids of each context."""

    suffixes: list[SuffixRow]
    targets: list[tuple[int, ...]]

    @property
    def tokens(self) -> int:
        """Tokens that are run anew at every step."""
        return sum(len(suffix.ids) - suffix.start for suffix in self.suffixes)


class Change(Protocol):
    """What leaves a module, changed at (rows, columns). place: of the module among those of a `Batch`."""

    def __call__(self, states: Tensor, rows: Tensor, columns: Tensor, place: int) -> Tensor: ...


@dataclass(frozen=True)
class Scores:
    """Loss (n,) of every edit, with its graph; its KL term; whether every target token was the likeliest (if that
    matters).
    """

    loss: Tensor
    kl_term: Tensor
    hit: Tensor


@dataclass
class Batch:
    """Edits at work (numbers in the search), and which logits of their rows belong to what.

    modules: to whose outputs shifts are added; None is the last frozen block.
    """

    edits: list[int]
    tasks: list[Task]
    passes: SuffixForward
    modules: list[str | None]

    @classmethod
    def of(
        cls, lm: LM, edits: list[int], tasks: list[Task], frozen: int, modules: list[str | None], shortcuts: bool
    ) -> Batch:
        """shortcuts: earlier tokens are kept as a cached prefix, common beginnings run once, and MLPs see only
        tokens that matter.
        """
        prune_from = frozen + (1 if modules == [None] else 2)
        suffixes = [suffix for task in tasks for suffix in task.suffixes]
        return cls(
            edits, tasks, SuffixForward(lm, suffixes, frozen, shortcuts, prune_from if shortcuts else None), modules
        )

    def __post_init__(self) -> None:
        device = self.passes.ids.device
        labels: list[int] = []
        label_at: list[int] = []
        share, label_owner, kl_at, position = [], [], [], 0
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
        self.owner = torch.tensor([n for n, task in enumerate(self.tasks) for _ in task.suffixes], device=device)
        self.reference = self.passes.base[self.kl_at].log_softmax(-1)

    @property
    def tokens(self) -> int:
        return sum(task.tokens for task in self.tasks)

    def select(self, keep: list[int]) -> Batch:
        """Only the edits at these places."""
        rows = torch.isin(self.owner, torch.tensor(keep, device=self.owner.device)).nonzero()[:, 0]
        return Batch(
            [self.edits[i] for i in keep], [self.tasks[i] for i in keep], self.passes.select(rows), self.modules
        )

    def join(self, other: Batch) -> Batch:
        return Batch(self.edits + other.edits, self.tasks + other.tasks, self.passes.join(other.passes), self.modules)

    def takes_shortcuts(self) -> bool:
        """Whether logits are those of whole rows."""
        with torch.no_grad():
            return self.passes.agrees(self._logits(lambda states, rows, columns, place: states))

    def _logits(self, change: Change) -> Tensor:
        """Logits after `change(states, rows, columns, place)` of what leaves each of `modules` at the rows' starts."""
        at = self.passes.at
        rows = torch.arange(len(at), device=at.device)
        with ExitStack() as stack:
            for place, name in enumerate(self.modules[1:], start=1):
                assert name is not None  # only the first may be the last frozen block
                here = partial(change, rows=rows, columns=at, place=place)
                stack.enter_context(on_output(self.passes.lm.module(name), here, len(rows)))
            return self.passes.logits(partial(change, place=0), self.modules[0])

    def scores(self, shift: Tensor, nll_factor: Tensor, initial_norm: Tensor, options: ValueConfig) -> Scores:
        """Of every edit, for its shift (n, modules, d); its NLL counts `nll_factor` (n,) times; initial_norm: ‖v_0‖
        (n, modules).
        """

        def add(states: Tensor, rows: Tensor, columns: Tensor, place: int) -> Tensor:
            moved = states.clone()
            moved[rows.to(states.device), columns.to(states.device)] += shift[self.owner, place].to(states)
            return moved

        logits = self._logits(add)
        labeled = logits[self.label_at]
        losses = torch.nn.functional.cross_entropy(labeled, self.labels, reduction="none") * self.share
        nll = torch.zeros_like(shift[:, 0, 0]).index_add(0, self.label_owner, losses)
        kl = logits[self.kl_at].log_softmax(-1)
        kl_term = options.kl_factor * (kl.exp() * (kl - self.reference)).sum(-1)
        decay = (shift.norm(dim=-1) / initial_norm**2).sum(-1)
        hit = torch.zeros_like(nll, dtype=torch.bool)
        if options.watches_hits:
            missed = (labeled.argmax(-1) != self.labels).to(nll)
            hit = torch.zeros_like(nll).index_add(0, self.label_owner, missed) == 0
        return Scores(nll_factor * nll + kl_term + options.weight_decay * decay, kl_term.detach(), hit)
