"""What heads of all kinds have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from edit_cli.lm.fast.edits_by_row import EditsByRow
from edit_cli.lm.vocabulary import Vocabulary


class BaseHead:
    """A model with its tokenizer. Every batch is built by length within a token budget.

    Attributes:
        PADDING: names of the tokenizer's tokens that rows are padded with, the first that the model can read.
        done: hears how far an answer has come (see `LM.telling`).
        trackers: number of modules that look at whole prompts.
        edits_by_row: what rows of a question that names `edits` meet.
    """

    PADDING: ClassVar[tuple[str, ...]] = ("pad_token_id", "eos_token_id")

    def __init__(self, model: nn.Module, tokenizer: Any, device: torch.device, batch_tokens: int) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.device = device
        self.batch_tokens = batch_tokens
        self.vocabulary = Vocabulary.of(model, tokenizer)
        self.pad = self.vocabulary.pad(*(getattr(tokenizer, name) for name in self.PADDING))
        self.done: Callable[[int], None] = lambda rows: None
        self.trackers = 0
        self.edits_by_row: EditsByRow | None = None

    def _stop_ids(self) -> list[int] | None:
        """Tokens after which a text that is written is over."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured, self.tokenizer.eos_token_id]
        return sorted({i for i in ids if i is not None}) or None

    def _decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text of `ids` up to the token that ends it, and of what stands before them."""
        stops = set(self._stop_ids() or ())
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        return self.tokenizer.decode([*after, *ids[:end]], skip_special_tokens=True, clean_up_tokenization_spaces=False)
