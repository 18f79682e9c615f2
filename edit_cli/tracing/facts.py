"""A fact as the trace sees it: tokens of its prompt, which of them are the subject, and the expected answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edit_cli.errors import RejectedRequest
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest

ROLES = ("subject_first", "subject_middle", "subject_last", "after_subject", "further", "last")


@dataclass(frozen=True)
class Fact:
    """Prompt tokens `ids`, the subject's among them (begin, end), and the answer's first token.

    Tokens before the subject have no part in a trace: corruption does not reach them.
    """

    ids: tuple[int, ...]
    subject: tuple[int, int]
    answer: int

    @property
    def traced(self) -> range:
        return range(self.subject[0], len(self.ids))

    @property
    def roles(self) -> tuple[str, ...]:
        """What each traced token is, one role each.

        A subject of one token is `subject_last`; where the prompt ends with the subject,
        or one token after it, there is no `last` or no `after_subject`.
        """
        begin, end = self.subject

        def role(token: int) -> str:
            if token < end:
                return "subject_last" if token == end - 1 else "subject_first" if token == begin else "subject_middle"
            return "last" if token == len(self.ids) - 1 else "after_subject" if token == end else "further"

        return tuple(map(role, self.traced))


def tokenized(lm: LM, request: EditRequest) -> Fact:
    """The fact of a request, whose `target_true` is the expected answer. Prompt and answer are tokenized by THE rule.

    Raises:
        RejectedRequest: no subject, no expected answer, or a subject that becomes no token.
    """
    begin, end = request.subject_span
    if request.target_true is None:
        raise RejectedRequest("names no expected answer (target_true)")
    (row,) = lm.head.encode([(request.text, request.target_true)])
    inside = [index for index, (low, high) in enumerate(row.offsets[: row.start]) if low < end and begin < high]
    if not inside:
        raise RejectedRequest(f"subject {request.subject!r} becomes no token of the prompt")
    return Fact(row.ids[: row.start], (inside[0], inside[-1] + 1), row.ids[row.start])


def window_at(layer: int, size: int, depth: int) -> tuple[int, int]:
    """Layers (begin, end) of the window around `layer`: [ℓ − size/2, ℓ + size/2 − 1] for an even size, clipped."""
    return max(0, layer - size // 2), min(depth, layer + (size + 1) // 2)


@torch.no_grad()
def embedding_deviation(lm: LM, facts: Sequence[Fact]) -> float:
    """σ: standard deviation over all entries of the embeddings of all subjects' tokens, as they stand in their
    prompts.
    """
    ids = [token for fact in facts for token in fact.ids[slice(*fact.subject)]]
    return lm.model.get_input_embeddings()(torch.tensor(ids, device=lm.device)).double().std().item()
