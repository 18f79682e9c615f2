"""How far edits have moved a model from where it was: norms of the weights they touched, and drift of its
activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edit_cli.errors import RejectedRequest
from edit_cli.lm.matrices import has_matrix
from edit_cli.lm.reading import HookPoint, read
from edit_cli.lm.tokenization import Row

if TYPE_CHECKING:
    from edit_cli.edits.edit import Edit
    from edit_cli.lm.model import LM

POWER_STEPS = 30


class Health:
    """Watches the weights of a sequence of edits. Made with the unedited model.

    prompts: what the drift of activations is measured on; it is None for models that have no one state a token to
    compare.
    """

    def __init__(self, lm: LM, prompts: Sequence[str]) -> None:
        self._original: dict[str, Tensor] = {}
        self._largest: dict[str, float] = {}  # singular value of the original
        self._rows: list[Row] = []
        for prompt in dict.fromkeys(prompts) if lm.head.has_tokens else ():
            with suppress(RejectedRequest):  # too long for this model
                self._rows += lm.head.encode([(prompt, None)])
        self._states = self._read(lm)

    def watch(self, lm: LM, edit: Edit) -> None:
        """Take note of what an edit is about to touch. Call it before the edit is attached."""
        for name in edit.touches(lm) if edit.kind == "weights" else ():
            module = name.removesuffix(".weight")
            # not the weights of norms
            if module == name or module in self._original:
                continue
            if len(lm.access(name).shape) == 2 or has_matrix(lm.module(module)):
                self._original[module] = lm.weight(module).detach().to("cpu", torch.float32, copy=True)

    @torch.no_grad()
    def measure(self, lm: LM) -> dict[str, Any]:
        """Of every matrix touched so far: ‖W‖/‖W_0‖ and ‖W − W_0‖/‖W_0‖ (Frobenius), and the largest singular value
        over that of W_0.

        drift: mean over the prompts of ‖h − h_0‖ / ‖h_0‖, the last token's state after the last block.
        """
        weights = {}
        for module, before in self._original.items():
            now = lm.weight(module).to("cpu", torch.float32)
            size = before.norm().clamp_min(1e-30)
            if module not in self._largest:
                self._largest[module] = max(largest_singular_value(before), 1e-30)
            weights[module] = {
                "norm": float(now.norm() / size),
                "change": float((now - before).norm() / size),
                "top_singular": largest_singular_value(now) / self._largest[module],
            }
        drift = None
        if (states := self._read(lm)) is not None and self._states is not None:
            moved = (states - self._states).norm(dim=1) / self._states.norm(dim=1).clamp_min(1e-30)
            drift = float(moved.mean())
        return {"weights": weights, "drift": drift}

    def _read(self, lm: LM) -> Tensor | None:
        if not self._rows:
            return None
        last = lm.layout.block(lm.layout.prompt_depth - 1)
        return read(lm, self._rows, [len(row.ids) - 1 for row in self._rows], [HookPoint(last, "output")])[0].cpu()


def largest_singular_value(matrix: Tensor) -> float:
    """By power iteration from a fixed start: ‖A‖₂ within a fraction of a percent, at the cost of a few products."""
    vector = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix)
    for _ in range(POWER_STEPS):
        vector = matrix.T @ (matrix @ vector)
        vector = vector / vector.norm().clamp_min(1e-30)
    return float((matrix @ vector).norm())
