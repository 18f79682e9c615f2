"""Corrupted passes with clean states put back, batched over tokens, copies and facts.

A state that is restored at token t of layer ℓ changes neither earlier tokens nor layers up to ℓ. So every row (a token
to restore, in one corrupted copy) is run once whole; for each layer, blocks below it are skipped and tokens before t
come from the key-value cache. Rows with as many tokens left share passes, so that little of them is padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from edit_cli.lm.fast.suffix_pass import SuffixForward, SuffixRow
from edit_cli.lm.hooks import on_output
from edit_cli.lm.layout import MIXERS, attention_out
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import pad_right
from edit_cli.monitor import Advance
from edit_cli.tracing.facts import Fact, window_at
from edit_cli.tracing.settings import TraceOptions

PARTS = 4  # batches that the rows of one group of facts fill: the more, the more rows of one length find together


@dataclass(frozen=True)
class Trace:
    """P(answer) of the clean run (high), of the corrupted ones (low), and with each state restored: {kind: (traced
    tokens, layers)}.
    """

    high: float
    low: float
    scores: dict[str, np.ndarray]


class Tracer:
    """Traces facts in one model with noise of standard deviation `noise_std`."""

    def __init__(self, lm: LM, options: TraceOptions, noise_std: float) -> None:
        self.lm, self.options, self.noise_std = lm, options, noise_std
        layers = range(lm.layout.depth)
        names: dict[str, Callable[[int], str]] = {
            "hidden": lm.layout.block,
            "mlp": lm.layout.mlp_out,
            "attn": lambda layer: attention_out(lm.model, lm.layout, layer, MIXERS),
        }
        self.modules = {kind: [names[kind](layer) for layer in layers] for kind in options.kinds}
        self._reuse_prefix: bool | None = None  # not known until tried
        _ = lm.blocks_return_tuples  # found out by a pass of its own, which must not meet hooks

    def window(self, kind: str, layer: int) -> tuple[int, int]:
        """Layers (begin, end) that are restored for the score of `layer`."""
        return window_at(layer, 1 if kind == "hidden" else self.options.window, self.lm.layout.depth)

    def traces(self, facts: Sequence[Fact]) -> Iterator[tuple[Fact, Trace]]:
        """Each fact with its trace, in order."""
        for group in self.groups(facts):
            yield from zip(group, self.trace(group), strict=True)

    def groups(self, facts: Sequence[Fact]) -> Iterator[list[Fact]]:
        """The facts in groups that share passes. In another company, a fact's numbers differ in their last digits."""
        group: list[Fact] = []
        for fact in facts:
            rows = sum(len(other.traced) for other in [*group, fact]) * self.options.copies
            longest = max(len(other.ids) for other in [*group, fact])
            if group and rows * longest > PARTS * self.options.batch_tokens:
                yield group
                group = []
            group.append(fact)
        if group:
            yield group

    @torch.no_grad()
    def trace(self, facts: Sequence[Fact]) -> list[Trace]:
        """The traces of one group, in order."""
        high, clean = self._clean(facts)
        noise = [self._noise(fact) for fact in facts]
        rows = [
            (number, token, c)
            for number, fact in enumerate(facts)
            for token in fact.traced
            for c in range(self.options.copies)
        ]
        rows.sort(key=lambda row: row[1] - len(facts[row[0]].ids))  # stable: a state's copies stay side by side
        limit = max(1, self.options.batch_tokens // max(len(fact.ids) for fact in facts))
        parts = [rows[start : start + limit] for start in range(0, len(rows), limit)]
        windows = sum(len({self.window(kind, n) for n in range(len(names))}) for kind, names in self.modules.items())
        with self.lm.monitor.task("states restored", len(parts) * windows) as advance:
            found = [self._restored(facts, part, clean, noise, advance) for part in parts]
        low = torch.cat([low for low, _ in found])
        scores = {kind: torch.cat([scores[kind] for _, scores in found]) for kind in self.modules}
        traces = []
        for number, fact in enumerate(facts):
            mine = sorted((row[1:], place) for place, row in enumerate(rows) if row[0] == number)  # by token and copy
            places = [place for _, place in mine]
            mean: dict[str, np.ndarray] = {
                kind: s[places].view(len(fact.traced), self.options.copies, -1).mean(1).numpy()
                for kind, s in scores.items()
            }
            traces.append(Trace(high[number].item(), low[places].mean().item(), mean))
        return traces

    def _clean(self, facts: Sequence[Fact]) -> tuple[Tensor, dict[str, Tensor]]:
        """P(answer) of each fact, and what leaves every module that will be restored: {name: (facts, tokens,
        width)}.
        """
        lm, seen = self.lm, {}
        ids, mask = pad_right([fact.ids for fact in facts], lm.head.pad, lm.device)
        last = torch.tensor([len(fact.ids) - 1 for fact in facts], device=lm.device)
        with ExitStack() as stack:
            for name in (name for names in self.modules.values() for name in names):
                keep = lambda output, name=name: seen.update({name: output.clone()})  # noqa: E731
                stack.enter_context(on_output(lm.module(name), keep, len(facts)))
            logits = lm.head.logits_at(ids, mask, torch.arange(len(facts), device=lm.device), last)
        return _probability(logits, [fact.answer for fact in facts]), seen

    def _noise(self, fact: Fact) -> Tensor:
        """(copies, subject tokens, embedding width), float64: the same for every state that is restored."""
        width = self.lm.model.get_input_embeddings()(torch.tensor(fact.ids[:1], device=self.lm.device)).shape[-1]
        length = fact.subject[1] - fact.subject[0]
        generator = np.random.RandomState(self.options.noise_seed)
        return torch.from_numpy(self.noise_std * generator.randn(self.options.copies, length, width))

    def _restored(
        self,
        facts: Sequence[Fact],
        rows: Sequence[tuple[int, int, int]],
        clean: dict[str, Tensor],
        noise: Sequence[Tensor],
        advance: Advance,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """P(answer) of rows (fact, token, copy): (rows,) corrupted, and {kind: (rows, layers)} with the token's
        states restored.
        """
        corrupted = self._corrupt(facts, rows, noise)
        answers = [facts[number].answer for number, *_ in rows]
        who, token = (torch.tensor(column) for column in list(zip(*rows, strict=True))[:2])
        scores: dict[str, Tensor] = {}
        for kind, names in self.modules.items():
            known: dict[tuple[int, int], Tensor] = {}
            for layer in range(len(names)):
                begin, end = self.window(kind, layer)
                if (begin, end) not in known:
                    restore = {
                        name: clean[name][who.to(clean[name].device), token.to(clean[name].device)]
                        for name in names[begin:end]
                    }
                    logits = corrupted.logits(begin if kind == "hidden" else begin - 1, restore)
                    known[begin, end] = _probability(logits, answers)
                    advance(1)
            scores[kind] = torch.stack([known[self.window(kind, layer)] for layer in range(len(names))], dim=1)
        return _probability(corrupted.passes.base, answers), scores

    def _corrupt(
        self, facts: Sequence[Fact], rows: Sequence[tuple[int, int, int]], noise: Sequence[Tensor]
    ) -> Corrupted:
        suffixes = [SuffixRow(facts[number].ids, token, (len(facts[number].ids) - 1,)) for number, token, _ in rows]
        added = noise[0].new_zeros(len(rows), max(len(suffix.ids) for suffix in suffixes), noise[0].shape[-1])
        for row, (number, _, c) in enumerate(rows):
            added[row, slice(*facts[number].subject)] = noise[number][c]
        if self._reuse_prefix is None:
            corrupted = Corrupted(self.lm, suffixes, added, reuse_prefix=True)
            self._reuse_prefix = corrupted.passes.agrees(corrupted.logits(-1, {}))
            if self._reuse_prefix:
                return corrupted
            slower = "whole rows are run instead (slower, the same values)"
            self.lm.monitor.note(f"{self.lm.name} does not take a cached prefix as it is: {slower}")
        return Corrupted(self.lm, suffixes, added, self._reuse_prefix)


class Corrupted:
    """Rows with noise on their embeddings, run whole once. `noise`: (rows, tokens, embedding width)."""

    def __init__(self, lm: LM, suffixes: Sequence[SuffixRow], noise: Tensor, reuse_prefix: bool) -> None:
        self.lm = lm
        embedded: list[Tensor] = []
        states: list[Tensor] = []

        def corrupt(hidden: Tensor) -> Tensor:
            embedded.append(hidden + noise.to(hidden))
            return embedded[0].clone()  # some families scale it in place

        with ExitStack() as stack:
            stack.enter_context(on_output(lm.model.get_input_embeddings(), corrupt))
            for layer in range(lm.layout.depth):
                stack.enter_context(
                    on_output(lm.module(lm.layout.block(layer)), lambda hidden: states.append(hidden.clone()))
                )
            self.passes = SuffixForward(lm, suffixes, -1, reuse_prefix)
        columns = self.passes.positions.clamp(max=noise.shape[1] - 1)[:, :, None]
        self.embedded, *self.states = (x.take_along_dim(columns.to(x.device), 1) for x in (embedded[0], *states))

    def logits(self, skipped: int, restore: dict[str, Tensor]) -> Tensor:
        """Logits (rows, vocabulary) at the last token, with each row's token of `restore` {module: (rows, width)} put
        back.

        skipped: the last block that is not run; −1 runs all of them.
        """
        passes, rows = copy.copy(self.passes), len(self.passes.ids)
        passes.frozen, passes.prefix = skipped, self.passes.prefix[skipped + 1 :]
        passes.states = self.states[skipped] if skipped >= 0 else None
        with ExitStack() as stack:
            stack.enter_context(on_output(self.lm.model.get_input_embeddings(), lambda _: self.embedded.clone()))
            for name, value in restore.items():
                stack.enter_context(on_output(self.lm.module(name), partial(self._put, value=value), rows))
            return passes.logits(lambda states, *_: states)

    def _put(self, hidden: Tensor, value: Tensor) -> Tensor:
        changed = hidden.clone()
        changed[torch.arange(len(changed), device=changed.device), self.passes.at.to(changed.device)] = value.to(
            changed
        )
        return changed


def _probability(logits: Tensor, answers: Sequence[int]) -> Tensor:
    """P(answer) of each row (rows,), on the host."""
    return logits.softmax(-1).cpu()[torch.arange(len(answers)), torch.tensor(answers)]
