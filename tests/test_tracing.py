"""Causal tracing against the plain way: one restored state, one whole forward pass."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from embedded import embedded_lm, world
from families import tiny_lm

from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.lm.fast.suffix_pass import SuffixForward
from edit_cli.lm.hooks import hidden_of, with_hidden
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest
from edit_cli.tracing.facts import Fact, embedding_deviation, tokenized
from edit_cli.tracing.restore import Trace, Tracer
from edit_cli.tracing.settings import TraceOptions

PROMPTS = [
    ("The mother tongue of {} is", "Ada Lund"),
    ("{} works as a", "Marlow"),
    ("Therefore the river in the capital of {}", "France"),
]


def plain(
    lm: LM, fact: Fact, modules: list[str], token: int | None, std: float, copies: int, seed: int = 1
) -> tuple[float, float]:
    """(P(answer) clean, mean P(answer) corrupted): one batch of a clean row and the copies, whose `modules` get the
    clean row's output.
    """
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
    scores: dict[str, Any] = {}
    for kind, names in tracer.modules.items():
        size = 1 if kind == "hidden" else options.window
        rows = []
        for token in fact.traced:
            windows = [names[max(0, layer - size // 2) : layer - size // 2 + size] for layer in range(len(names))]
            rows.append(
                [
                    plain(lm, fact, window, token, tracer.noise_std, options.copies, options.noise_seed)[1]
                    for window in windows
                ]
            )
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


def assert_same(found: Trace, expected: Trace, **tolerance: Any) -> None:
    assert found.high == pytest.approx(expected.high, **tolerance)
    assert found.low == pytest.approx(expected.low, **tolerance)
    assert found.scores.keys() == expected.scores.keys()
    for kind, scores in expected.scores.items():
        np.testing.assert_allclose(
            found.scores[kind], scores, rtol=tolerance.get("rel", 0), atol=tolerance.get("abs", 0), err_msg=kind
        )


@pytest.mark.parametrize(
    "family",
    [
        *("gpt2", "gptj", "gemma2", "qwen3_5_text"),
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt_neox", "opt", "bloom", "mistral", "lfm2", "ctrl")),
    ],
)
def test_families_agree_with_the_plain_path(family):
    """In double precision, so that a part that is left out or restored twice cannot hide."""
    lm = tiny_lm(family)
    lm.model.double()
    facts = random_facts(lm)
    tracer = Tracer(lm, TraceOptions(window=2, copies=2, batch_tokens=150), embedding_deviation(lm, facts))
    expected = [plain_trace(lm, fact, tracer) for fact in facts]
    found = dict(tracer.traces(facts))
    spread = max(np.ptp(trace.scores[kind]) / trace.high for trace in expected for kind in trace.scores)
    assert spread > 1e-2  # the states that are restored do matter
    for fact, trace in zip(facts, expected, strict=True):
        assert_same(found[fact], trace, rel=1e-6)


@pytest.fixture(scope="module")
def known() -> tuple[LM, list[Fact]]:
    lm = embedded_lm()
    return lm, [tokenized(lm, case.requests[0]) for case in world()[:8]]


def test_embedded_model_agrees_with_the_plain_path(known):
    lm, facts = known
    tracer = Tracer(lm, TraceOptions(window=3, copies=2), embedding_deviation(lm, facts) * 3)
    for fact, trace in tracer.traces(facts[:1]):
        assert_same(trace, plain_trace(lm, fact, tracer), abs=1e-4)


def test_what_is_batched_together_does_not_matter(known):
    lm, facts = known
    options: dict[str, Any] = {"kinds": ["hidden", "mlp"], "window": 2, "copies": 2}
    together, apart = (
        list(Tracer(lm, TraceOptions(**options, batch_tokens=size), 0.2).traces(facts[:4])) for size in (4000, 60)
    )
    assert [fact for fact, _ in together] == facts[:4]
    for (_, one), (_, other) in zip(together, apart, strict=True):
        assert_same(one, other, abs=1e-5)


def test_whole_rows_are_run_where_a_cached_prefix_does_not_fit(known, monkeypatch):
    lm, facts = known
    tracer = Tracer(lm, TraceOptions(window=2, copies=2), 0.2)
    expected = [trace for _, trace in tracer.traces(facts[:2])]
    notes: list[str] = []
    monkeypatch.setattr(lm.monitor, "note", notes.append)
    monkeypatch.setattr(SuffixForward, "agrees", lambda *_: False)
    whole = Tracer(lm, TraceOptions(window=2, copies=2), 0.2)
    for (_, trace), other in zip(whole.traces(facts[:2]), expected, strict=True):
        assert_same(trace, other, abs=1e-5)
    assert len(notes) == 1 and "cached prefix" in notes[0]


def test_the_trace_shows_where_the_embedded_model_was_made_to_look_facts_up(known):
    """A mask in training lets nothing but the subject's last token out, and that from block 4 on."""
    lm, facts = known
    tracer = Tracer(lm, TraceOptions(kinds=["hidden", "attn"], window=1, copies=3), 3 * embedding_deviation(lm, facts))
    state, attention, total = [], [], []
    for fact, trace in tracer.traces(facts):
        state.append(trace.scores["hidden"][fact.roles.index("subject_last")] - trace.low)
        attention.append(trace.scores["attn"][-1] - trace.low)
        total.append(trace.high - trace.low)
    by_state, by_attention, whole = np.mean(state, 0), np.mean(attention, 0), np.mean(total)
    assert whole > 0.5
    assert by_state[:4].min() > 0.4 * whole > by_state[4] > by_state[5] == pytest.approx(0, abs=1e-6)
    assert by_attention[4:].min() > 0.3 * whole and by_attention[1:4].max() < 0.05


def test_last_tokens_state_brings_everything_back(known):
    """Its last layer alone decides the answer, and no other token's matters there."""
    lm, facts = known
    for _, trace in Tracer(lm, TraceOptions(kinds=["hidden"], copies=2), 0.3).traces(facts[:3]):
        assert trace.scores["hidden"][-1, -1] == pytest.approx(trace.high, abs=1e-5)
        np.testing.assert_allclose(trace.scores["hidden"][:-1, -1], trace.low, atol=1e-6)


def test_roles():
    def roles(length: int, subject: tuple[int, int]) -> tuple[str, ...]:
        return Fact(tuple(range(length)), subject, 0).roles

    first, middle, end, after, further, last = (
        "subject_first",
        "subject_middle",
        "subject_last",
        "after_subject",
        "further",
        "last",
    )
    assert roles(9, (1, 5)) == (first, middle, middle, end, after, further, further, last)
    assert roles(4, (0, 2)) == (first, end, after, last)
    assert roles(3, (1, 2)) == (end, last)
    assert roles(2, (0, 2)) == (first, end)


def test_subject_tokens_are_those_that_hold_its_characters():
    lm = tiny_lm("gpt2")
    request = EditRequest("The mother tongue of {} is", "Zoë Lund", "x", "Norwegian")
    fact = tokenized(lm, request)
    begin, end = fact.subject
    assert lm.tokenizer.decode(fact.ids[begin:end]).strip() == "Zoë Lund"
    assert lm.tokenizer.decode(fact.ids) == request.text
    assert " Norwegian".startswith(lm.tokenizer.decode([fact.answer]))
    weights = lm.model.get_input_embeddings().weight[list(fact.ids[begin:end])]
    assert embedding_deviation(lm, [fact]) == pytest.approx(weights.std().item(), rel=1e-6)
    for unusable in (EditRequest("{} is", "Ada", "x"), EditRequest("Ada is", None, "x", "y")):
        with pytest.raises(RejectedRequest, match="target_true|names none"):
            tokenized(lm, unusable)


def test_options_are_checked():
    wrong: dict[str, Any] = {"kinds": ["mlp", "mpl"], "window": 0, "noise": 0.0, "noise_std": math.inf}
    for name, value in wrong.items():
        with pytest.raises(UsageError, match=f"protocol.{name}="):
            TraceOptions(**{name: value})
