"""Fast paths against plain ones: the same numbers, computed as the papers' code does it. CPU seconds of one run."""

from __future__ import annotations

import random
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from common import LAYERS, clocked, random_model
from embedded import embedded_lm
from oracle import plain_value

from edit_cli.assets import FOLDER
from edit_cli.editors.finetune.ft import FT
from edit_cli.editors.locate.base import Subjects
from edit_cli.editors.locate.context_prefixes import BARE, ContextConfig, rows_in_contexts, sample_contexts
from edit_cli.editors.locate.solver import Covariance, solve
from edit_cli.editors.locate.value_batch import ValueConfig
from edit_cli.editors.locate.value_optimization import optimize_values
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.experiment.asking import Asker
from edit_cli.experiment.attempt import Attempt
from edit_cli.lm.edit import Added
from edit_cli.lm.fast import repeated_pass
from edit_cli.lm.hooks import on_input, on_output
from edit_cli.lm.layout import widths
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import pad_right
from edit_cli.metrics.observe import BeforeCache, ObserveOptions
from edit_cli.metrics.text import EntropyMeter
from edit_cli.requests import Case, EditRequest
from edit_cli.statistics.corpora import EmbeddedText
from edit_cli.statistics.moments import MomentStore


@dataclass(frozen=True)
class Ratio:
    """plain, fast: CPU seconds for the same work.

    A plain path that was run on a part of it is scaled up; `note` says so.
    """

    what: str
    plain: float
    fast: float
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.plain / self.fast


def value_optimization(lm: LM, requests: list[EditRequest], sample: int = 5) -> Ratio:
    """Whole rows, one at a time, and the whole model at every step, against the batched search."""
    contexts, options, some = sample_contexts(lm, ContextConfig()), ValueConfig(stop_loss=0.0), requests[:sample]
    optimize_values(lm, some, LAYERS[-1], "block", options, contexts)
    _, (plain, _) = clocked(
        lambda: [plain_value(lm, request, LAYERS[-1], "block", options, contexts) for request in some]
    )
    _, (fast, _) = clocked(lambda: optimize_values(lm, requests, LAYERS[-1], "block", options, contexts))
    what = f"value optimization, {len(requests)} edits, 20 steps"
    return Ratio(what, plain / len(some) * len(requests), fast, f"plain: {len(some)} edits, scaled")


def _keep(seen: list[torch.Tensor], at: int, states: torch.Tensor) -> None:
    seen.append(states[0, at].clone())


@torch.no_grad()
def plain_keys(lm: LM, requests: list[EditRequest], layer: int) -> torch.Tensor:
    """Keys (m, n) of a layer: whole prompts, one row at a time, through the whole model; states of the bare prompts
    likewise.
    """
    contexts, found = sample_contexts(lm, ContextConfig()), []
    for which, listen, module in (
        (contexts, on_input, lm.layout.mlp_out(layer)),
        (BARE, on_output, lm.layout.block(LAYERS[-1])),
    ):
        for row, at in zip(*rows_in_contexts(lm, requests, which, with_target=False), strict=True):
            seen: list[torch.Tensor] = []
            with listen(lm.module(module), partial(_keep, seen, at), 1):
                lm.model(input_ids=torch.tensor([row.ids]), use_cache=False)
            found.append(seen[0])
    count = len(requests) * len(contexts.texts)
    by_request = torch.stack(found[:count]).double().view(len(requests), len(contexts.texts), -1)
    return torch.einsum("ncm,c->mn", by_request, contexts.weights)


def keys_and_states(lm: LM, requests: list[EditRequest], sample: int = 10) -> Ratio:
    """What MEMIT reads before each layer is written, for all layers."""
    contexts, some = sample_contexts(lm, ContextConfig()), requests[:sample]

    def fast() -> list[torch.Tensor]:
        subjects = Subjects(lm, requests, contexts)
        return [(subjects.keys(layer), subjects.states(layer, LAYERS[-1], "block"))[0] for layer in LAYERS]

    fast()
    expected, (plain, _) = clocked(lambda: [plain_keys(lm, some, layer) for layer in LAYERS])
    found, (quick, _) = clocked(fast)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[:, : len(some)], theirs, rtol=1e-3, atol=1e-4)
    what = f"keys and states, {len(requests)} edits, {len(LAYERS)} layers"
    return Ratio(what, plain / len(some) * len(requests), quick, f"plain: {len(some)} edits, scaled")


def statistics(width: int = 256, depth: int = 12, tokens: int = 10_000) -> Ratio:
    """All layers in one pass, against one pass a layer that ends at that layer. Both multiply by the same code."""
    lm = random_model(width, depth)

    def collect(groups: list[list[int]], most: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            store = MomentStore(corpus=EmbeddedText(), tokens=most, cache_dir=folder)
            return clocked(lambda: [store.collect(lm, group) for group in groups])[1][0]

    collect([[0]], 500)
    layers = list(range(depth))
    plain, fast = collect([[layer] for layer in layers], tokens), collect([layers], tokens)
    return Ratio(f"second moments, {depth} layers of width {width}", plain, fast, f"{tokens:,} tokens")


def linear_algebra(count: int = 50, width: int = 2048, batches: int = 3) -> Ratio:
    """The m × m form at every batch, against the n × n form with one factorisation of C."""
    keys, residual = torch.randn(width, count, dtype=torch.float64), torch.randn(256, count, dtype=torch.float64)
    sample = torch.randn(width, 2 * width, dtype=torch.float64)
    covariance = Covariance(sample @ sample.T / (2 * width))

    def work(form: str) -> float:
        return clocked(lambda: [solve(residual, keys, covariance, 100.0, form) for _ in range(batches)])[1][0]

    return Ratio(f"solve, {batches} batches of {count} edits, keys {width:,} wide", work("primal"), work("dual"))


@torch.no_grad()
def plain_record(lm: LM, pairs: list[tuple[str, str]]) -> list[float]:
    """Mean negative log-likelihoods of one record's (prompt, target) rows in one padded batch, from the logits of
    every token.
    """
    rows = lm.head.encode(pairs)
    ids, mask = pad_right([row.ids for row in rows], lm.head.pad, lm.device)
    scores = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    return [
        -sum(float(found[row.start - 1 + j, token]) for j, token in enumerate(row.target)) / len(row.target)
        for row, found in zip(rows, scores, strict=True)
    ]


def evaluation(lm: LM, cases: list[Case]) -> list[Ratio]:
    """Scoring all records' prompts and targets together, against one record at a time, and against one row at a
    time.
    """
    by_record = [[(p.prompt, x) for p in case.probes if p.target for x in (p.target, p.foil) if x] for case in cases]
    pairs = [pair for record in by_record for pair in record]
    some = pairs[: len(pairs) // 10]
    lm.loglikelihood(some)
    together, (fast, _) = clocked(lambda: lm.loglikelihood(pairs))
    apart, (record, _) = clocked(lambda: [nll for rows in by_record for nll in plain_record(lm, rows)])
    alone, (row, _) = clocked(lambda: [plain_record(lm, [pair])[0] for pair in some])
    fast_nll = torch.tensor([found.nll for found in together])
    torch.testing.assert_close(fast_nll, torch.tensor(apart), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fast_nll[: len(some)], torch.tensor(alone), rtol=1e-3, atol=1e-3)
    return [
        Ratio(f"scoring {len(cases)} records ({len(pairs):,} rows), against one record at a time", record, fast),
        Ratio(
            "the same, against one row at a time",
            row * len(pairs) / len(some),
            fast,
            f"plain: {len(some)} rows, scaled",
        ),
    ]


def running_text(edits: int = 20) -> list[Ratio]:
    """The embedded text read by the embedded model with one edit after another, against whole passes; the same bits."""
    lm, generator = embedded_lm(), torch.Generator().manual_seed(0)
    texts = (FOLDER / "world" / "heldout.txt").read_text(encoding="utf-8").splitlines()
    ratios = []
    for layer in (0, 2, 5):
        name = lm.layout.mlp_out(layer)
        sizes = [(width, 1) for width in widths(lm.module(name))]
        made = [[torch.randn(*size, generator=generator) * 0.1 for size in sizes] for _ in range(edits)]

        def read() -> list[tuple[float, int]]:
            with lm.edited_by_row([{name: Added(left, right.T)} for left, right in made]):  # noqa: B023
                return [lm.token_nlls(texts, 2048, number) for number in range(edits)]

        found, (fast, _) = clocked(read)
        with patch.object(repeated_pass, "KEPT", 0):
            expected, (plain, _) = clocked(read)
        assert found == expected
        ratios.append(Ratio(f"running text read with {edits} edits, layer {layer} of 0 to 5", plain, fast))
    return ratios


def single_edits(cases: list[Case]) -> list[Ratio]:
    """What the embedded model says to records' prompts, each with an edit of its own in place, against attaching one
    after another.

    Rank-one edits of one projection, as ROME's; replies of 20 tokens at most, texts of 100.
    """
    lm = embedded_lm()
    name, generator = f"{lm.layout.mlp_out(0)}.weight", torch.Generator().manual_seed(0)
    d_out, d_in = widths(lm.module(lm.layout.mlp_out(0)))

    def edit() -> WeightDelta:
        left, right = (torch.randn(*shape, generator=generator) for shape in ((d_out, 1), (1, d_in)))
        return WeightDelta({name: Factors(left, right * 0.1 / d_in**0.5)})

    before, attempts = BeforeCache(ObserveOptions()), [Attempt(edit(), [case], {}, 0.0) for case in cases]
    before.observe(lm, cases)

    def ask(together: bool) -> tuple[list[Any], float]:
        asker = Asker(lm, before)
        parts = [attempts] if together else [[done] for done in attempts]  # one by itself is attached
        found, (seconds, _) = clocked(lambda: [seen for part in parts for _, seen in asker.answers(part)])
        return found, seconds

    ask(True)
    (found, fast), (expected, plain) = ask(True), ask(False)
    for mine, its in zip(found, expected, strict=True):
        for seen, other in zip(mine.values(), its.values(), strict=True):
            assert seen["texts"] == other["texts"]
            for probe, same in zip(seen["probes"], other["probes"], strict=True):
                assert probe["generated"] == same["generated"] and probe["target_hits"] == same["target_hits"]
    return [Ratio(f"asking about {len(cases)} single edits, against one after another", plain, fast)]


def fine_tuning(lm: LM, requests: list[EditRequest]) -> list[Ratio]:
    """Single edits of 25 steps by FT in a late layer, one after another and side by side, against running the blocks
    below at every step of each.
    """

    def alone(layer: int) -> list[WeightDelta]:
        editor = FT(FT.Config(layers=[layer], stop_loss=0.0), lm)
        return [editor.edit([request]) for request in requests]

    def together(layer: int) -> list[WeightDelta]:
        made = FT(FT.Config(layers=[layer], stop_loss=0.0), lm).edit_each([[request] for request in requests])
        assert made is not None
        return made

    ratios, depth = [], lm.layout.depth
    alone(depth - 1)
    for layer in (depth - 2, depth - 1):
        with patch.object(repeated_pass, "KEPT", 0):
            expected, (plain, _) = clocked(partial(alone, layer))
        what = f"FT, {len(requests)} single edits of 25 steps, layer {layer} of 0 to {depth - 1}"
        for title, way, tolerance in (("one after another", alone, 0.0), ("side by side", together, 1e-4)):
            found, (fast, _) = clocked(partial(way, layer))
            for mine, its in zip(found, expected, strict=True):
                for name, update in its.updates.items():
                    assert isinstance(update, torch.Tensor)
                    torch.testing.assert_close(mine.updates[name], update, rtol=0, atol=tolerance)
            ratios.append(Ratio(f"{what}, {title}", plain, fast))
    return ratios


def scoring(cases: list[Case], orders: int = 50) -> list[Ratio]:
    """Entropy of sampled texts, their words in many orders, against all words put to NLTK."""
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    sentences, words = PunktSentenceTokenizer(), NLTKWordTokenizer()
    lm, meter, rng = embedded_lm(), EntropyMeter(), random.Random(0)
    openings = [probe.prompt for case in cases for probe in case.probes if probe.target is None]
    written = [text.split(" ") for text in lm.sample(openings, range(len(openings)), 100, 5)]
    sampled = [" ".join(rng.sample(text, len(text))) for text in written for _ in range(orders)]
    plainly = EntropyMeter()
    plainly.words = lambda text: [  # type: ignore[method-assign]
        word for sentence in sentences.tokenize(text) for word in words.tokenize(sentence)
    ]
    meter("One, two.")
    plainly("One, two.")
    found, (fast, _) = clocked(lambda: [meter(text) for text in sampled])
    expected, (plain, _) = clocked(lambda: [plainly(text) for text in sampled])
    assert found == expected
    return [Ratio(f"entropy of {len(sampled):,} texts of 100 tokens, against all words put to NLTK", plain, fast)]


def texts(cases: list[Case]) -> list[Ratio]:
    """What the embedded model writes to the prompts of records, against batches whose rows stay until all have ended.

    Greedy replies have 20 tokens at most, sampled texts 100; both paths write the same.
    """
    lm = embedded_lm()
    head: Any = lm.head
    prompts = list(dict.fromkeys(probe.prompt for case in cases for probe in case.probes))
    openings = [probe.prompt for case in cases for probe in case.probes if probe.target is None]

    def write(together: bool) -> tuple[list[str], float, list[str], float]:
        head.__dict__["decodes_together"] = together
        lm.generate(prompts[:20], 20)
        greedy, (greedy_s, _) = clocked(lambda: lm.generate(prompts, 20))
        sampled, (sampled_s, _) = clocked(lambda: lm.sample(openings, range(len(openings)), 100, 5))
        return greedy, greedy_s, sampled, sampled_s

    greedy, fast_greedy, sampled, fast_sampled = write(True)
    plain_greedy, slow_greedy, plain_sampled, slow_sampled = write(False)
    assert (greedy, sampled) == (plain_greedy, plain_sampled)
    return [
        Ratio(
            f"{len(prompts):,} greedy replies, against batches that wait for their last row", slow_greedy, fast_greedy
        ),
        Ratio(f"{len(openings):,} sampled texts of 100 tokens, likewise", slow_sampled, fast_sampled),
    ]
