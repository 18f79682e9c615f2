"""How far other wordings of a fact lie from it, and how far other facts: what the radius of a memory has to come
between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edit_cli.editors.memory.base import module_of
from edit_cli.lm.model import LM
from edit_cli.lm.reading import HookPoint, read

Side = Literal["input", "output"]  # of a module, where keys are read


@dataclass(frozen=True)
class Separation:
    """Distances at one place. reworded: (n,) of other wordings from their fact; others: (m,) of other facts from it."""

    layer: int
    module: str
    side: Side
    norm: float
    reworded: Tensor
    others: Tensor

    @property
    def auc(self) -> float:
        """Chance that another wording lies nearer than another fact."""
        ranks = torch.cat([self.reworded, self.others]).argsort().argsort().double() + 1
        n, m = len(self.reworded), len(self.others)
        return float(1 - (ranks[:n].sum() - n * (n + 1) / 2) / (n * m))

    @property
    def radius(self) -> float:
        """Where the share of other wordings within it, less that of other facts within twice of it, is largest.

        Twice, because balls of two keys that touch are joined or split.
        """
        candidates = torch.cat([self.reworded, self.others / 2]).sort().values
        served = torch.searchsorted(self.reworded.sort().values, candidates, right=True) / len(self.reworded)
        harmed = torch.searchsorted((self.others / 2).sort().values, candidates, right=True) / len(self.others)
        return float(candidates[int((served - harmed).argmax())])


def separation(
    lm: LM,
    facts: Sequence[str],
    reworded: Sequence[Sequence[str]],
    others: Sequence[Sequence[str]],
    layer: int,
    part: str,
    side: Side,
) -> Separation:
    """Of keys at a module's input or output (side), at the last token of each prompt.

    reworded, others: prompts for each fact.

    Raises:
        UsageError: the layer has no module of that name.
    """
    point = HookPoint(module_of(lm, layer, part, "modules"), side)

    def keys(prompts: Sequence[str]) -> Tensor:
        rows = lm.head.encode([(prompt, None) for prompt in prompts])
        return read(lm, rows, [len(row.ids) - 1 for row in rows], [point])[0].float()

    own = keys(facts)
    distances = []
    for groups in (reworded, others):
        owner = torch.tensor([number for number, group in enumerate(groups) for _ in group])
        distances.append((keys([prompt for group in groups for prompt in group]) - own[owner]).norm(dim=1).cpu())
    return Separation(layer, part, side, float(own.norm(dim=1).mean()), *distances)
