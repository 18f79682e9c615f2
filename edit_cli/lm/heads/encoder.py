"""What heads of models with an encoder share, whose answers stand apart from their prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.lm.fast.edits_by_row import meeting
from edit_cli.lm.heads.answers import NEEDS_CAUSAL, Likelihood
from edit_cli.lm.heads.base import Head, R
from edit_cli.lm.tokenization import Row, by_length, require_offsets, told


class EncoderHead(Head[R]):
    """Prompts are read by an encoder. Subclasses say what a target becomes (`encode`) and how it is scored
    (`answers`).

    NAME: what such a model is called.
    """

    NAME: ClassVar[str]
    caches_keys = False

    @cached_property
    def max_length(self) -> int:
        """Tokens that the encoder has positions for; where positions are relative, what the tokenizer was made for."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is None:
            return min(self.tokenizer.model_max_length, 4096)
        for name, module in self.model.named_modules():
            if (
                "position" in name.rpartition(".")[2]
                and isinstance(module, torch.nn.Embedding)
                and module.padding_idx is not None
            ):
                # such families count positions from there
                return min(positions, module.num_embeddings - module.padding_idx - 1)
        return positions

    def _prompts(self, prompts: Sequence[str]) -> list[Row]:
        """As the encoder reads them: with the special tokens that its tokenizer puts around a text, but without spaces
        at their end.

        Raises:
            RejectedRequest: a prompt that is too long, or one beyond the vocabulary. UsageError: a tokenizer without
                character offsets.
        """
        if not prompts:
            return []
        require_offsets(self.tokenizer)
        encoded = self.tokenizer(
            [prompt.rstrip(" ") for prompt in prompts], return_offsets_mapping=True, add_special_tokens=True
        )
        rows = []
        for prompt, ids, offsets in zip(prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if len(ids) > self.max_length:
                raise RejectedRequest(
                    f"{len(ids)} tokens are more than the model's {self.max_length}: {prompt[:60]!r}…"
                )
            if not ids:
                raise RejectedRequest("the prompt is empty and the tokenizer adds no token to it")
            self.vocabulary.refuse(ids, prompt)
            rows.append(Row(tuple(ids), len(ids), tuple(tuple(pair) for pair in offsets)))
        return rows

    def logits_at(self, *_: Any, **__: Any) -> Tensor:
        """Refused: prompt and answer are not one row of tokens here."""
        raise UsageError(f"this method {NEEDS_CAUSAL}, and the one at hand is {self.NAME}")

    @torch.no_grad()
    def loglikelihood(self, pairs: Sequence[tuple[str, str]], edits: Sequence[int] | None = None) -> list[Likelihood]:
        """One `Likelihood` a (prompt, target) pair, in order; a label counts as one token. edits: numbers of those
        that the pairs meet.
        """
        rows = self.encode(list(pairs))
        scores: list[Likelihood | None] = [None] * len(rows)
        for batch in told(by_length([len(row.ids) + len(row.target) for row in rows], self.batch_tokens), self.done):
            with meeting(self, edits and [edits[i] for i in batch]):
                found = self.answers([rows[i] for i in batch])
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
    def target_logprobs(
        self, pairs: Sequence[tuple[str, str]], edits: Sequence[int] | None = None
    ) -> list[Tensor | None]:
        """Log-probabilities (target tokens, classes), float32, of what could stand at each target token; one tensor a
        pair, in order. edits: as in `loglikelihood`.
        """
        rows = self.encode(list(pairs))
        found: list[Tensor | None] = [None] * len(rows)
        for batch in told(by_length([len(row.ids) + len(row.target) for row in rows], self.batch_tokens), self.done):
            with meeting(self, edits and [edits[i] for i in batch]):
                scores = self.answers([rows[i] for i in batch]).logits.float().log_softmax(-1)
            for index, part in zip(batch, scores.split([len(rows[i].target) for i in batch]), strict=True):
                found[index] = part
        return found

    def token_nlls(self, texts: Sequence[str], window: int, edit: int | None = None) -> tuple[float, int]:
        """Refused."""
        raise UsageError(f"perplexity of running text {NEEDS_CAUSAL}: model.perplexity_text=null leaves it out")
