"""Precise Model Editing in a Transformer (Li et al., 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from edit_cli.editors.locate.memit import MEMIT, MEMITConfig
from edit_cli.editors.locate.value_batch import ValueConfig
from edit_cli.editors.locate.value_optimization import Site


@dataclass(frozen=True, kw_only=True)
class PMETConfig(MEMITConfig):
    """As published, once a target is the likeliest only the KL term still matters."""

    value: ValueConfig = field(default_factory=lambda: ValueConfig(settle_kl=0.01))
    """The optimization of target values."""


class PMET(MEMIT[PMETConfig]):
    """The states that leave the attention and the MLP are optimized together, and only the MLP's is written.

    Targets live at the output of the last layer's MLP projection, not of its block; the attention's shift takes up what
    is none of the MLP's knowledge and is dropped.
    """

    Config = PMETConfig
    site: ClassVar[Site] = "branches"

    def share(self, residual: Tensor, left: int) -> Tensor:
        """Divided by the square root of the layers left: lower layers write more than an equal share."""
        return residual / math.sqrt(left)
