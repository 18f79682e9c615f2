"""Scores of answers, whatever the head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

NEEDS_CAUSAL = "needs a causal language model"


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
