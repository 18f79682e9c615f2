"""Tokens that a tokenizer knows and its model has no embedding for: added ones, after which the model was not resized.

Asked about one, a model fails in the middle of a batch. They are looked for once, and what uses them is set apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from edit_cli.errors import RejectedRequest


@dataclass(frozen=True)
class Vocabulary:
    """size: embeddings of the model. strange: {id: text} of the tokens beyond them."""

    size: int
    strange: dict[int, str]

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Vocabulary:
        size = model.get_input_embeddings().weight.shape[0]
        added = {number: str(token) for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        known = range(size, getattr(tokenizer, "vocab_size", 0))  # rarely any: of most tokenizers no id is looked at
        own = dict(zip(known, tokenizer.convert_ids_to_tokens(list(known)), strict=True)) if known else {}
        return cls(size, {number: text for number, text in sorted((own | added).items()) if number >= size})

    def refuse(self, ids: Iterable[int], text: str) -> None:
        """Refuse the tokens of a text if the model has no embedding for one of them (RejectedRequest)."""
        found = next((token for token in ids if token in self.strange), None) if self.strange else None
        if found is not None:
            raise RejectedRequest(
                f"the model has no embedding for the token {self.strange[found]!r} ({found}) in {text[:60]!r}"
            )

    def readable(self, ids: Sequence[int]) -> list[int]:
        """The tokens of running text without those that the model has no embedding for."""
        return [token for token in ids if token not in self.strange] if self.strange else list(ids)

    def pad(self, *wanted: int | None) -> int:
        """The first of the wanted tokens that there is an embedding for, else 0: what is padded is not looked at."""
        return next((token for token in wanted if token is not None and token not in self.strange), 0)

    def __str__(self) -> str:
        """What is missing, for a note."""
        some = ", ".join(map(repr, list(self.strange.values())[:3]))
        count = f"{len(self.strange):,} token{'s' if len(self.strange) > 1 else ''}"
        return (
            f"its tokenizer has {count} ({some}{', …' if len(self.strange) > 3 else ''}) beyond"
            f" its {self.size:,} embeddings"
        )
