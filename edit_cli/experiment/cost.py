"""What asking and editing are going to take: how fast this machine is, measured for a moment, and how much there is to
be done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from edit_cli.lm.fast.decoding import CACHE_BYTES
from edit_cli.lm.model import BATCH_TOKENS
from edit_cli.lm.outline import Outline
from edit_cli.metrics.observe import ObserveOptions
from edit_cli.requests import Case
from edit_cli.wording import many

OPERATIONS = 80  # small ones in a block, beside its products
MOMENT = 0.05  # seconds that a speed is measured for
ROWS = 256  # of the product that is measured


@dataclass(frozen=True)
class Asked:
    """What is asked of a model at once. rows: (prompt, answer) pairs that are scored. prompts: that it continues.
    texts: that it writes from these beginnings.
    """

    rows: list[tuple[str, str]]
    prompts: list[str]
    texts: list[str]

    @classmethod
    def of(cls, cases: Sequence[Case], options: ObserveOptions) -> Asked:
        probes = [probe for case in cases for probe in case.probes]
        rows = [
            (probe.text, text)
            for probe in probes
            if options.scores(probe)
            for text in (probe.target, probe.foil)
            if text is not None
        ]
        texts = [probe.text for probe in probes if probe.kind == "generation"] if options.sample else []
        prompts = [probe.text for probe in probes if options.continues(probe)]
        return cls(list(dict.fromkeys(rows)), list(dict.fromkeys(prompts)), texts)

    def told(self, options: ObserveOptions) -> str:
        found = [many(len(self.rows), "row") + " scored"]
        if self.prompts:
            found.append(f"{many(len(self.prompts), 'continuation')} of up to {many(options.max_new_tokens, 'token')}")
        if self.texts:
            found.append(f"{many(len(self.texts), 'text')} of {many(options.sample_tokens, 'token')}")
        return ", ".join(found)


@dataclass
class Work:
    """What is to be done on one model, summed up.

    given_tokens: of a batch, where a setting says it. seconds: by what is done. bytes: memory at the peak of each.
    """

    outline: Outline
    tokenizer: Any
    device: torch.device
    given_tokens: int | None
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lengths: dict[str, int] = {}
        self.batch_tokens: int = self.given_tokens or BATCH_TOKENS.get(self.device.type, 8192)

    # --- how fast this machine is -------------------------------------------------------------------------------------

    @cached_property
    def many_rows(self) -> float:
        """Operations a second in products of many rows."""
        return self._product(ROWS)

    @cached_property
    def one_row(self) -> float:
        """In products of one row, which wait for the matrix."""
        return self._product(1)

    @cached_property
    def small(self) -> float:
        """Seconds of an operation on next to nothing."""
        x = torch.zeros(1, 8, device=self.device)
        return self._timed(lambda: x + 1)

    def _product(self, rows: int) -> float:
        # none that stays in a cache: a model's matrices do not
        width, inner = self.outline.layout.width, max(self.outline.inner, 2**22 // self.outline.layout.width)
        x = torch.randn(rows, width, device=self.device, dtype=self.outline.dtype)
        matrix = torch.randn(inner, width, device=self.device, dtype=self.outline.dtype)
        return 2 * rows * width * inner / self._timed(lambda: x @ matrix.T)

    def _timed(self, work: Callable[[], Any]) -> float:
        def run(times: int) -> float:
            began = time.perf_counter()
            for _ in range(times):
                work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return time.perf_counter() - began

        run(2)
        times = max(round(MOMENT / max(run(1), 1e-7)), 1)
        return min(run(times) for _ in range(2)) / times

    # --- how much there is to do --------------------------------------------------------------------------------------

    @property
    def head(self) -> int:
        """Numbers that a token's state is multiplied with to give scores of words."""
        module = self.outline.model.get_output_embeddings()
        return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())

    @property
    def body(self) -> int:
        return self.outline.active - self.head

    def passes(self, tokens: float, scored: float, steps: float) -> float:
        """Seconds in which `tokens` pass all blocks, and `scored` of them the head, in so many passes."""
        products = 2 * (tokens * self.body + scored * self.head) / self.many_rows
        return products + steps * self.outline.depth * OPERATIONS * self.small

    def written(self, beginnings: int, rows: int, length: int, new: int) -> float:
        """Seconds in which `rows` texts of `length` tokens get `new` more, side by side. beginnings: their tokens."""
        together = max(min(self._side_by_side(length + new), rows), 1)
        one = 2 * (self.body + self.head)
        step = max(together * one / self.many_rows, one / self.one_row)
        step += self.outline.depth * OPERATIONS * self.small
        return self.passes(beginnings, rows, max(beginnings / self.batch_tokens, 1)) + new * step * -(-rows // together)

    def _side_by_side(self, length: int) -> int:
        room = CACHE_BYTES.get(self.device.type, CACHE_BYTES["cpu"]) // (self.outline.cache_bytes * length)
        return max(min(room, self.batch_tokens // length), 1)

    def length(self, text: str) -> int:
        """Tokens of a text."""
        if text not in self._lengths:
            self._lengths[text] = len(self.tokenizer(text, verbose=False)["input_ids"])
        return self._lengths[text]

    def add(self, what: str, seconds: float, memory: int = 0) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds
        self.bytes[what] = max(self.bytes.get(what, 0), memory)

    def ask(self, what: str, asked: Asked, options: ObserveOptions, texts: Sequence[str], times: int = 1) -> None:
        """Take note that this is asked, so many times; texts: that perplexity is measured on."""
        inputs = {(prompt, answer) for prompt, answer in asked.rows}
        tokens = sum(self.length(prompt) + self.length(answer) for prompt, answer in inputs)
        scored = sum(self.length(answer) for _, answer in inputs)
        seconds = self.passes(tokens, scored, max(tokens / self.batch_tokens, 1)) if inputs else 0.0
        for prompts, new in ((asked.prompts, options.max_new_tokens), (asked.texts, None)):
            if prompts:
                lengths = [self.length(prompt) for prompt in prompts]
                longest = max(lengths)
                new = max(options.sample_tokens - longest, 1) if new is None else new
                seconds += self.written(sum(lengths), len(prompts), longest, new)
        if options.perplexity and texts:
            tokens = self.length("\n".join(texts))
            seconds += self.passes(tokens, tokens, max(4 * tokens / self.batch_tokens, 1))
        self.add(what, seconds * times, self.asking_bytes(asked, options, texts))

    def asking_bytes(self, asked: Asked, options: ObserveOptions, texts: Sequence[str]) -> int:
        """Memory at the peak of asking."""
        outline = self.outline
        scored = min(sum(self.length(answer) for _, answer in asked.rows), self.batch_tokens)
        logits = scored * outline.vocabulary * 4 * 2
        if options.perplexity and texts:
            logits = max(logits, min(self.batch_tokens // 4, options.perplexity_window) * outline.vocabulary * 4 * 3)
        cache = min(CACHE_BYTES.get(self.device.type, CACHE_BYTES["cpu"]), self.batch_tokens * outline.cache_bytes)
        return max(self.states(self.batch_tokens) + logits, 2 * cache if asked.prompts or asked.texts else 0)

    def states(self, tokens: int) -> int:
        """Bytes of what tokens leave inside one block that computes."""
        return tokens * (6 * self.outline.layout.width + 3 * self.outline.inner) * self.outline.dtype.itemsize

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def peak(self) -> int:
        """Bytes beside the weights."""
        return max(self.bytes.values(), default=0)
