"""How facts are edited and asked about: fields == the keys of `protocol` in the commands' configurations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from edit_cli.editors.base import Method
from edit_cli.errors import UsageError
from edit_cli.metrics.observe import ObserveOptions
from edit_cli.requests import Case

MASS_BATCH = 100


@dataclass(kw_only=True)
class Protocol:
    """batch_size: facts edited together: a number, "all", or "auto" (100 for editors that are made for many facts, else
    1).

    order_seed: shuffles the facts before they are cut into batches; null keeps the order of the data.
    """

    batch_size: int | str = "auto"
    order_seed: int | None = None
    observe: ObserveOptions = field(default_factory=ObserveOptions)

    def __post_init__(self) -> None:
        number = isinstance(self.batch_size, int) and not isinstance(self.batch_size, bool)
        if (number and self.batch_size < 1) or (not number and self.batch_size not in ("auto", "all")):
            raise UsageError(f"protocol.batch_size={self.batch_size}: give a number from 1 up, all, or auto")

    def size(self, method: Method, count: int) -> int:
        """Facts a batch."""
        if self.batch_size == "all":
            return max(count, 1)
        if self.batch_size == "auto":
            return MASS_BATCH if method.editor.mass_editor else 1
        return int(self.batch_size)

    def batches(self, cases: Sequence[Case], method: Method) -> list[list[Case]]:
        """The cases in their order, cut into batches."""
        ordered = list(cases)
        if self.order_seed is not None:
            random.Random(self.order_seed).shuffle(ordered)
        size = self.size(method, len(ordered))
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]


@dataclass(kw_only=True)
class EvaluateProtocol(Protocol):
    """save_edits: keep every edit in the run directory."""

    save_edits: bool = False


@dataclass(kw_only=True)
class SequentialProtocol(Protocol):
    """Edits stay.

    checkpoints: numbers of facts after which all of them are asked about again; null: 1, 2, 4, 8, … and the last.

    sample: at checkpoints, ask about at most so many of the facts so far (a fixed random choice); null: all of them.
    sample_seed: of the choice. first: the first so many facts are asked about again at every checkpoint, whatever the
    sample.
    holdout: records that are never edited, whose neighbourhood prompts must keep their answers.
    collapse_below, collapse_perplexity: when a model counts as destroyed (see `metrics.sequence.collapse`);
    stop_on_collapse ends the run at the checkpoint that finds it so. edits_room: saved edits may take so many times the
    room of what they change; beyond that their sum is saved and the weights of earlier ones are let go. null: every
    edit is kept whole.
    """

    checkpoints: list[int] | None = None
    sample: int | None = 500
    sample_seed: int = 0
    first: int = 100
    holdout: int = 50
    collapse_below: float = 60.0
    collapse_perplexity: float = 2.0
    stop_on_collapse: bool = False
    edits_room: int | None = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("sample", 1), ("first", 0), ("holdout", 0), ("edits_room", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise UsageError(f"protocol.{name}={value}: give a whole number from {least} up")
        if self.checkpoints is not None and (not self.checkpoints or min(self.checkpoints) < 1):
            raise UsageError(
                f"protocol.checkpoints={self.checkpoints}: give numbers of facts from 1 up, such as [1, 10, 100]"
            )

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
