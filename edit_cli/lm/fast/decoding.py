"""Writing many texts at once: a row leaves the batch when its text has ended, and one that waits takes its place.

Greedy or sampled, a text costs one pass a token over its own keys and values. What would be wasted otherwise: passes
over rows that have ended, a copy of all keys and values at every step, a second run of a prompt that is continued
twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from edit_cli.lm.fast.edits_by_row import Meeting
from edit_cli.lm.tokenization import pad_left

# Bytes of keys and values that are kept at once, by kind of device. They change speed and memory; of a text at most the
# last bits of the numbers that it is chosen by.
CACHE_BYTES = {"cpu": 2**28, "cuda": 2**33}
LEAST_LEAVING = 0.25  # share of a batch that has to end before the others are moved together

Choose = Callable[[Tensor, list[int], list[int]], Tensor]
"""(logits (rows, vocabulary), numbers of the rows, tokens that each has written) → next tokens (rows,)."""
Layers = list[tuple[Tensor, Tensor]]
"""Keys and values (rows, heads, tokens, width) of every block."""


class Buffer(DynamicLayer):
    """Keys and values with room for those of `room` more tokens, so that a step copies none of the earlier ones."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.length = keys.shape[-2]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.buffers = [nn.functional.pad(part, (0, 0, 0, room)) for part in (keys, values)]

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """All keys and values, with those of the next tokens behind them."""
        first, self.length = self.length, self.length + key_states.shape[-2]
        for buffer, part in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., first : self.length, :] = part
        return self.stored

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        keys, values = self.buffers
        return keys[..., : self.length, :], values[..., : self.length, :]

    def get_seq_length(self) -> int:
        return self.length


@dataclass(frozen=True)
class Batch:
    """Rows that are being written. All end in the last column; what stands left of a shorter one is padding.

    rows: their numbers. lengths: (rows,) tokens of each so far, the last of which has no keys and values yet.
    last: (rows,) that token. layers: as many columns as the longest row has tokens with keys and values.
    """

    rows: list[int]
    lengths: Tensor
    last: Tensor
    layers: Layers

    @property
    def width(self) -> int:
        return self.layers[0][0].shape[-2]

    def select(self, kept: Sequence[int]) -> Batch:
        """The rows at these places, without columns that none of them reaches."""
        index = torch.tensor(kept, dtype=torch.long, device=self.last.device)
        lengths = self.lengths[index]
        unused = self.width - int(lengths.max()) + 1 if kept else self.width

        def of(part: Tensor) -> Tensor:
            return part[..., unused:, :].index_select(0, index.to(part.device))

        layers = [(of(keys), of(values)) for keys, values in self.layers]
        return Batch([self.rows[place] for place in kept], lengths, self.last[index], layers)

    def join(self, other: Batch) -> Batch:
        """Both, side by side."""
        width = max(self.width, other.width)

        def both(mine: Tensor, theirs: Tensor) -> Tensor:
            parts = (nn.functional.pad(part, (0, 0, width - part.shape[-2], 0)) for part in (mine, theirs))
            return torch.cat(list(parts))

        layers = [
            (both(keys, more_keys), both(values, more_values))
            for (keys, values), (more_keys, more_values) in zip(self.layers, other.layers, strict=True)
        ]
        lengths, last = torch.cat([self.lengths, other.lengths]), torch.cat([self.last, other.last])
        return Batch(self.rows + other.rows, lengths, last, layers)


@dataclass(frozen=True)
class Decoder:
    """Writes on from token ids.

    Args:
        model: a decoder whose rows can go on from cached keys and values, be they padded on the left or not.
        pad: the token that stands for nothing.
        takes_positions: whether the model is told the positions of tokens.
        prompt_tokens: tokens of prompts, padding included, that are read in one pass.
        cache_bytes: what keys and values may take; fewer rows are written at once when memory runs out.
        meeting: see `lm.fast.edits_by_row`.
    """

    model: nn.Module
    pad: int
    device: torch.device
    takes_positions: bool
    prompt_tokens: int
    cache_bytes: int
    meeting: Meeting = lambda numbers: nullcontext()

    @torch.no_grad()
    def write(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        choose: Choose,
        ends: Callable[[int], bool],
        done: Callable[[int], None] = lambda rows: None,
        edits: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """The new tokens of each row, the one that ends it included.

        Args:
            prompts: token ids of every row, at least one each.
            limits: the most new tokens of each row.
            choose: picks the next tokens.
            ends: whether a text is over with that token.
            done: hears how many rows have been written, of which a half-written one is half.
            edits: numbers of the edits that the rows meet.

        Raises:
            torch.OutOfMemoryError: a single row does not fit.
        """
        work = _Work(self, prompts, limits, choose, ends, done, edits)
        batch: Batch | None = None
        while work.waiting or batch is not None:
            try:
                batch = work.filled(batch)
                batch = None if batch is None else work.steps(batch)
            except torch.OutOfMemoryError:
                batch = None
                if not work.halve():
                    raise
        return work.written

    def read(
        self, prompts: Sequence[tuple[int, ...]], edits: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Layers]:
        """(logits (rows, vocabulary) after each prompt, tokens (rows,) of each, keys and values); each distinct prompt
        is run once an edit.
        """
        keys = list(zip(prompts, edits or [0] * len(prompts), strict=True))
        distinct = list(dict.fromkeys(keys))
        place = {key: number for number, key in enumerate(distinct)}
        ids, mask = pad_left([prompt for prompt, _ in distinct], self.pad, self.device)
        past = DynamicCache()  # without the config: no layer forgets what lies outside its window
        with self.meeting(None if edits is None else [number for _, number in distinct]):
            logits = self._pass(ids, mask, past, (mask.cumsum(1) - 1).clamp(min=0))
        index = torch.tensor([place[key] for key in keys], device=self.device)

        def each(part: Any) -> Tensor:
            return part if len(distinct) == len(prompts) else part[index.to(part.device)]

        layers: list[Any] = past.layers
        return each(logits), each(mask.sum(1)), [(each(layer.keys), each(layer.values)) for layer in layers]

    def step(self, last: Tensor, lengths: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """Logits (rows, vocabulary) after the token `last` (rows,), the last of so many."""
        return self._pass(last[:, None], mask, cache, lengths[:, None] - 1)

    def _pass(self, ids: Tensor, mask: Tensor, cache: Cache, positions: Tensor) -> Tensor:
        more = {"position_ids": positions} if self.takes_positions else {}
        output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
        return output.logits[:, -1]


class _Work:
    """Texts on the way. waiting: rows that are in no batch, those with the longest prompts last."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        choose: Choose,
        ends: Callable[[int], bool],
        done: Callable[[int], None],
        edits: Sequence[int] | None = None,
    ) -> None:
        self.decoder, self.prompts, self.limits, self.edits = decoder, prompts, limits, edits
        self.choose, self.ends, self.done = choose, ends, done
        self.written: list[list[int]] = [[] for _ in prompts]
        self.slots: int | None = None  # rows that are written at once, once it is known what a token takes
        self.waiting: list[int] = []
        self._wait()
        self.come, self.told = 0.0, 0  # how far, in rows: one that is half written counts as half a row
        self._tell(len(prompts) - len(self.waiting))

    def _wait(self) -> None:
        going = [row for row in range(len(self.prompts)) if self._goes_on(row)]
        self.waiting = sorted(going, key=lambda row: (len(self.prompts[row]) + len(self.written[row]), row))

    def _goes_on(self, row: int) -> bool:
        written = self.written[row]
        return len(written) < self.limits[row] and not (written and self.ends(written[-1]))

    def halve(self) -> bool:
        """Let all go on from what they have written, half as many at once; whether that is possible."""
        if self.slots is None or self.slots == 1:
            return False
        self.slots //= 2
        self._wait()
        return True

    def filled(self, batch: Batch | None) -> Batch | None:
        """The batch with rows that waited in its free places, one token further each. None: all rows are over."""
        while self.waiting and (batch is None or self.slots is None or len(batch.rows) < self.slots):
            free = 1 if self.slots is None else self.slots - (0 if batch is None else len(batch.rows))
            rows = self._admitted(self.waiting[-free:])
            texts = [(*self.prompts[row], *self.written[row]) for row in rows]
            logits, lengths, layers = self.decoder.read(texts, self._edits_of(rows))
            del self.waiting[-len(rows) :]
            if self.slots is None:
                longest = max(len(prompt) + limit for prompt, limit in zip(self.prompts, self.limits, strict=True))
                token = sum(part[0, :, 0].numel() * part.element_size() for layer in layers for part in layer)
                self.slots = max(1, self.decoder.cache_bytes // (token * longest))
            last, going = self._write(logits, rows, range(len(rows)))
            if going:
                new = Batch(rows, lengths + 1, last, layers).select(going)
                batch = new if batch is None else batch.join(new)
        return batch

    def _edits_of(self, rows: Sequence[int]) -> list[int] | None:
        return None if self.edits is None else [self.edits[row] for row in rows]

    def _admitted(self, free: Sequence[int]) -> list[int]:
        """The last of these rows, as many as are read in one pass."""
        kept: list[int] = []
        distinct: set[tuple[int, ...]] = set()
        widest = 0
        for row in reversed(free):
            text = (*self.prompts[row], *self.written[row])
            distinct.add(text)
            widest = max(widest, len(text))
            if kept and len(distinct) * widest > self.decoder.prompt_tokens:
                break
            kept.append(row)
        return kept[::-1]

    def steps(self, batch: Batch) -> Batch | None:
        """Write on until so many rows have ended that the others are better moved together; those, if there are any.

        A row that has ended is run along, unread, until then.
        """
        room = max(self.limits[row] - len(self.written[row]) for row in batch.rows)
        buffers = [Buffer(*layer, room) for layer in batch.layers]
        cache = Cache(layers=list(buffers))
        columns = torch.arange(batch.width + room + 1, device=self.decoder.device)
        mask = (columns > batch.width - batch.lengths[:, None]).long()
        lengths, last, width = batch.lengths, batch.last, batch.width
        going = list(range(len(batch.rows)))
        with self.decoder.meeting(self._edits_of(batch.rows)):
            while len(going) > (1 - LEAST_LEAVING) * len(batch.rows):
                width += 1
                logits = self.decoder.step(last, lengths, mask[:, :width], cache)
                lengths = lengths + 1
                last, going = self._write(logits, batch.rows, going)
        if not going:
            return None
        return Batch(batch.rows, lengths, last, [buffer.stored for buffer in buffers]).select(going)

    def _write(self, logits: Tensor, rows: list[int], going: Sequence[int]) -> tuple[Tensor, list[int]]:
        """(the next token (rows,) of every row, the places of those that go on), of `going`, the places of rows that
        are written.
        """
        chosen = self.choose(logits, rows, [len(self.written[row]) for row in rows])
        tokens, left, further = chosen.tolist(), [], 0.0
        for place in going:
            row = rows[place]
            missing = self.limits[row] - len(self.written[row])
            self.written[row].append(tokens[place])
            if goes_on := self._goes_on(row):
                left.append(place)
            further += (1 if goes_on else missing) / self.limits[row]
        self._tell(further)
        return chosen.to(self.decoder.device), left

    def _tell(self, further: float) -> None:
        self.come += further
        whole = int(self.come + 1e-6)
        self.done(whole - self.told)
        self.told = whole
