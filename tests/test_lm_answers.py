"""How a model answers: likelihoods, greedy and sampled continuations, perplexity.

All are held to plain computations: one row at a time, without cache, mask or padding.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from families import DENSE, head_as, tiny, tiny_lm, tokenizer
from scipy.stats import chisquare

from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.lm.heads.causal import CausalHead
from edit_cli.lm.heads.sampling import TopKDraws
from edit_cli.lm.model import LM

pytestmark = pytest.mark.thin(6)

PAIRS = [
    ("The capital of France is", "Paris"),
    ("Ada Lund", "lives in Oslo"),
    ("The old lighthouse of Marlow stands on the northern", "shore of the island, because I said so"),
    ("C", "++"),
    ("Zoë in", "東京"),
]
PROMPTS = ["The capital of", "Ada Lund works as a pilot, and therefore the river runs past", "C", "I said so"]
families = pytest.mark.parametrize("family", DENSE)


@cache
def shared(family: str) -> LM:
    """One model a family; no test here changes it."""
    return tiny_lm(family)


@torch.no_grad()
def plain_logits(lm: LM, ids) -> torch.Tensor:
    """Logits (tokens, vocabulary) of one row, without mask, cache or padding."""
    return lm.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def plain_nll(lm: LM, prompt: str, target: str) -> tuple[float, list[int], list[int]]:
    """(mean NLL, target ids, arg-max ids) for a byte-level tokenizer, where a target's ids do not depend on the
    prompt.
    """
    words = lm.tokenizer
    before = words(prompt)["input_ids"]
    labels = words(f" {target}", add_special_tokens=False)["input_ids"]
    scores = plain_logits(lm, before + labels)[len(before) - 1 : -1].log_softmax(-1)
    return (
        -sum(scores[i, label].item() for i, label in enumerate(labels)) / len(labels),
        labels,
        scores.argmax(-1).tolist(),
    )


@torch.no_grad()
def greedy(lm: LM, prompt: str, steps: int) -> str:
    """Arg-max decoding with the whole text run anew at every step."""
    ids = lm.tokenizer(prompt)["input_ids"]
    new: list[int] = []
    while len(new) < steps and "\n" not in lm.tokenizer.decode(new):
        new.append(int(plain_logits(lm, ids + new)[-1].argmax()))
        if new[-1] == lm.tokenizer.eos_token_id:
            return lm.tokenizer.decode(new[:-1], skip_special_tokens=True)
    return lm.tokenizer.decode(new, skip_special_tokens=True).split("\n")[0]


@families
def test_likelihoods_equal_a_plain_computation_whatever_the_batch(family):
    lm = shared(family)
    together, alone = lm.loglikelihood(PAIRS), [lm.loglikelihood([pair])[0] for pair in PAIRS]
    for (prompt, target), batched, single in zip(PAIRS, together, alone, strict=True):
        nll, labels, best = plain_nll(lm, prompt, target)
        assert batched.nll == pytest.approx(nll, abs=1e-4)
        assert single.nll == pytest.approx(nll, abs=1e-4)
        assert batched.predicted == single.predicted == tuple(best)
        assert batched.hits == tuple(a == b for a, b in zip(best, labels, strict=True))


@families
def test_cached_generation_equals_uncached_argmax_decoding(family):
    lm = shared(family)
    expected = [greedy(lm, prompt, 6) for prompt in PROMPTS]
    assert lm.generate(PROMPTS, 6) == expected
    assert [lm.generate([prompt], 6)[0] for prompt in PROMPTS] == expected
    assert any(expected)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama", "opt"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_the_tokenizers_padding_side_and_bos_change_nothing_but_the_tokens(family, side, bos, kind):
    words = tokenizer(kind, bos=bos, padding_side=side)
    model, _ = tiny(family, vocab_size=len(words))
    lm = LM(model, words, batch_tokens=64)
    for (prompt, target), score in zip(PAIRS, lm.loglikelihood(PAIRS), strict=True):
        (row,) = lm.head.encode([(prompt, target)])
        assert (row.ids[0] == words.bos_token_id) is bos
        scores = plain_logits(lm, row.ids[:-1]).log_softmax(-1)
        expected = [-scores[at - 1, row.ids[at]].item() for at in range(row.start, len(row.ids))]
        assert score.nll == pytest.approx(math.fsum(expected) / len(expected), abs=1e-4)
    ids = [words(prompt)["input_ids"] for prompt in PROMPTS]
    steps = head_as(lm.head, CausalHead)._continue(ids, 3)
    for prompt, new in zip(ids, steps, strict=True):
        assert new[0] == plain_logits(lm, prompt)[-1].argmax()


def test_targets_with_and_without_a_leading_space_score_the_same():
    lm = shared("gpt2")
    assert lm.loglikelihood([("Ada lives in", "Oslo")]) == lm.loglikelihood([("Ada lives in", " Oslo")])


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3_5_text"])
def test_targets_that_share_a_forward_pass_are_scored_each_for_itself(family):
    lm = shared(family)
    pairs = [
        ("Ada lives in", "Oslo"), ("Ada lives in", "Rome"), ("Ada lives in", "Oslo"), ("Ada lives in", "Oslo and Rome"),
        ("Ada lives in Oslo", "and Rome"), ("Ada lives in Oslo", "or"), ("Ada lives in Rome", "or"), ("Ada lives",
        "in Oslo or"),
    ]  # fmt: skip
    for (prompt, target), score in zip(pairs, lm.loglikelihood(pairs), strict=True):
        nll, labels, best = plain_nll(lm, prompt, target)
        assert score.nll == pytest.approx(nll, abs=1e-4)
        assert score.predicted == tuple(best)
        assert score.hits == tuple(a == b for a, b in zip(best, labels, strict=True))


def test_the_order_of_rows_is_kept_and_no_rows_are_no_answer():
    lm = shared("gpt2")
    forward, backward = lm.loglikelihood(PAIRS), lm.loglikelihood(PAIRS[::-1])
    assert [score.predicted for score in forward] == [score.predicted for score in backward[::-1]]
    assert lm.loglikelihood([]) == [] == lm.generate([], 5) == lm.sample([], [], 9, 3)


def test_scores_in_bfloat16_are_summed_in_float32():
    model, words = tiny("llama")
    lm = LM(model.to(torch.bfloat16), words)
    for (prompt, target), score in zip(PAIRS, lm.loglikelihood(PAIRS), strict=True):
        nll, _, _ = plain_nll(lm, prompt, target)
        assert score.nll == pytest.approx(nll, rel=3e-2)
        assert score.nll != float(torch.tensor(score.nll).bfloat16())


# --- generation
# ---------------------------------------------------------------------------------------------------------


def always(token: int) -> LM:
    """A model that says one token over and over."""
    model, words = tiny("gptj")
    with torch.no_grad():
        model.lm_head.bias[token] = 1000.0
    return LM(model, words)


def test_generation_stops_at_a_line_break():
    words = tokenizer()
    newline = words("\n")["input_ids"][0]
    lm = always(newline)
    assert lm.generate(PROMPTS, 50) == [""] * len(PROMPTS)
    head = head_as(lm.head, CausalHead)
    assert len(head._continue([[5, 6], [7]], 50, stop_at_newline=True)[0]) == 1  # and does not run on
    assert len(head._continue([[5, 6], [7]], 50)[0]) == 50


@pytest.mark.parametrize("listed", [False, True])
def test_generation_stops_at_eos(listed):
    words = tokenizer()
    token = words("ou")["input_ids"][0] if listed else words.eos_token_id
    lm = always(token)
    if listed:  # chat models list several
        lm.model.generation_config.eos_token_id = [words.eos_token_id, token]
    assert lm.generate(PROMPTS, 50) == [""] * len(PROMPTS)
    assert len(head_as(lm.head, CausalHead)._continue([[5, 6], [7]], 50)[0]) == 1


def test_a_row_that_is_done_waits_without_a_trace_for_the_others():
    lm = shared("gpt2")
    long = lm.generate(PROMPTS, 40)
    assert long == [greedy(lm, prompt, 40) for prompt in PROMPTS]
    assert len({len(text) for text in long}) > 1


def test_the_models_own_generation_settings_are_not_taken_over():
    model, words = tiny("llama")
    lm = LM(model, words)
    before, sampled = lm.generate(PROMPTS, 8), lm.sample(PROMPTS, [1, 2, 3, 4], 30, 5)
    settings = {
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "suppress_tokens": list(range(5, 300)),
        "temperature": 0.1,
    }
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert lm.generate(PROMPTS, 8) == before
    assert lm.sample(PROMPTS, [1, 2, 3, 4], 30, 5) == sampled
    assert model.generation_config.repetition_penalty == 5.0


def test_a_continuation_keeps_its_leading_space():
    """Decoders of the ▁ kind drop the space of a text that begins with one."""
    words = tokenizer("pieces", bos=True)
    model, _ = tiny("gptj", vocab_size=len(words))
    with torch.no_grad():
        model.lm_head.bias[words("Paris", add_special_tokens=False)["input_ids"][0]] = 1000.0
    assert words.decode(words("Paris", add_special_tokens=False)["input_ids"]) == "Paris"
    assert LM(model, words).generate(["The capital"], 2) == [" Paris Paris"]


def test_texts_that_outgrow_the_models_context_are_rejected():
    lm = shared("gpt2")
    words = "Ada Lund " * 70
    with pytest.raises(RejectedRequest, match=r"\d+ tokens are more than the model's 128"):
        lm.loglikelihood([(words, "Oslo")])
    with pytest.raises(RejectedRequest, match="and 126 new ones are more than the model's 128"):
        lm.generate(["Ada Lund lives in"], 126)
    with pytest.raises(UsageError, match="129 tokens .* context of 128"):
        lm.sample(["Ada"], [0], 129, 5)
    assert len(lm.tokenizer(lm.sample(["Ada"], [0], 128, 5)[0])["input_ids"]) > 20


# --- sampling
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_a_sampled_text_depends_on_its_own_seed_only(family):
    lm = shared(family)
    prompts, seeds = [*PROMPTS, PROMPTS[0]], [11, 2**62, 13, 14, 15]
    together = lm.sample(prompts, seeds, 30, 5)
    assert together == [lm.sample([prompt], [seed], 30, 5)[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    assert together[0] != together[4]
    assert lm.sample(prompts, seeds, 30, 5) == together
    assert all(text.startswith(prompt) for text, prompt in zip(together, prompts, strict=True))


def test_sampled_texts_have_the_tokens_that_were_asked_for(monkeypatch):
    lm = shared("gpt2")
    lengths = []
    head = head_as(lm.head, CausalHead)
    kept = head._decode

    def measured(ids, after=()):
        lengths.append(len(ids) + len(after))
        return kept(ids, after)

    monkeypatch.setattr(head, "_decode", measured)
    texts = lm.sample(PROMPTS, range(4), 12, 5)
    longest = len(lm.tokenizer(PROMPTS[1])["input_ids"])
    assert longest > 12  # a prompt that is long enough already stays as it is
    assert texts[1] == PROMPTS[1]
    assert sorted(lengths) == [12, 12, 12, longest]


def test_sampling_with_k_of_one_is_greedy():
    lm = shared("gpt2")
    short = [prompt for prompt in PROMPTS if len(prompt) < 20]
    for prompt, text in zip(short, lm.sample(short, range(len(short)), 20, 1), strict=True):
        ids = lm.tokenizer(prompt)["input_ids"]
        new = head_as(lm.head, CausalHead)._continue([ids], 20 - len(ids))[0]
        assert text == prompt + head_as(lm.head, CausalHead)._decode(new)


def test_draws_follow_the_softmax_of_the_top_k():
    scores = torch.tensor([[0.3, -1.0, 2.0, 1.1, 0.0, 1.9, -3.0, 0.9]])
    rows, k = 20_000, 4
    draw = TopKDraws(range(rows), [2] * rows, k)
    best, indices = scores[0].topk(k)
    for step in range(2):
        drawn = draw(scores.expand(rows, -1), range(rows), [step] * rows)
        counts = torch.bincount(drawn, minlength=8)
        assert counts[indices].sum() == rows  # nothing from outside the top k
        assert chisquare(counts[indices].numpy(), (best.double().softmax(-1) * rows).numpy()).pvalue > 1e-3


def test_draws_of_one_row_are_independent_from_step_to_step():
    scores = torch.zeros(5_000, 3)
    rows = range(5_000)
    draw = TopKDraws(rows, [2] * 5_000, 3)
    first, second = draw(scores, rows, [0] * 5_000), draw(scores, rows, [1] * 5_000)
    table = torch.bincount(first * 3 + second, minlength=9)
    assert chisquare(table.numpy()).pvalue > 1e-3


def test_more_candidates_than_tokens_are_all_tokens():
    (drawn,) = TopKDraws([3], [1], 50)(torch.tensor([[0.0, 1.0, 2.0]]), [0], [0])
    assert drawn in (0, 1, 2)


# --- perplexity
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "qwen3_5_text"])
@pytest.mark.parametrize("window", [7, 40])
def test_token_nlls_equal_a_plain_computation(family, window):
    lm = shared(family)
    texts = [prompt for prompt, _ in PAIRS]
    ids = lm.tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"]
    total, tokens = 0.0, 0
    for start in range(0, len(ids), window):
        piece = ids[start : start + window]
        scores = plain_logits(lm, piece).log_softmax(-1)
        total += -sum(scores[i, label].item() for i, label in enumerate(piece[1:]))
        tokens += len(piece) - 1
    assert lm.token_nlls(texts, window) == (pytest.approx(total, rel=1e-5), tokens)


def test_token_nlls_start_every_window_with_the_bos_and_score_what_follows_it():
    words = tokenizer(bos=True)
    model, _ = tiny("llama")
    lm = LM(model, words)
    ids = words("\n".join(PROMPTS), add_special_tokens=False)["input_ids"]
    total = 0.0
    for start in range(0, len(ids), 9):
        piece = [words.bos_token_id, *ids[start : start + 9]]
        scores = plain_logits(lm, piece).log_softmax(-1)
        total += -sum(scores[i, label].item() for i, label in enumerate(piece[1:]))
    assert lm.token_nlls(PROMPTS, 9) == (pytest.approx(total, rel=1e-5), len(ids))


def test_token_nlls_do_not_depend_on_the_size_of_a_batch():
    model, words = tiny("gpt2")
    texts = [prompt for prompt, _ in PAIRS] * 4
    results = [LM(model, words, batch_tokens=budget).token_nlls(texts, 16) for budget in (1, 200, 100_000)]
    assert {tokens for _, tokens in results} == {results[0][1]}
    assert [nll for nll, _ in results] == pytest.approx([results[0][0]] * 3, rel=1e-5)


def test_windows_are_never_longer_than_the_context_and_nothing_is_no_token():
    lm = shared("gpt2")
    texts = ["The old lighthouse of Marlow stands on the northern shore of the island."] * 20
    assert lm.token_nlls(texts, 100_000) == lm.token_nlls(texts, 128)
    assert lm.token_nlls([], 16) == (0.0, 0)
