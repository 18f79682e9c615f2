"""How a causal language model answers the two questions: how likely is this target after this prompt, and how do you
go on?
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.lm.fast.decoding import CACHE_BYTES, Decoder
from edit_cli.lm.fast.edits_by_row import EditsByRow, meeting
from edit_cli.lm.heads.answers import Answers, Likelihood
from edit_cli.lm.heads.sampling import Drawn, StopAtNewline, TopKDraws, likeliest, without_defaults
from edit_cli.lm.hooks import exact, gather_before
from edit_cli.lm.tokenization import Row, by_length, pad_left, pad_right, tokenize, told
from edit_cli.lm.vocabulary import Vocabulary
from edit_cli.writing import answer


class CausalHead:
    """Encoding, scoring and generation for decoder-only models.

    Every batch is built by length within a token budget. replies: whether the model writes answers and stops after
    them; running text goes on after an answer.
    """

    kind = "causal"

    def __init__(
        self, model: nn.Module, tokenizer: Any, device: torch.device, batch_tokens: int, replies: bool = False
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        self.batch_tokens = batch_tokens
        self.replies = replies
        self.done: Callable[[int], None] = lambda rows: None  # hears how far an answer has come (see LM.telling)
        # (rows,) during a pass: column of each prompt's last token (see lm.prompt_position)
        self.prompt_ends: Tensor | None = None
        self.trackers = 0  # modules that look at whole prompts
        self.edits_by_row: EditsByRow | None = None  # what rows of a question that names `edits` meet
        self._line_breaks: dict[int, bool] = {}  # of tokens that were met
        self.vocabulary = Vocabulary.of(model, tokenizer)
        self.pad = self.vocabulary.pad(tokenizer.pad_token_id, tokenizer.eos_token_id)

    @property
    def max_length(self) -> int:
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 2048

    def encode(self, pairs: Sequence[tuple[str, str | None]], new: int = 0) -> list[Row]:
        """Tokenise by THE rule; refuses rows that, with `new` tokens after them, are longer than the model's
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

    @contextmanager
    def prompts_end_at(self, columns: Tensor) -> Iterator[None]:
        """Tell modules that look at whole prompts where they end, in passes inside the block (lm.prompt_position)."""
        before, self.prompt_ends = self.prompt_ends, columns
        try:
            yield
        finally:
            self.prompt_ends = before

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

    @cached_property
    def _takes_positions(self) -> bool:
        """Families with relative position biases have no `position_ids`."""
        return "position_ids" in self._arguments

    @cached_property
    def _arguments(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.model.forward).parameters)

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

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], max_new_tokens: int, edits: Sequence[int] | None = None) -> list[str]:
        """Greedy continuations without the prompt, up to EOS, a line break or `max_new_tokens`. edits: numbers of
        those that the prompts meet.
        """
        rows = [row.ids for row in self.encode([(prompt, None) for prompt in prompts], new=max_new_tokens)]
        written = self._write(rows, [max_new_tokens] * len(rows), stop_at_newline=True, edits=edits)
        return [self._continuation(row, new).split("\n")[0] for row, new in zip(rows, written, strict=True)]

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        max_tokens: int,
        top_k: int,
        edits: Sequence[int] | None = None,
    ) -> list[str]:
        """Prompt and sampled continuation, `max_tokens` in all, from the `top_k` likeliest tokens (no temperature).
        edits: as in `generate`.

        Each row draws from its own seed, so a text does not depend on what else was in the batch.
        """
        if max_tokens > self.max_length:
            raise UsageError(
                f"texts of {max_tokens} tokens (prompt included) are longer than the model's context of"
                f" {self.max_length}"
            )
        rows = [row.ids for row in self.encode([(prompt, None) for prompt in prompts])]
        room = [max(max_tokens - len(row), 0) for row in rows]
        written = self._write(rows, room, TopKDraws(seeds, room, top_k), edits=edits)
        return [self._decode(new, after=row) for row, new in zip(rows, written, strict=True)]

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
            with meeting(self, None if edit is None else [edit] * len(rows)):
                logits = self.model(input_ids=padded, attention_mask=mask, use_cache=False).logits
            for row, scores in zip(rows, logits, strict=True):
                labels = torch.tensor(row[first:], device=scores.device)
                total += nn.functional.cross_entropy(
                    scores[first - 1 : len(row) - 1].float(), labels, reduction="sum"
                ).item()
                count += len(labels)
        return total, count

    def _write(
        self,
        rows: Sequence[Sequence[int]],
        limits: Sequence[int],
        draws: TopKDraws | None = None,
        stop_at_newline: bool = False,
        edits: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """New tokens of each row, `limits` at most: the likeliest ones, or what is drawn."""
        if len(rows) == 1 or not self.caches_keys or not self.decodes_together:
            return self._write_plainly(rows, limits, draws, stop_at_newline, edits)
        stops = set(self._stop_ids() or ())

        def ends(token: int) -> bool:
            return token in stops or (stop_at_newline and self._breaks_line(token))

        return self._decoder.write(rows, limits, draws or likeliest, ends, self.done, edits)

    def _write_plainly(
        self,
        rows: Sequence[Sequence[int]],
        limits: Sequence[int],
        draws: TopKDraws | None = None,
        stop_at_newline: bool = False,
        edits: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """As `_write`, by `model.generate`: batches whose rows stay until all have ended."""
        written: list[list[int]] = [[] for _ in rows]
        lengths = [len(row) + limit for row, limit in zip(rows, limits, strict=True)]
        for batch in told(self._to_continue(rows, lengths), self.done):
            steps = max(limits[i] for i in batch)
            drawn = None if draws is None else Drawn(draws, batch)
            with meeting(self, edits and [edits[i] for i in batch]):
                new = self._continue([rows[i] for i in batch], steps, drawn, stop_at_newline) if steps else []
            for i, ids in zip(batch, new, strict=False):
                written[i] = ids[: limits[i]]
        return written

    @cached_property
    def _decoder(self) -> Decoder:
        cache_bytes = CACHE_BYTES.get(self.device.type, CACHE_BYTES["cpu"])
        return Decoder(
            self.model,
            self.pad,
            self.device,
            self._takes_positions,
            self.batch_tokens,
            cache_bytes,
            partial(meeting, self),
        )

    @cached_property
    def decodes_together(self) -> bool:
        """Whether rows of unequal length go on side by side, from keys and values that were moved, as each does alone.

        Three tokens each are compared with whole passes.
        """
        if not self.takes_left_padding:
            return False
        rows = [[1, 2, 3], [1, 2, 3, 4, 5, 6]]
        seen: dict[tuple[int, int], Tensor] = {}

        def choose(logits: Tensor, numbers: list[int], counts: list[int]) -> Tensor:
            seen.update({key: row for key, row in zip(zip(numbers, counts, strict=True), logits, strict=True)})
            return likeliest(logits, numbers, counts)

        with torch.no_grad():
            written = self._decoder.write(rows, [2, 3], choose, lambda token: False)
            for number, count in ((0, 1), (1, 2)):
                text, mask = pad_left([[*rows[number], *written[number][:count]]], self.pad, self.device)
                alone = self.model(input_ids=text, attention_mask=mask, use_cache=False).logits[0, -1].float()
                if (seen[number, count].float() - alone).abs().max() > 2e-2 * alone.abs().max():
                    return False
        return True

    def _breaks_line(self, token: int) -> bool:
        if token not in self._line_breaks:
            self._line_breaks[token] = "\n" in self.tokenizer.decode([token])
        return self._line_breaks[token]

    def _to_continue(self, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[int]]:
        """Batches for generation, of equally long rows where what stands before a row changes what comes after it."""
        batches = by_length(lengths, self.batch_tokens)
        if all(len({len(rows[i]) for i in batch}) == 1 for batch in batches) or self.takes_left_padding:
            return batches
        alike: dict[tuple[int, int], list[int]] = {}
        for number, batch in enumerate(batches):
            for i in batch:
                alike.setdefault((number, len(rows[i])), []).append(i)
        return list(alike.values())

    @cached_property
    def takes_left_padding(self) -> bool:
        """Whether a row goes on alike with padding before it (recurrent families read the padding like text)."""
        from transformers import GenerationConfig

        config = GenerationConfig(
            max_new_tokens=1, do_sample=False, pad_token_id=self.pad, output_scores=True, return_dict_in_generate=True
        )
        scores = []
        with torch.no_grad(), without_defaults(self.model):
            for others in ([], [[1, 2, 3, 4, 5, 6]]):
                ids, mask = pad_left([[1, 2, 3], *others], self.pad, self.device)
                with self.prompts_end_at(torch.full((len(ids),), ids.shape[1] - 1, device=self.device)):
                    scores.append(
                        self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
                        .scores[0][0]
                        .float()
                    )
        return bool((scores[0] - scores[1]).abs().max() <= 2e-2 * scores[0].abs().max())

    def _continue(
        self,
        rows: Sequence[Sequence[int]],
        steps: int,
        drawn: Drawn | None = None,
        stop_at_newline: bool = False,
    ) -> list[list[int]]:
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        ids, mask = pad_left(rows, self.pad, self.device)
        config = GenerationConfig(
            max_new_tokens=steps,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.pad,
            eos_token_id=self._stop_ids(),
            use_cache=True,
        )
        ends = torch.full((len(rows),), ids.shape[1] - 1, device=self.device)
        with without_defaults(self.model), self.prompts_end_at(ends):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([drawn] if drawn else []),
                stopping_criteria=StoppingCriteriaList([StopAtNewline(self.tokenizer)] if stop_at_newline else []),
            )
        return output[:, ids.shape[1] :].cpu().tolist()

    def _stop_ids(self) -> list[int] | None:
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured, self.tokenizer.eos_token_id]
        return sorted({i for i in ids if i is not None}) or None

    def _continuation(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """The text of `new`, with its leading space: some tokenizers drop it from a text that begins with it."""
        before, whole = self._decode((), after=prompt), self._decode(new, after=prompt)
        return whole.removeprefix(before) if whole.startswith(before) else self._decode(new)

    def _decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        stops = set(self._stop_ids() or ())
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        return self.tokenizer.decode([*after, *ids[:end]], skip_special_tokens=True, clean_up_tokenization_spaces=False)
