"""Sampling with one seed a row; for `model.generate`, that and the stop at a line break, without the model's own
settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria


def likeliest(logits: Tensor, rows: Sequence[int], written: Sequence[int]) -> Tensor:
    """The next token (rows,) of greedy search."""
    return logits.float().argmax(-1)


class TopKDraws:
    """Top-k sampling in which every row has its own random numbers.

    Gumbel-max: the arg-max of log-probabilities plus Gumbel noise is a draw from their softmax, so the likeliest token
    of the perturbed top k is an exact sample, and a row's draws depend on its seed alone.

    Args:
        seeds: one a row. steps: the most tokens of each row. top_k: how many of the likeliest tokens are drawn from.
    """

    def __init__(self, seeds: Sequence[int], steps: Sequence[int], top_k: int) -> None:
        self.noise = torch.zeros(len(seeds), max(steps, default=0), top_k)
        for row, (seed, count) in enumerate(zip(seeds, steps, strict=True)):
            drawn = np.random.Generator(np.random.Philox(seed)).gumbel(size=(count, top_k))
            self.noise[row, :count] = torch.from_numpy(drawn).float()

    def __call__(self, logits: Tensor, rows: Sequence[int], written: Sequence[int]) -> Tensor:
        """The next token (rows,) of the rows with these numbers, which have written so many each."""
        step = torch.tensor(written).clamp(max=self.noise.shape[1] - 1)  # beyond are rows that are over
        noise = self.noise[torch.tensor(rows), step].to(logits.device)
        top = logits.float().topk(min(noise.shape[1], logits.shape[1]), dim=-1)
        choice = (top.values + noise[:, : top.values.shape[1]]).argmax(-1, keepdim=True)
        return top.indices.gather(1, choice)[:, 0]


class Drawn(LogitsProcessor):
    """Makes greedy search write what was drawn."""

    def __init__(self, draws: TopKDraws, rows: Sequence[int]) -> None:
        self.draws, self.rows, self.step = draws, list(rows), 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self.draws(scores, self.rows, [self.step] * len(self.rows))
        self.step += 1
        return torch.full_like(scores, -float("inf")).scatter(1, chosen[:, None], 0.0)


class StopAtNewline(StoppingCriteria):
    """A row is done once its continuation holds a line break."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        last = self.tokenizer.batch_decode(input_ids[:, -1:].tolist())
        return torch.tensor(["\n" in text for text in last], device=input_ids.device)


@contextmanager
def without_defaults(model: Any) -> Iterator[None]:
    """`generate` fills what it is not told from the model's own settings: chat models come with a repetition
    penalty, say.
    """
    from transformers import GenerationConfig

    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept
