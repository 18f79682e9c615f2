"""How facts are edited and asked about. Imports nothing heavy: help and completion read it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Len

from edit_cli.config.schema import Count, Limit, Linked, Mark, Natural, NonNegative, Seed
from edit_cli.errors import UsageError
from edit_cli.lm.chat import ChatOptions
from edit_cli.metrics.downstream.options import DownstreamOptions
from edit_cli.metrics.observe import ObserveOptions
from edit_cli.monitor import Monitor
from edit_cli.requests import Case
from edit_cli.wording import many

if TYPE_CHECKING:
    from edit_cli.editors.base import Method

MASS_BATCH = 100


@dataclass(frozen=True, kw_only=True)
class Asked(ChatOptions):
    """Of commands that ask about all facts at once."""

    observe: ObserveOptions = field(default_factory=ObserveOptions)
    """What is asked of the model before and after an edit."""


@dataclass(frozen=True, kw_only=True)
class EditProtocol(Asked):
    """Of `edit`."""

    side_by_side = True

    observe: ObserveOptions = field(default_factory=lambda: ObserveOptions(sample=False))
    """What is asked of the model before and after the edit."""


@dataclass(frozen=True, kw_only=True)
class Protocol(Asked):
    """How facts come to be edited together."""

    batch_size: Count | Literal["all", "auto"] = "auto"
    """Facts edited together; auto: 100 for editors that are made for many facts, else 1."""
    order_seed: Seed | None = None
    """Shuffles the facts before they are cut into batches; null keeps the order of the data."""

    def size(self, method: Method, count: int) -> int:
        """Facts a batch."""
        if self.batch_size == "all":
            return max(count, 1)
        if self.batch_size == "auto":
            return MASS_BATCH if method.editor.mass_editor else 1
        return int(self.batch_size)

    def require_facts(self, count: int, monitor: Monitor) -> None:
        """Say that the last batch will be smaller than the others.

        Raises:
            UsageError: not even one batch can be filled, so that the results would be those of another size.
        """
        size = self.batch_size
        if isinstance(size, str):
            return
        if count < size:
            raise UsageError(
                f"protocol.batch_size={size}: {many(count, 'fact is', 'facts are')} selected, fewer than are to be"
                f" edited together; raise limit to {size} or more if there are as many, or give protocol.batch_size=all"
            )
        if rest := count % size:
            monitor.note(f"the last batch holds {many(rest, 'fact')}, the others {size} (protocol.batch_size)")

    def batches(self, cases: Sequence[Case], method: Method) -> list[list[Case]]:
        """The cases in their order, cut into batches."""
        ordered = list(cases)
        if self.order_seed is not None:
            random.Random(self.order_seed).shuffle(ordered)
        size = self.size(method, len(ordered))
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]


@dataclass(frozen=True, kw_only=True)
class EvaluateProtocol(DownstreamOptions, Protocol):
    """Of `evaluate`: every batch is taken back before the next one."""

    side_by_side = True

    save_edits: bool = False
    """Keep every edit in the run's directory."""


@dataclass(frozen=True, kw_only=True)
class TuningProtocol(Protocol):
    """Of `tune`: as `evaluate`, with each settings that are tried."""

    observe: ObserveOptions = field(
        default_factory=lambda: ObserveOptions(sample=False, max_new_tokens=8, top_tokens=0)
    )
    """What is asked of the model before and after an edit: what the objective counts."""
    perplexity_edits: Count = 5
    """Edits of a trial after which perplexity is measured, the first ones: each time a whole text is read."""


@dataclass(frozen=True, kw_only=True)
class SequentialProtocol(DownstreamOptions, Protocol):
    """One stream of facts whose edits stay. When a model counts as destroyed, `metrics.sequence.collapse` says."""

    batch_size: Count | Literal["all", "auto"] = 10
    """Facts a step; auto: 100 for editors that are made for many facts, else 1."""
    checkpoints: Annotated[list[Count], Len(1), Mark.DISTINCT] | None = None
    """After how many facts all of them are asked about again; null: 1, 2, 4, 8, … and the last."""
    sample: Count | None = 500
    """At checkpoints, ask about at most so many of the facts so far, a fixed random choice; null: all."""
    sample_seed: Annotated[Seed, Linked("${seed}")] = 0
    """Of that choice."""
    first: Natural = 100
    """The first so many facts are asked about at every checkpoint, whatever the sample (retention)."""
    holdout: Natural = 50
    """Records that are never edited, whose neighborhood prompts must keep their answers."""
    collapse_below: NonNegative = 60.0
    """A model is destroyed if the mean of efficacy, paraphrase and neighborhood success is below so many %."""
    collapse_perplexity: Limit = 2.0
    """A model is destroyed if its perplexity is so many times that of the unedited one; inf: whatever it is."""
    stop_on_collapse: bool = False
    """End the run at the checkpoint that finds the model destroyed (exit code 6); its results are kept."""
    edits_room: Count | None = 8
    """Saved edits may take so many times the room of what they change; beyond that their sum is kept. null: all."""
    observe: ObserveOptions = field(default_factory=lambda: ObserveOptions(sample=False))
    """What is asked of the model; texts at every checkpoint take long."""

    def checkpoint_steps(self, sizes: Sequence[int]) -> set[int]:
        """Steps after which everything is asked again: the first ones that reach each checkpoint, and the last.

        Raises:
            UsageError: a checkpoint that the facts do not reach.
        """
        done = list(accumulate(sizes))
        beyond = [number for number in self.checkpoints or [] if number > done[-1]]
        if beyond:
            raise UsageError(
                f"protocol.checkpoints: {beyond[0]:,} is beyond the {done[-1]:,} facts of this run; raise limit or"
                " leave it out"
            )
        wanted = self.checkpoints or [2**power for power in range(done[-1].bit_length())]
        return {
            next((step for step, count in enumerate(done) if count >= number), len(sizes) - 1) for number in wanted
        } | {len(sizes) - 1}
