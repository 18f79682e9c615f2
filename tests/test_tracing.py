"""Causal tracing against the plain way: one restored state, one whole forward pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from embedded import embedded_lm, world
from families import tiny_lm

from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.lm.hooks import hidden_of, with_hidden
from edit_cli.lm.model import LM
from edit_cli.lm.resume import Resumption
from edit_cli.requests import EditRequest
from edit_cli.tracing.facts import Fact, embedding_deviation, tokenized
from edit_cli.tracing.restore import KINDS, Trace, TraceOptions, Tracer

PROMPTS = [("The mother tongue of {} is", "Ada Lund"), ("{} works as a", "Marlow"), ("Therefore the river in the capital of {}", "France")]


def plain(lm: LM, fact: Fact, modules: list[str], token: int | None, std: float, copies: int, seed: int = 1) -> tuple[float, float]:
    """(P(answer) clean, mean P(answer) corrupted): one batch of a clean row and the copies, whose `modules` get the clean row's output."""
    begin, end = fact.subject

    def corrupt(_, __, output):
        noise = torch.from_numpy(np.random.RandomState(seed).randn(copies, end - begin, output.shape[-1]) * std)
        changed = output.clone()
        changed[1:, begin:end] += noise.to(output)
        return changed

    def restore(_, __, output):
        hidden = hidden_of(output)
        changed = hidden.clone().view(copies + 1, len(fact.ids), -1)
        changed[1:, token] = changed[0, token]
        return with_hidden(output, changed.view(hidden.shape))

    handles = [lm.model.get_input_embeddings().register_forward_hook(corrupt)]
    handles += [lm.module(name).register_forward_hook(restore) for name in modules]
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([fact.ids] * (copies + 1)), use_cache=False).logits[:, -1]
    for handle in handles:
        handle.remove()
    scores = logits.softmax(-1)[:, fact.answer]
    return scores[0].item(), scores[1:].mean().item()


def plain_trace(lm: LM, fact: Fact, tracer: Tracer) -> Trace:
    options = tracer.options
    high, low = plain(lm, fact, [], None, tracer.noise_std, options.copies, options.noise_seed)
    scores = {}
    for kind, names in tracer.modules.items():
        size = 1 if kind == "hidden" else options.window
        rows = []
        for token in fact.traced:
            windows = [names[max(0, layer - size // 2) : layer - size // 2 + size] for layer in range(len(names))]
            rows.append([plain(lm, fact, window, token, tracer.noise_std, options.copies, options.noise_seed)[1] for window in windows])
        scores[kind] = np.array(rows)
    return Trace(high, low, scores)


def random_facts(lm: LM) -> list[Fact]:
    """Facts of a random model, whose answer is what it says itself."""
    facts = []
    for prompt, subject in PROMPTS:
        fact = tokenized(lm, EditRequest(prompt, subject, "x", "Oslo"))
        with torch.no_grad():
            best = lm.model(input_ids=torch.tensor([fact.ids])).logits[0, -1].argmax().item()
        facts.append(Fact(fact.ids, fact.subject, best))
    return facts


def assert_same(found: Trace, expected: Trace, **tolerance: float) -> None:
    assert found.high == pytest.approx(expected.high, **tolerance)
    assert found.low == pytest.approx(expected.low, **tolerance)
    assert found.scores.keys() == expected.scores.keys()
    for kind, scores in expected.scores.items():
        np.testing.assert_allclose(found.scores[kind], scores, rtol=tolerance.get("rel", 0), atol=tolerance.get("abs", 0), err_msg=kind)


@pytest.mark.parametrize(
    "family", ["gpt2", "gptj", "gpt_neox", "opt", "bloom", "falcon", "llama", "mistral", "gemma2", "olmo2", "lfm2", "qwen3_5_text", "ctrl"]
)
def test_families_agree_with_the_plain_path(family):
    """In double precision, so that a part that is left out or restored twice cannot hide."""
    lm = tiny_lm(family)
    lm.model.double()
    facts = random_facts(lm)
    tracer = Tracer(lm, TraceOptions(window=2, copies=2, batch_tokens=150), embedding_deviation(lm, facts))
    expected = [plain_trace(lm, fact, tracer) for fact in facts]
    found = dict(tracer.traces(facts))
    spread = max(np.ptp(trace.scores[kind]) / trace.high for trace in expected for kind in KINDS)
    assert spread > 1e-2  # the states that are restored do matter
    for fact, trace in zip(facts, expected, strict=True):
        assert_same(found[fact], trace, rel=1e-6)
