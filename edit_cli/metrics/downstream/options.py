"""Which tasks are asked. Imports nothing heavy: help and completion read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from edit_cli.config.schema import Config, Count, FilePath, Mark, Natural, Such


@dataclass(frozen=True, kw_only=True)
class DownstreamOptions(Config):
    """General ability, beside what is asked about the facts."""

    downstream: Annotated[list[str], Mark.DISTINCT, Such(("world_choice", "hellaswag", "arc_easy", "mmlu"))] = field(
        default_factory=list
    )
    """Tasks of lm-evaluation-harness, such as hellaswag, that are asked before and after (docs/downstream.md);
    world_choice is of the embedded world."""
    downstream_path: FilePath | None = None
    """A folder with tasks of yours. It is code: lm-evaluation-harness runs what its files name."""
    downstream_limit: Count | None = None
    """Items of each task at most; null: all."""
    downstream_shots: Natural | None = None
    """Examples before each item; null: as many as the task says."""
