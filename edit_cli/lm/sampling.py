"""What `model.generate` is given: sampling with one seed a row, the stop at a line break, and none of the model's
own settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria


class SeededTopK(LogitsProcessor):
    """Top-k sampling in which every row has its own random numbers.

    Gumbel-max: the arg-max of log-probabilities plus Gumbel noise is a draw from their softmax, so greedy search over
    the perturbed top k samples exactly, and a row's draws depend on its seed alone.
    """

    def __init__(self, seeds: Sequence[int], steps: int, top_k: int) -> None:
        noise = [np.random.Generator(np.random.Philox(seed)).gumbel(size=(steps, top_k)) for seed in seeds]
        self.noise = torch.from_numpy(np.stack(noise)).float()  # (rows, steps, k)
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = self.noise[:, self.step].to(scores.device)
        self.step += 1
        top = scores.float().topk(min(noise.shape[1], scores.shape[1]), dim=-1)
        choice = (top.values + noise[:, : top.values.shape[1]]).argmax(-1, keepdim=True)
        chosen = top.indices.gather(1, choice)
        return torch.full_like(scores, -float("inf")).scatter(1, chosen, 0.0)


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
