"""Which prefixes fire keys most: one pass over the text, all layers at once, without holding activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edit_cli.inspection.prefixes import STRIDE, Prefixes, Sample, Sentence
from edit_cli.lm.hooks import StopForward, exact, on_input
from edit_cli.lm.precision import exact_matmul
from edit_cli.lm.tokenization import by_length, pad_right

if TYPE_CHECKING:
    from edit_cli.lm.model import LM

CHUNK_BATCHES = 8  # sentences of so many batches are sorted by length together


class Strongest:
    """The `size` largest scores of each of `count` directions, and where they were seen; of equal ones the earlier.

    scores, places: (count, up to size), largest first.
    """

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self.scores, self.places = torch.zeros(count, 0), torch.zeros(count, 0, dtype=torch.long)

    def see(self, scores: Tensor, places: Tensor) -> None:
        """scores: (n, count) at `places` (n,), which ascend."""
        if self.size == 1:  # of many directions; of equal scores `max` takes the first
            top, row = scores.max(dim=0)
            scores, found = top[:, None], places[row][:, None]
        else:
            scores, found = scores.T, places.expand(scores.shape[1], -1)
        scores = torch.cat([self.scores.to(scores), scores], dim=1)
        found = torch.cat([self.places.to(found), found], dim=1)
        early = found.argsort(dim=1)
        scores, found = scores.gather(1, early), found.gather(1, early)
        self.scores, order = (part[:, : self.size] for part in scores.sort(dim=1, descending=True, stable=True))
        self.places = found.gather(1, order)


class Triggers:
    """What fires the memories of some layers.

    every: of each layer the one strongest trigger of all keys. drawn: those of `keys`, and of `directions` (n, d_m)
    in a layer's keys, which are asked for by `directed`.
    """

    def __init__(
        self,
        lm: LM,
        keys: Mapping[int, Sequence[int]],
        directions: Mapping[int, Tensor],
        prefixes: Prefixes,
    ) -> None:
        options = prefixes.options
        self.lm, self.keys, self.prefixes = lm, keys, prefixes
        self.directions = {layer: found.to(torch.float32) for layer, found in directions.items()}
        self.layers = sorted({*keys, *directions})
        self.every = {layer: Strongest(lm.key_width(layer), 1) for layer in keys}
        self.drawn = {layer: Strongest(len(found), options.examples) for layer, found in keys.items()}
        self.directed = {layer: Strongest(len(found), options.examples) for layer, found in directions.items()}
        self.sample = Sample(options.measured, options.seed)

    @torch.no_grad()
    def read(self, advance: Callable[[int], None]) -> None:
        """Read the text; `advance` is told how many documents are done. Raises as `Corpus.documents`."""
        budget, told = self.prefixes.options.batch_tokens, 0
        with exact_matmul():
            for chunk in self.prefixes.chunks(CHUNK_BATCHES * budget):
                self.sample.see([_place(sentence, token) for sentence in chunk for token in sentence.fresh])
                lengths = [len(sentence.ids) for sentence in chunk]
                before, new, passed = told, self.prefixes.documents - told, 0
                for batch in by_length(lengths, budget):
                    self._run([chunk[number] for number in sorted(batch)])
                    passed += sum(lengths[number] for number in batch)
                    now = before + new * passed // sum(lengths)
                    advance(now - told)
                    told = now
                self.prefixes.keep(self._held())

    def _run(self, sentences: Sequence[Sentence]) -> None:
        """Nothing behind the highest layer's projection is computed, the head least of all."""
        ids, mask = pad_right([sentence.ids for sentence in sentences], self.lm.head.pad, self.lm.device)
        where = [(row, token) for row, sentence in enumerate(sentences) for token in sentence.fresh]
        rows, tokens = torch.tensor(where, device=self.lm.device).T
        places = torch.tensor([_place(sentences[row], token) for row, token in where])
        with ExitStack() as stack:
            for layer in self.layers:
                see = partial(self._see, layer, rows, tokens, places)
                stack.enter_context(on_input(self.lm.module(self.lm.layout.mlp_out(layer)), see, len(sentences)))
            with suppress(StopForward):
                self.lm.head.run(ids, mask)

    def _see(self, layer: int, rows: Tensor, tokens: Tensor, places: Tensor, keys: Tensor) -> None:
        found = exact(keys[rows.to(keys.device), tokens.to(keys.device)])
        places = places.to(found.device)
        if layer in self.keys:
            self.every[layer].see(found, places)
            self.drawn[layer].see(found[:, list(self.keys[layer])], places)
        if layer in self.directions:
            self.directed[layer].see(found @ self.directions[layer].to(found).T, places)
        if layer == self.layers[-1]:
            raise StopForward

    def _held(self) -> set[int]:
        """Places that something is known of."""
        kept = [*self.every.values(), *self.drawn.values(), *self.directed.values()]
        return {*self.sample.places, *(place for found in kept for place in found.places.flatten().tolist())}


def _place(sentence: Sentence, token: int) -> int:
    return sentence.number * STRIDE + token
