"""Generation pads on the left.

Models that read padding like text are noticed, and continue equally long prompts together only.
"""

from __future__ import annotations

import pytest
from families import DENSE, head_as, quiet, shake, tiny_lm, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from edit_cli.lm.heads.causal import CausalHead
from edit_cli.lm.model import LM

PROMPTS = ["The capital of France is", "Ada", "Ada Lund lives in Oslo, and Ada", "Rome", "Zoë"]


def recurrent() -> LM:
    """A tiny random RWKV."""
    words = tokenizer()
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "attention_hidden_size": 32,
        "intermediate_size": 88,
        "context_length": 128,
    }
    with quiet():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", vocab_size=len(words), **sizes)).eval()
    shake(model, 0)
    return LM(model, words)


@pytest.mark.parametrize("family", DENSE)
def test_attention_takes_it(family):
    assert head_as(tiny_lm(family).head, CausalHead).takes_left_padding


def test_recurrence_does_not_and_texts_do_not_depend_on_their_batch():
    lm = recurrent()
    alone = [lm.generate([prompt], 6)[0] for prompt in PROMPTS]
    sampled = [lm.sample([prompt], [seed], 20, 5)[0] for seed, prompt in enumerate(PROMPTS)]
    assert not head_as(lm.head, CausalHead).takes_left_padding
    assert lm.generate(PROMPTS, 6) == alone
    assert lm.sample(PROMPTS, range(len(PROMPTS)), 20, 5) == sampled
    lm.head.__dict__["takes_left_padding"] = True
    assert lm.generate(PROMPTS, 6) != alone


def test_it_is_measured_only_where_there_are_several_rows():
    lm = tiny_lm("gpt2")
    lm.generate(["Ada"], 3)
    assert "takes_left_padding" not in vars(lm.head)
    lm.generate(["Ada", "The capital of France is"], 3)
    assert vars(lm.head)["takes_left_padding"]


def test_scores_of_a_recurrent_model_do_not_depend_on_their_batch():
    lm = recurrent()
    pairs = [(prompt, "Paris") for prompt in PROMPTS]
    together = [score.nll for score in lm.loglikelihood(pairs)]
    assert together == pytest.approx([lm.loglikelihood([pair])[0].nll for pair in pairs], abs=1e-4)
