"""Scores of answers, whatever the head, and what heads of models with an encoder share, whose answers stand apart
from their prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from edit_cli.errors import RejectedRequest
from edit_cli.lm.fast.edits_by_row import Meeting
from edit_cli.lm.tokenization import Row, by_length, require_offsets, told
from edit_cli.lm.vocabulary import Vocabulary

NEEDS_CAUSAL = "needs a causal language model"
R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class Likelihood:
    """Teacher-forced scores of one target after one prompt (datasets-and-metrics, scoring primitive).

    nll: mean negative log-likelihood per target token, nats, from float32 log-softmax.
    hits: per target token, whether it is the arg-max. predicted: the arg-max ids themselves.
    """

    nll: float
    hits: tuple[bool, ...]
    predicted: tuple[int, ...]


@dataclass(frozen=True)
class Answers:
    """Teacher-forced scores of rows' answers, differentiable.

    logits: (positions, classes), float32 or better. labels: (positions,) the right class. rows: (positions,) whose
    answer it is.
    """

    logits: Tensor
    labels: Tensor
    rows: Tensor


def encode_prompts(tokenizer: Any, prompts: Sequence[str], longest: int, vocabulary: Vocabulary) -> list[Row]:
    """Prompts as an encoder reads them: with the special tokens that its tokenizer puts around a text, but without
    spaces at their end.

    Raises:
        RejectedRequest: a prompt with more than `longest` tokens, or one beyond the `vocabulary`. UsageError: a
            tokenizer without character offsets.
    """
    if not prompts:
        return []
    require_offsets(tokenizer)
    encoded = tokenizer(
        [prompt.rstrip(" ") for prompt in prompts], return_offsets_mapping=True, add_special_tokens=True
    )
    rows = []
    for prompt, ids, offsets in zip(prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if len(ids) > longest:
            raise RejectedRequest(f"{len(ids)} tokens are more than the model's {longest}: {prompt[:60]!r}…")
        if not ids:
            raise RejectedRequest("the prompt is empty and the tokenizer adds no token to it")
        vocabulary.refuse(ids, prompt)
        rows.append(Row(tuple(ids), len(ids), tuple(tuple(pair) for pair in offsets)))
    return rows


@torch.no_grad()
def likelihoods(
    rows: Sequence[R],
    answers: Callable[[Sequence[R]], Answers],
    budget: int,
    done: Callable[[int], None],
    meeting: Meeting,
    edits: Sequence[int] | None,
) -> list[Likelihood]:
    """One `Likelihood` a row, in order; batches by length, at most `budget` tokens each. done: hears of them. edits:
    numbers of those that the rows meet.
    """
    scores: list[Likelihood | None] = [None] * len(rows)
    for batch in told(by_length([len(row.ids) + len(row.target) for row in rows], budget), done):
        with meeting(edits and [edits[i] for i in batch]):
            found = answers([rows[i] for i in batch])
        losses = (found.logits.logsumexp(-1) - found.logits.gather(1, found.labels[:, None])[:, 0]).cpu().tolist()
        best, position = found.logits.argmax(-1).cpu().tolist(), 0
        for index in batch:
            target = rows[index].target
            span = slice(position, position + len(target))
            hits = tuple(a == b for a, b in zip(best[span], target, strict=True))
            scores[index] = Likelihood(math.fsum(losses[span]) / len(target), hits, tuple(best[span]))
            position = span.stop
    return scores  # type: ignore[return-value]


@torch.no_grad()
def logprobs(
    rows: Sequence[R],
    answers: Callable[[Sequence[R]], Answers],
    budget: int,
    done: Callable[[int], None],
    meeting: Meeting,
    edits: Sequence[int] | None,
) -> list[Tensor | None]:
    """Log-probabilities (target tokens, classes), float32, of what could stand at each target token; one tensor a
    row, in order. edits: as in `likelihoods`.
    """
    found: list[Tensor | None] = [None] * len(rows)
    for batch in told(by_length([len(row.ids) + len(row.target) for row in rows], budget), done):
        with meeting(edits and [edits[i] for i in batch]):
            scores = answers([rows[i] for i in batch]).logits.float().log_softmax(-1)
        for index, part in zip(batch, scores.split([len(rows[i].target) for i in batch]), strict=True):
            found[index] = part
    return found


def longest_prompt(model: Any, tokenizer: Any) -> int:
    """Tokens that the encoder has positions for; where positions are relative, what the tokenizer was made for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return min(tokenizer.model_max_length, 4096)
    for name, module in model.named_modules():
        if (
            "position" in name.rpartition(".")[2]
            and isinstance(module, torch.nn.Embedding)
            and module.padding_idx is not None
        ):
            # such families count positions from there
            return min(positions, module.num_embeddings - module.padding_idx - 1)
    return positions
