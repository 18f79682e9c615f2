"""What a module cannot see by itself: which tokens of the present forward pass are real, and where each row's prompt
ends.

Methods that decide once a prompt (is this one of mine?) need the state at its last token, be the row padded on the
right and followed by an answer that is scored, padded on the left, or continued token by token from cached keys and
values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edit_cli.lm.heads.seq2seq import Seq2SeqHead

if TYPE_CHECKING:
    from edit_cli.lm.model import LM


@dataclass(frozen=True)
class PromptPosition:
    """One forward pass. Columns count from the first token of the row, those of earlier passes included.

    mask: (rows, tokens) real tokens of this pass. ends: (rows,) column of the last token of each prompt. first: column
    at which this pass begins: 0, unless keys and values of earlier tokens are cached.
    """

    mask: Tensor
    ends: Tensor
    first: int

    @property
    def rows(self) -> int:
        return len(self.mask)

    @property
    def prompt(self) -> Tensor:
        """(rows, tokens) mask of the prompts' tokens in this pass."""
        columns = torch.arange(self.first, self.first + self.mask.shape[1], device=self.mask.device)
        return self.mask.bool() & (columns <= self.ends[:, None])


class PromptPositionTracker:
    """Knows where prompts end in the forward pass that is going on, in the stack that `module` belongs to.

    Where a prompt ends: in running text where the head says so, else with the text; in a decoder beside an encoder with
    what it is given before it writes; in a classifier that looks both ways at its first token, which its label is read
    from.
    """

    def __init__(self, lm: LM, module: str) -> None:
        self.head = lm.head
        self.position: PromptPosition = None  # type: ignore[assignment]  # there is none before the first pass
        stack = next(
            (stack for stack in lm.layout.stacks if module.startswith(f"{stack.blocks}.")), lm.layout.stacks[0]
        )
        paired = len(lm.layout.stacks) > 1
        root = getattr(lm.model, f"get_{stack.name}")() if paired else lm.model
        self.fixed: int | None = None
        if paired and stack.name == "decoder":
            assert isinstance(self.head, Seq2SeqHead)  # two stacks
            self.fixed = len(self.head.lead) - 1
        elif not paired and stack.name == "encoder":
            self.fixed = 0
        self.handle = root.register_forward_pre_hook(self._see, with_kwargs=True)
        self.head.trackers += 1

    def close(self) -> None:
        self.handle.remove()
        self.head.trackers -= 1

    def _see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = next(x for x in (kwargs.get("input_ids"), *args, kwargs.get("inputs_embeds")) if isinstance(x, Tensor))
        rows, tokens = ids.shape[:2]
        past: Any = kwargs.get("past_key_values")
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < tokens:
            earlier = past.get_seq_length() if hasattr(past, "get_seq_length") else 0
            mask = torch.ones(rows, earlier + tokens, dtype=torch.long, device=ids.device)
        ends = getattr(self.head, "prompt_ends", None)
        if self.fixed is not None:
            ends = torch.full((rows,), self.fixed, device=mask.device)
        elif ends is None or len(ends) != rows:
            ends = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        self.position = PromptPosition(mask[:, -tokens:], ends.to(mask.device), mask.shape[1] - tokens)
