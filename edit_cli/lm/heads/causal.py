"""How a causal language model answers the two questions: how likely is this target after this prompt, and how do you
go on?
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.lm.fast.edits_by_row import meeting
from edit_cli.lm.heads.answers import Answers, Likelihood
from edit_cli.lm.heads.continuing import Continuing
from edit_cli.lm.hooks import exact, gather_before
from edit_cli.lm.tokenization import Row, by_length, pad_right, tokenize, told
from edit_cli.writing import answer


class CausalHead(Continuing):
    """Encoding and scoring for decoder-only models; how they write stands in `continuing`.

    replies: whether the model writes answers and stops after them; running text goes on after an answer.
    """

    kind = "causal"

    def __init__(
        self, model: nn.Module, tokenizer: Any, device: torch.device, batch_tokens: int, replies: bool = False
    ) -> None:
        super().__init__(model, tokenizer, device, batch_tokens)
        self.replies = replies

    @property
    def max_length(self) -> int:
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 2048

    def encode(self, pairs: Sequence[tuple[str, str | None]], new: int = 0) -> list[Row]:
        """Tokenize by THE rule; refuses rows that, with `new` tokens after them, are longer than the model's
        context, and tokens that it has no embedding for.
        """
        rows = tokenize(self.tokenizer, pairs)
        for row, (prompt, _) in zip(rows, pairs, strict=True):
            if len(row.ids) + new > self.max_length:
                wanted = f" and {new} new ones" if new else ""
                raise RejectedRequest(
                    f"{len(row.ids)} tokens{wanted} are more than the model's {self.max_length}: {prompt[:60]!r}…"
                )
            self.vocabulary.refuse(row.ids, prompt)
        return rows

    @property
    def classes(self) -> int:
        """What one token of an answer is chosen from."""
        return self.model.config.get_text_config().vocab_size

    def written(self, prompt: str, target: str) -> str:
        """The target as it comes out of `generate` after the prompt."""
        return answer(prompt, target)

    def run(self, ids: Tensor, mask: Tensor) -> None:
        """A pass for those who read states."""
        self.model(input_ids=ids, attention_mask=mask, use_cache=False)

    def answers(self, rows: Sequence[Row], end: bool = False) -> Answers:
        """Scores of the rows' targets, differentiable, and of the end token after each if `end`.

        Running text has no end of an answer: there `end` changes nothing.

        Raises:
            UsageError: the end is wanted of a model of `replies`, and its tokenizer has none.
        """
        after = (self.end,) if end and self.replies else ()
        wholes = [(*row.ids, *after) for row in rows]
        ids, mask = pad_right([whole[:-1] for whole in wholes], self.pad, self.device)
        where = [
            (number, column)
            for number, (row, whole) in enumerate(zip(rows, wholes, strict=True))
            for column in range(row.start - 1, len(whole) - 1)
        ]
        at = torch.tensor(where, device=self.device)
        logits = self.logits_at(ids, mask, at[:, 0], at[:, 1])
        labels = torch.tensor([wholes[number][column + 1] for number, column in where], device=logits.device)
        return Answers(logits, labels, at[:, 0].to(logits.device))

    @property
    def end(self) -> int:
        """The token after which `generate` stops.

        Raises:
            UsageError: there is none.
        """
        stops = self._stop_ids()
        if not stops:
            raise UsageError(
                "this model writes answers and its tokenizer has no end token (eos_token): name one in its"
                " tokenizer_config.json"
            )
        own = self.tokenizer.eos_token_id
        return own if own in stops else stops[0]

    def logits_at(
        self,
        ids: Tensor,
        mask: Tensor,
        rows: Tensor,
        columns: Tensor,
        past: Any = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits (positions, vocabulary), float32 or better, at the given (row, column) pairs only.

        ids, mask: (rows, tokens), right-padded. past: key-value cache that `ids` continue at `positions` (filled if
        empty). A row's prompt ends where the first logits are asked for.
        """
        more = {} if past is None else {"past_key_values": past}
        if positions is not None and self._takes_positions:
            more["position_ids"] = positions
        whole = torch.full((len(ids),), mask.shape[1] - 1, device=ids.device)
        ends = whole.scatter_reduce(
            0, rows.to(ids.device), columns.to(ids.device) + (mask.shape[1] - ids.shape[1]), "amin"
        )
        with self.prompts_end_at(ends), gather_before(self.model.get_output_embeddings(), rows, columns) as pick:
            output = self.model(input_ids=ids, attention_mask=mask, use_cache=past is not None, **more)
        return exact(pick(output.logits))

    @property
    def caches_keys(self) -> bool:
        """Whether rows can share keys and values of their earlier tokens.

        Not while a module decides by a row's whole prompt.
        """
        return not self.trackers and self._goes_on

    @cached_property
    def _goes_on(self) -> bool:
        """Whether every block can go on from keys and values of earlier tokens (recurrent and linear attention
        cannot).
        """
        from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

        layers = DynamicCache(config=self.model.config).layers
        return "past_key_values" in self._arguments and not any(
            isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers
        )

    @torch.no_grad()
    def loglikelihood(self, pairs: Sequence[tuple[str, str]], edits: Sequence[int] | None = None) -> list[Likelihood]:
        """One `Likelihood` a (prompt, target) pair, in order. edits: numbers of those that the pairs meet.

        The last target token is never fed, since nothing reads past it; so targets of one token share their prompt's
        forward pass.
        """
        encoded, numbers = self.encode(list(pairs)), edits or [0] * len(pairs)
        sharing: dict[tuple[tuple[int, ...], int, int], list[int]] = {}
        for index, row in enumerate(encoded):
            sharing.setdefault((row.ids[:-1], row.start, numbers[index]), []).append(index)
        inputs, groups = [ids for ids, *_ in sharing], list(sharing.values())
        scores: list[Likelihood | None] = [None] * len(encoded)
        batches = by_length([len(ids) for ids in inputs], self.batch_tokens)
        for batch in told(batches, self.done, lambda batch: sum(len(groups[i]) for i in batch)):
            ids, mask = pad_right([inputs[i] for i in batch], self.pad, self.device)
            asked = [(place, index) for place, i in enumerate(batch) for index in groups[i]]
            where = [
                (place, c)
                for place, index in asked
                for c in range(encoded[index].start - 1, len(encoded[index].ids) - 1)
            ]
            distinct = {position: number for number, position in enumerate(dict.fromkeys(where))}
            at = torch.tensor(list(distinct), device=self.device)
            with meeting(self, edits and [edits[groups[i][0]] for i in batch]):
                logits = self.logits_at(ids, mask, at[:, 0], at[:, 1]).to(self.device)
            best = logits.argmax(-1).cpu().tolist()
            number = torch.tensor([distinct[position] for position in where], device=self.device)
            labels = torch.tensor([i for _, index in asked for i in encoded[index].target], device=self.device)
            losses = (logits.logsumexp(-1)[number] - logits[number, labels]).cpu().tolist()
            position = 0
            for _, index in asked:
                target = encoded[index].target
                span = slice(position, position + len(target))
                predicted = tuple(best[distinct[where[k]]] for k in range(span.start, span.stop))
                hits = tuple(a == b for a, b in zip(predicted, target, strict=True))
                scores[index] = Likelihood(math.fsum(losses[span]) / len(target), hits, predicted)
                position = span.stop
        return scores  # type: ignore[return-value]

    @torch.no_grad()
    def target_logprobs(
        self, pairs: Sequence[tuple[str, str]], edits: Sequence[int] | None = None
    ) -> list[Tensor | None]:
        """Log-probabilities (target tokens, vocabulary), float32, of what could stand at each target token; one tensor
        a pair, in order. edits: as in `loglikelihood`.

        They are large: ask about few pairs at a time.
        """
        encoded = self.encode(list(pairs))
        found: list[Tensor | None] = [None] * len(encoded)
        for batch in told(by_length([len(row.ids) for row in encoded], self.batch_tokens), self.done):
            rows = [encoded[i] for i in batch]
            ids, mask = pad_right([row.ids[:-1] for row in rows], self.pad, self.device)
            where = [
                (place, column) for place, row in enumerate(rows) for column in range(row.start - 1, len(row.ids) - 1)
            ]
            at = torch.tensor(where, device=self.device)
            with meeting(self, edits and [edits[i] for i in batch]):
                logprobs = self.logits_at(ids, mask, at[:, 0], at[:, 1]).float().log_softmax(-1)
            for index, part in zip(batch, logprobs.split([len(row.target) for row in rows]), strict=True):
                found[index] = part
        return found

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def _logits_with(self, edit: int | None, ids: Tensor, mask: Tensor) -> Tensor:
        """(rows, tokens, vocabulary) of rows that all meet one edit; the same rows are read again with the next."""
        if edit is None or self.edits_by_row is None:
            return self._logits(ids, mask)
        with self.edits_by_row.met_by([edit] * len(ids)):
            return self.edits_by_row.again(self.model, self._logits, ids, mask)

    @torch.no_grad()
    def token_nlls(self, texts: Sequence[str], window: int, edit: int | None = None) -> tuple[float, int]:
        """(sum of the negative log-likelihoods in nats, tokens) of the joined texts, cut into windows of `window`
        tokens. edit: number of the one that the texts meet.

        Windows begin with what the tokenizer puts before every text (a BOS, or nothing); the first token after nothing
        has no score.
        """
        ids = self.vocabulary.readable(self.tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"])
        start = list(tokenize(self.tokenizer, [("", None)])[0].ids)
        window = min(window, self.max_length - len(start))
        pieces = [start + ids[i : i + window] for i in range(0, len(ids), window)]
        first = max(len(start), 1)
        kept = [piece for piece in pieces if len(piece) > first]
        total, count = 0.0, 0
        # logits of every token weigh the most
        for batch in by_length([len(piece) for piece in kept], self.batch_tokens // 4):
            rows = [kept[i] for i in batch]
            padded, mask = pad_right(rows, self.pad, self.device)
            logits = self._logits_with(edit, padded, mask)
            for row, scores in zip(rows, logits, strict=True):
                labels = torch.tensor(row[first:], device=scores.device)
                total += nn.functional.cross_entropy(
                    scores[first - 1 : len(row) - 1].float(), labels, reduction="sum"
                ).item()
                count += len(labels)
        return total, count
