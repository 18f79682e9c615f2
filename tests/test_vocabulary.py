"""Tokenizers that know tokens for which their model has no embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny

from edit_cli.errors import RejectedRequest
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.lm.vocabulary import Vocabulary
from edit_cli.metrics.observe import ObserveOptions, observe
from edit_cli.monitor import Monitor
from edit_cli.requests import Case, EditRequest, Probe

STRANGE = "<|strange|>"
KINDS = {"gpt2": "Oslo", "t5": "Oslo", "bert": "SUPPORTS"}
PROMPTS = ["Ada Lund lives in", "The capital of France, which is well known, is"]


class Notes(Monitor):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def resized(family: str, more: int = 0) -> tuple[Any, Any]:
    """A model with as many embeddings as its tokenizer has tokens, and `more`."""
    model: Any
    model, words = tiny(family)
    model.resize_token_embeddings(len(words) + more)
    return model, words


def enlarged(family: str) -> LM:
    """A model of the family whose tokenizer has got two more tokens, one of them for padding."""
    model, words = resized(family)
    words.add_special_tokens({"pad_token": "<|pad|>"})
    words.add_tokens([STRANGE], special_tokens=True)
    return LM(model, words)


@pytest.fixture(scope="module", params=KINDS)
def both(request) -> tuple[LM, LM, str]:
    """The model with the tokenizer that it was made with, and with the other one; a target."""
    model, words = resized(request.param)
    return LM(model, words), enlarged(request.param), KINDS[request.param]


def test_texts_without_them_are_answered_as_ever(both) -> None:
    plain, lm, target = both
    pairs = [(prompt, target) for prompt in PROMPTS]
    expected, found = plain.loglikelihood(pairs), lm.loglikelihood(pairs)
    assert [one.nll for one in found] == pytest.approx([one.nll for one in expected], abs=1e-6)
    assert lm.generate(PROMPTS, 3) == plain.generate(PROMPTS, 3)


def test_a_text_with_one_is_rejected_alone(both) -> None:
    _, lm, target = both
    with pytest.raises(RejectedRequest, match=r"no embedding for the token '<\|strange\|>' \(\d+\) in 'Ada"):
        lm.loglikelihood([(f"Ada {STRANGE} lives in", target)])
    prompts = [PROMPTS[0], f"Ada {STRANGE} lives in", PROMPTS[1]]
    cases = [
        Case(str(n), (EditRequest(prompt, None, target),), (Probe("rewrite", prompt, target),))
        for n, prompt in enumerate(prompts)
    ]
    seen = observe(lm, cases, ObserveOptions(max_new_tokens=2, sample=False, perplexity=False))
    assert ["error" in one for one in seen] == [False, True, False]
    assert "rewrite probe" in seen[1]["error"] and STRANGE in seen[1]["error"]


def test_answers_with_one_are_rejected_too() -> None:
    for family in ("gpt2", "t5"):
        with pytest.raises(RejectedRequest, match="no embedding"):
            enlarged(family).loglikelihood([("Ada lives in", STRANGE)])


def test_running_text_is_read_without_them() -> None:
    lm = enlarged("gpt2")
    expected = lm.token_nlls(["Ada Lund lives in Oslo."], 16)
    assert lm.token_nlls([f"Ada Lund{STRANGE} lives in Oslo."], 16) == pytest.approx(expected)


def test_loading_compares_the_two(tmp_path: Path) -> None:
    lm = enlarged("gpt2")
    model: Any = lm.model
    model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    notes = Notes()
    loaded = ModelOptions("mine", str(tmp_path), device="cpu").load(notes)
    size = lm.head.vocabulary.size
    assert size == len(lm.tokenizer) - 2
    assert notes.notes == [
        f"mine: its tokenizer has 2 tokens ('<|pad|>', '<|strange|>') beyond its {size} embeddings; records that use"
        " them are left out"
    ]
    assert loaded.head.vocabulary.strange == {size: "<|pad|>", size + 1: STRANGE}


def test_a_tokenizer_with_fewer_tokens_than_embeddings_is_no_matter() -> None:
    model, words = resized("gpt2", 5)
    vocabulary = Vocabulary.of(model, words)
    assert vocabulary.strange == {}
    assert vocabulary.readable(torch.arange(4).tolist()) == [0, 1, 2, 3]


def test_the_models_own_tokens_may_be_too_many_as_well() -> None:
    model, words = resized("gpt2", -2)
    strange = Vocabulary.of(model, words).strange
    assert list(strange) == [len(words) - 2, len(words) - 1]
    assert strange[len(words) - 1] == words.convert_ids_to_tokens(len(words) - 1)
