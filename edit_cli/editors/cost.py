"""What an edit is going to take, told from settings and a model's outline alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Of editing one batch of facts.

    passes: tokens that go through all blocks once; a backward pass counts as two more. bytes: memory at its peak beside
    the model. of: what takes most of it, in words. steps: passes that follow one another.
    """

    passes: float
    steps: int
    bytes: int
    of: str
