"""THE tokenization rule of causal models (lm/heads/seq2seq.py and lm/heads/classifier.py have their own).

Prompt and target are tokenized once, together, and every index comes from character offsets: no
length arithmetic, so neither BOS tokens nor merges across the boundary can shift anything. What stands between the two
is told by `writing.answer`. Spaces at the end of a prompt go with what comes after it, as they do in tokens: a prompt
that is to be continued is cut before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.writing import answer, bare


@dataclass(frozen=True)
class Row:
    """One tokenized text. Target tokens are `ids[start:]`; `offsets` are the character ranges of all of them."""

    ids: tuple[int, ...]
    start: int
    offsets: tuple[tuple[int, int], ...]

    @property
    def target(self) -> tuple[int, ...]:
        return self.ids[self.start :]

    def token_at(self, character: int) -> int:
        """Index of the last token whose range covers `character` (a character may be split into several byte tokens).

        Raises:
            RejectedRequest: no token covers it (the tokenizer dropped it).
        """
        for index in range(len(self.offsets) - 1, -1, -1):
            begin, end = self.offsets[index]
            if begin <= character < end:
                return index
        raise RejectedRequest(f"no token covers character {character}; the tokenizer drops it")

    def until(self, index: int) -> Row:
        """The row cut after token `index`: by causality nothing later matters to what is read there."""
        return Row(self.ids[: index + 1], min(self.start, index + 1), self.offsets[: index + 1])


def tokenize(tokenizer: Any, pairs: Sequence[tuple[str, str | None]]) -> list[Row]:
    """Tokenize (prompt, target) pairs; a target of None gives a prompt alone.

    A token that reaches across the end of the prompt belongs to the target.

    Raises:
        RejectedRequest: a target that is empty or becomes no token, or only unknown ones.
        UsageError: a tokenizer without character offsets.
    """
    if not pairs:
        return []
    require_offsets(tokenizer)
    texts = []
    for prompt, target in pairs:
        if target is not None and not bare(target):
            raise RejectedRequest(f"target is empty for prompt {prompt!r}")
        texts.append(prompt.rstrip(" ") if target is None else prompt + answer(prompt, target))
    encoded = tokenizer(texts, return_offsets_mapping=True, return_special_tokens_mask=True, add_special_tokens=True)
    rows = []
    for index, (prompt, target) in enumerate(pairs):
        ids, offsets = list(encoded["input_ids"][index]), [tuple(pair) for pair in encoded["offset_mapping"][index]]
        special = encoded["special_tokens_mask"][index]
        while len(ids) > 1 and special[len(ids) - 1]:
            ids.pop()  # a closing EOS that some tokenizers add would have to be predicted as part of the answer
        rows.append(_row(tokenizer, tuple(ids), tuple(offsets[: len(ids)]), prompt, target))
    return rows


def require_offsets(tokenizer: Any) -> None:
    """Refuse a tokenizer without character offsets (UsageError)."""
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            "this model's tokenizer gives no character offsets (not a fast tokenizer); convert it to tokenizer.json"
        )


def _row(
    tokenizer: Any, ids: tuple[int, ...], offsets: tuple[tuple[int, int], ...], prompt: str, target: str | None
) -> Row:
    if target is None:
        return Row(ids, len(ids), offsets)
    said = len(prompt.rstrip(" "))
    start = next((i for i, (_, end) in enumerate(offsets) if end > said), len(ids))
    if start == len(ids):
        raise RejectedRequest(f"target {target!r} becomes no token")
    if start == 0:
        raise RejectedRequest(
            f"target {target!r} has no prompt token before it: the prompt is empty and the tokenizer adds no BOS"
        )
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown != tokenizer.eos_token_id and all(i == unknown for i in ids[start:]):
        raise RejectedRequest(f"target {target!r} is unknown to this tokenizer")
    return Row(ids, start, offsets)


def pad_right(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), both (rows, tokens).

    Right padding: indices count from the start, whatever else is in the batch.
    """
    return _pad(rows, pad, device, left=False)


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(ids, attention mask) for generation, which continues every row from the last column."""
    return _pad(rows, pad, device, left=True)


def _pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str, left: bool) -> tuple[Tensor, Tensor]:
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for index, row in enumerate(rows):
        columns = slice(length - len(row), length) if left else slice(0, len(row))
        ids[index, columns] = torch.tensor(row, dtype=torch.long)
        mask[index, columns] = 1
    return ids.to(device), mask.to(device)


def told(batches: Iterable[Any], done: Callable[[int], None], size: Callable[[Any], int] = len) -> Iterator[Any]:
    """The batches one after another; `done` hears how many rows each had, once it has been worked on."""
    for batch in batches:
        yield batch
        done(size(batch))


def by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches of similar length, each at most `budget` tokens including padding (never fewer than one
    row).
    """
    batches: list[list[int]] = []
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
