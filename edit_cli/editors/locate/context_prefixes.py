"""Context prefixes: the same fact in a few contexts, so that keys and values do not hang on one wording.

They are part of an edit's identity: sampled from the unedited model with a seed, or given explicitly.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Annotated, Literal

import torch
from torch import Tensor

from edit_cli.config.schema import Config, Count, Linked, Seed
from edit_cli.lm.chat import marks_turns
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import Row
from edit_cli.requests import EditRequest


@dataclass(frozen=True, kw_only=True)
class ContextConfig(Config):
    """How prefixes are sampled (locate-then-edit, context prefixes)."""

    place = "method.context"

    starts: list[str] = field(default_factory=lambda: ["The", "Therefore", "Because", "I", "You"])
    """Words that a prefix begins with; "" is the model's beginning-of-text token (of chat models see docs/chat.md)."""
    lengths: list[Count] = field(default_factory=lambda: [10])
    """Tokens of a prefix, its start included."""
    per_start: Count = 1
    """Prefixes for each length and start."""
    top_k: Count = 5
    """Each token is sampled from so many likeliest ones."""
    weighting: Literal["groups", "rows"] = "groups"
    """What counts alike in an averaged key: the bare prompt and each length (groups, MEMIT), or all contexts (rows,
    ROME)."""
    seed: Annotated[Seed, Linked("${seed}")] = 0
    """Of the sampling."""
    prefixes: list[str] | None = None
    """Texts to take instead of sampled ones, one group; ". " and the prompt follow each."""

    @property
    def count(self) -> int:
        """Prefixes, the empty one left out."""
        return len(self.starts) * self.per_start * len(self.lengths) if self.prefixes is None else len(self.prefixes)


def sample_contexts(lm: LM, config: ContextConfig) -> Contexts:
    """Prefixes sampled from the unedited model, or those that are given."""
    if config.prefixes is not None:
        groups = [[f"{prefix}. " for prefix in config.prefixes]]
    else:
        with lm.monitor.phase("prefixes"), lm.pristine():
            groups = [_sample(lm, config, length, number) for number, length in enumerate(config.lengths)]
    return Contexts([[""], *(group for group in groups if group)], config.weighting)


def _sample(lm: LM, config: ContextConfig, length: int, number: int) -> list[str]:
    beginning = "" if lm.tokenizer("")["input_ids"] else (lm.tokenizer.bos_token or lm.tokenizer.eos_token)
    starts = [start or beginning for start in config.starts for _ in range(config.per_start)]
    chats = marks_turns(lm.tokenizer, beginning)
    if chats:
        starts, length = _on_new_lines(starts, beginning), length + len(lm.tokenizer("\n")["input_ids"])
    seeds = [config.seed * 1_000_003 + number * 1009 + i for i in range(len(starts))]
    texts = lm.head.sample(starts, seeds, length, config.top_k)
    found = [f"{unicodedata.normalize('NFKD', ' '.join(text.split()))}. " for text in texts]
    return list(dict.fromkeys(found)) if chats else found


def _on_new_lines(starts: Sequence[str], beginning: str) -> list[str]:
    """Beginnings for a model whose beginning-of-text token is one that parts the turns of its chat template.

    What it writes after that token, or after a word that nothing stands before, is no text of its kind ("-on-the"). So
    an ordinary word takes the token's place, and each start stands on a line of its own.
    """
    ordinary = cycle(ContextConfig().starts)
    return [f"\n{next(ordinary) if start == beginning else start}" for start in starts]


@dataclass(frozen=True)
class Contexts:
    """Groups of texts that are put before a prompt; the first group is the bare prompt alone."""

    groups: list[list[str]]
    weighting: str

    @property
    def texts(self) -> list[str]:
        return [text for group in self.groups for text in group]

    @property
    def weights(self) -> Tensor:
        """Share of each context in an averaged key; sums to 1, float64."""
        if self.weighting == "rows":
            return torch.full((len(self.texts),), 1.0 / len(self.texts), dtype=torch.float64)
        return torch.tensor(
            [1.0 / len(self.groups) / len(group) for group in self.groups for _ in group], dtype=torch.float64
        )


BARE = Contexts([[""]], "rows")


def rows_in_contexts(
    lm: LM, requests: Sequence[EditRequest], contexts: Contexts, with_target: bool
) -> tuple[list[Row], list[int]]:
    """Tokenized rows, request by request and context by context, and the index of the subject's last token in each."""
    pairs, last = [], []
    for request in requests:
        _, end = request.subject_span
        for prefix in contexts.texts:
            pairs.append((request.in_context(prefix), request.target_new if with_target else None))
            last.append(len(prefix) + end - 1)
    rows = lm.head.encode(pairs)
    return rows, [row.token_at(character) for row, character in zip(rows, last, strict=True)]
