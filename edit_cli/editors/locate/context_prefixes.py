"""Context prefixes: the same fact in a few contexts, so that keys and values do not hang on one wording.

They are part of an edit's identity: sampled from the unedited model with a seed, or given explicitly.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edit_cli.errors import UsageError
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import Row
from edit_cli.requests import EditRequest


@dataclass
class ContextOptions:
    """How prefixes are sampled (locate-then-edit, context prefixes).

    starts: words a prefix begins with; "" is the model's beginning-of-text token. lengths: tokens of a prefix, its
    start included; `per_start` prefixes for each length and start. top_k: sampled from the k likeliest tokens.
    weighting: "groups" — the bare prompt and each length count alike (MEMIT); "rows" — all contexts count alike (ROME).
    prefixes: given texts instead of sampled ones, one group; ". " and the prompt follow each, nothing else is changed.
    """

    starts: list[str] = field(default_factory=lambda: ["The", "Therefore", "Because", "I", "You"])
    lengths: list[int] = field(default_factory=lambda: [10])
    per_start: int = 1
    top_k: int = 5
    weighting: str = "groups"
    seed: int = 0
    prefixes: list[str] | None = None

    def __post_init__(self) -> None:
        if self.weighting not in ("groups", "rows"):
            raise UsageError(f"method.context.weighting={self.weighting}: choose groups or rows")

    def build(self, lm: LM) -> Contexts:
        """Sample from the unedited model (or take `prefixes`)."""
        if self.prefixes is not None:
            groups = [[f"{prefix}. " for prefix in self.prefixes]]
        else:
            with lm.monitor.phase("prefixes"), lm.pristine():
                groups = [self._sample(lm, length, number) for number, length in enumerate(self.lengths)]
        return Contexts([[""], *(group for group in groups if group)], self.weighting)

    def _sample(self, lm: LM, length: int, number: int) -> list[str]:
        beginning = "" if lm.tokenizer("")["input_ids"] else (lm.tokenizer.bos_token or lm.tokenizer.eos_token)
        starts = [start or beginning for start in self.starts for _ in range(self.per_start)]
        seeds = [self.seed * 1_000_003 + number * 1009 + i for i in range(len(starts))]
        texts = lm.head.sample(starts, seeds, length, self.top_k)
        return [f"{unicodedata.normalize('NFKD', ' '.join(text.split()))}. " for text in texts]


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
    """Tokenised rows, request by request and context by context, and the index of the subject's last token in each."""
    pairs, last = [], []
    for request in requests:
        _, end = request.subject_span
        for prefix in contexts.texts:
            pairs.append((prefix + request.text, request.target_new if with_target else None))
            last.append(len(prefix) + end - 1)
    rows = lm.head.encode(pairs)
    return rows, [row.token_at(character) for row, character in zip(rows, last, strict=True)]
