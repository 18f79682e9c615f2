"""Observations of a real (tiny, random) model against forward passes written out by hand."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import log_softmax
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from edit_cli.lm.model import LM
from edit_cli.metrics.observe import ObserveOptions, observe
from edit_cli.metrics.scores import probe_values
from edit_cli.requests import Case, Probe

PIECES = ["Rome", " Rome", "Paris", " Paris", " is", " in", "The", " tower", " New", " York", "<eos>"]


@pytest.fixture(scope="module")
def lm() -> LM:
    """Words with and without their leading space are different tokens, as in GPT-2."""
    scores = [(piece.replace(" ", "▁"), -1.0) for piece in PIECES] + [("<unk>", -20.0)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=len(scores) - 1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(scores), n_positions=24, n_embd=16, n_layer=2, n_head=2, eos_token_id=10, bos_token_id=10
    )
    return LM(GPT2LMHeadModel(config), fast)


def by_hand(lm: LM, pieces: list[str], targets: int) -> tuple[float, list[bool]]:
    """Mean nll and hits of the last `targets` pieces, from one plain forward pass."""
    ids = torch.tensor([PIECES.index(piece) for piece in pieces])
    with torch.no_grad():
        logits = log_softmax(lm.model(ids[None]).logits[0, -targets - 1 : -1].double(), dim=-1)
    return -logits.gather(1, ids[-targets:, None]).mean().item(), (logits.argmax(-1) == ids[-targets:]).tolist()


def test_the_target_is_scored_with_its_leading_space(lm):
    """The reference fault: without the space another token is scored, and edits that succeed are reported as
    failures.
    """
    case = Case("1", (), (Probe("rewrite", "The tower is in", "Rome", "Paris"),))
    (seen,) = observe(lm, [case], ObserveOptions(generate=False))
    (probe,) = seen["probes"]
    prompt = ["The", " tower", " is", " in"]
    spaced, bare = by_hand(lm, [*prompt, " Rome"], 1), by_hand(lm, [*prompt, "Rome"], 1)
    assert probe["target_nll"] == pytest.approx(spaced[0], abs=1e-5) and probe["target_hits"] == spaced[1]
    assert probe["foil_nll"] == pytest.approx(by_hand(lm, [*prompt, " Paris"], 1)[0], abs=1e-5)
    assert abs(spaced[0] - bare[0]) > 1e-3


def test_a_model_that_says_it_is_scored_as_right(lm):
    """All logits but that of " Rome" pushed down: exactly that token is the answer, by likelihood and by generation."""
    bias = torch.zeros(len(PIECES) + 1)
    bias[PIECES.index(" Rome")] = 50.0
    handle = lm.model.lm_head.register_forward_hook(lambda *seen: seen[-1] + bias)
    try:
        case = Case(
            "1", (), (Probe("rewrite", "The tower is in", "Rome", "Paris"), Probe("locality", "The tower", "New York"))
        )
        (after,) = observe(lm, [case], ObserveOptions(max_new_tokens=1))
    finally:
        handle.remove()
    (before,) = observe(lm, [case], ObserveOptions(max_new_tokens=1))
    values = probe_values({"before": before, "after": after}, "after")
    for name in ("success", "accuracy", "token_accuracy", "generated_exact", "generated_contains"):
        assert values[f"efficacy_{name}"] == 100.0
    assert values["locality_token_accuracy"] == 0.0
    agreeing = [
        a == b for a, b in zip(before["probes"][1]["target_predicted"], [PIECES.index(" Rome")] * 2, strict=True)
    ]
    assert values["locality_unchanged"] == 50.0 * sum(agreeing)


def test_several_tokens_are_averaged(lm):
    case = Case("1", (), (Probe("rewrite", "The tower is in", "New York"),))
    (seen,) = observe(lm, [case], ObserveOptions(generate=False))
    nll, hits = by_hand(lm, ["The", " tower", " is", " in", " New", " York"], 2)
    assert seen["probes"][0]["target_nll"] == pytest.approx(nll, abs=1e-5)
    assert seen["probes"][0]["target_hits"] == hits and len(hits) == 2


def test_the_rest_of_the_batch_does_not_matter(lm):
    prompts = ["The", "The tower", "The tower is in", "Rome is in"]
    cases = [
        Case(prompt, (), (Probe("rewrite", prompt, "Rome", "New York"), Probe("generation", prompt)))
        for prompt in prompts
    ]
    options = ObserveOptions(max_new_tokens=4, sample_tokens=12)
    together = observe(lm, cases, options, texts=["The tower is in Rome"])
    for case, seen in zip(cases, together, strict=True):
        (alone,) = observe(lm, [case], options, texts=["The tower is in Rome"])
        assert alone["texts"] == seen["texts"] and alone["perplexity"] == seen["perplexity"]
        for a, b in zip(alone["probes"], seen["probes"], strict=True):
            assert a["generated"] == b["generated"]
            assert [a["target_nll"], a["foil_nll"]] == pytest.approx([b["target_nll"], b["foil_nll"]], abs=1e-5)


def test_a_prompt_beyond_the_context_fails_its_case_only(lm):
    cases = [
        Case("1", (), (Probe("rewrite", "The tower", "Rome"),)),
        Case("2", (), (Probe("rewrite", "The" + " tower" * 30, "Rome"),)),
    ]
    fine, bad = observe(lm, cases, ObserveOptions())
    assert "error" not in fine and "more than the model's 24" in bad["error"]
