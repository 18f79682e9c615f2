"""How a causal language model goes on with texts: the likeliest tokens, or drawn ones, many rows side by side where the
family allows it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from edit_cli.errors import UsageError
from edit_cli.lm.fast.decoding import CACHE_BYTES, Decoder
from edit_cli.lm.fast.edits_by_row import meeting
from edit_cli.lm.heads.base import Head
from edit_cli.lm.heads.beams import beam_search, distinct
from edit_cli.lm.heads.sampling import Drawn, StopAtNewline, TopKDraws, likeliest, without_defaults
from edit_cli.lm.tokenization import Row, by_length, pad_left, told
from edit_cli.writing import THINK, spoken


class Continuing(Head[Row]):
    """The part of a causal model's head that writes.

    prompt_ends: (rows,) during a pass, column of each prompt's last token (see lm.prompt_position).
    """

    def __init__(self, model: nn.Module, tokenizer: Any, device: torch.device, batch_tokens: int) -> None:
        super().__init__(model, tokenizer, device, batch_tokens)
        self.prompt_ends: Tensor | None = None
        self._line_breaks: dict[int, bool] = {}  # of tokens that were met

    @contextmanager
    def prompts_end_at(self, columns: Tensor) -> Iterator[None]:
        """Tell modules that look at whole prompts where they end, in passes inside the block (lm.prompt_position)."""
        before, self.prompt_ends = self.prompt_ends, columns
        try:
            yield
        finally:
            self.prompt_ends = before

    @cached_property
    def _takes_positions(self) -> bool:
        """Families with relative position biases have no `position_ids`."""
        return "position_ids" in self._arguments

    @cached_property
    def _arguments(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.model.forward).parameters)

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], max_new_tokens: int, edits: Sequence[int] | None = None) -> list[str]:
        """Greedy continuations without the prompt, up to EOS, a line break or `max_new_tokens`; the line breaks of a
        thought (`writing.spoken`) end none. edits: numbers of those that the prompts meet.
        """
        rows = [row.ids for row in self.encode([(prompt, None) for prompt in prompts], new=max_new_tokens)]
        written = self._write(rows, [max_new_tokens] * len(rows), stop_at_newline=True, edits=edits)
        numbers = [None] * len(rows) if edits is None else [[edit] for edit in edits]
        return [
            self._line(row, new, max_new_tokens, number)
            for row, new, number in zip(rows, written, numbers, strict=True)
        ]

    @torch.no_grad()
    def alternatives(self, prompts: Sequence[str], count: int, max_new_tokens: int) -> list[list[str]]:
        found = []
        for row in self.encode([(prompt, None) for prompt in prompts], new=max_new_tokens):
            ids = torch.tensor([row.ids], device=self.device)  # alone: beams are its batch, and no padding is read
            with self.prompts_end_at(torch.full((count,), len(row.ids) - 1, device=self.device)):
                beams = beam_search(
                    self.model, count, max_new_tokens, self.pad, self._stop_ids(),
                    input_ids=ids, attention_mask=torch.ones_like(ids),
                )  # fmt: skip
            lines = [self._continuation(row.ids, beam).split("\n")[0] for beam in beams[:, len(row.ids) :].tolist()]
            found.append(distinct(lines))
            self.done(1)
        return found

    def _line(self, row: Sequence[int], new: list[int], limit: int, edits: Sequence[int] | None) -> str:
        """The first line of what a row was continued with, which goes on while it is a thought."""
        text = self._continuation(row, new)
        if not text.lstrip().startswith(THINK):
            return text.split("\n")[0]
        while not spoken(text) and len(new) < limit and new[-1] not in (self._stop_ids() or ()):
            (more,) = self._write([[*row, *new]], [limit - len(new)], stop_at_newline=True, edits=edits)
            new = [*new, *more]
            text = self._continuation(row, new)
        said = spoken(text)
        return text.removesuffix(said) + said.split("\n")[0]

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

    def _continuation(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """The text of `new`, with its leading space: some tokenizers drop it from a text that begins with it."""
        before, whole = self._decode((), after=prompt), self._decode(new, after=prompt)
        return whole.removeprefix(before) if whole.startswith(before) else self._decode(new)
