"""How the model's next-token distributions look where answers must stay: the numbers that a KL divergence needs, and no
more.

A distribution has as many entries as the vocabulary. Of the unedited model the likeliest tokens are kept, of the edited
one what it gives to the same tokens; all others count as one. The KL divergence of that coarser pair is never larger
than the true one, and equal to it where the rest keeps its proportions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 64  # pairs a call: whole distributions are in memory
ENOUGH = 0.999  # of the probability: tokens beyond it are not kept
DIGITS = 5
ROUNDING = 10.0**-DIGITS

Ids = Sequence[Sequence[int]]  # for every target position, the tokens that are watched
Top = dict[str, list[list[Any]]]  # {"ids": …, "logprobs": …}, both by target position


def likeliest(logprobs: Tensor, most: int) -> Ids:
    """The tokens of every position of (positions, vocabulary) that hold ENOUGH of the probability, at most `most`."""
    values, ids = logprobs.topk(min(most, logprobs.shape[-1]))
    needed = (values.exp().cumsum(-1) < ENOUGH).sum(-1) + 1
    return [sorted(row[:count]) for row, count in zip(ids.tolist(), needed.tolist(), strict=True)]


def watch(logprobs: Tensor, most: int, ids: Ids | None = None) -> Top:
    """What (positions, vocabulary) says of `ids`, or of its own likeliest tokens."""
    ids = likeliest(logprobs, most) if ids is None or len(ids) != len(logprobs) else ids
    found = [[_short(value) for value in row[list(some)].tolist()] for row, some in zip(logprobs, ids, strict=True)]
    return {"ids": [list(some) for some in ids], "logprobs": found}


def _short(value: float) -> float | None:
    return round(value, DIGITS) if math.isfinite(value) else None


def divergence(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    """Mean over target positions of KL(before ‖ after), nats, over the tokens that both watch and all others taken
    together.

    Infinite where the edited model gives nothing to what the unedited one says. None where the two do not fit together.
    """
    positions = list(zip(before["ids"], before["logprobs"], after["ids"], after["logprobs"], strict=False))
    if not positions or len(before["ids"]) != len(after["ids"]):
        return None
    return math.fsum(
        _position(dict(zip(i, p, strict=True)), dict(zip(j, q, strict=True))) for i, p, j, q in positions
    ) / len(positions)


def _position(before: Mapping[int, float | None], after: Mapping[int, float | None]) -> float:
    """KL over the tokens of both sides and the rest, from {token: log-probability}; None stands for one that is not
    finite.
    """
    both = sorted(before.keys() & after.keys())
    pairs = [(now, after[token]) for token in both if (now := before[token]) is not None]
    terms = [math.inf if then is None else math.exp(now) * (now - then) for now, then in pairs]
    left = 1.0 - math.fsum(math.exp(now) for now, _ in pairs)
    kept = 1.0 - math.fsum(math.exp(then) for _, then in pairs if then is not None)
    if left > ROUNDING:  # else nothing but rounding is left
        terms.append(left * math.log(left / max(kept, ROUNDING)))
    return max(0.0, math.fsum(terms))
