"""What went wrong in the field's reference code, held to be right here. Faults with a home elsewhere:

statistics of an edited model → test_stats; key-value cache, padding and BOS → test_lm_answers, test_lm_tokens; families
and tuple outputs → test_lm_layout; scores right after an edit and at the end → test_commands; heavy imports →
test_architecture.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from embedded import prepared
from families import tiny_lm

from edit_cli.editors.finetune.ft import FT
from edit_cli.editors.locate.context_prefixes import ContextConfig, sample_contexts
from edit_cli.editors.locate.value_batch import ValueConfig
from edit_cli.editors.locate.value_optimization import optimize_values
from edit_cli.requests import EditRequest

REQUESTS = [
    EditRequest("The capital of {} is", "France", "Oslo"),
    EditRequest("Ada said that the old lighthouse of {} stands on the", "Marlow", "river"),
    EditRequest("{} lives in", "Ada Lund", "Rome"),
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_fine_tuning_trains_the_answer_position_whatever_side_the_tokenizer_pads(side):
    """Indexing mask.sum − 1 with left padding trains the wrong token: every row of a batch must learn its own
    answer.
    """
    lm = tiny_lm("gpt2")
    lm.tokenizer.padding_side = side
    edit = prepared(FT, layers=[0, 1], part="block", lr=5e-3, steps=60).edit(lm, REQUESTS)
    with lm.edited(edit):
        scores = lm.loglikelihood([(request.text, request.target_new) for request in REQUESTS])
    assert all(all(score.hits) for score in scores)


def test_a_target_is_the_same_with_and_without_its_leading_space():
    lm = tiny_lm("gpt2")
    with_space, without = lm.loglikelihood(
        [("The capital of France is", " Paris"), ("The capital of France is", "Paris")]
    )
    assert with_space == without


def test_prefixes_come_from_their_own_seed_and_leave_other_random_numbers_alone():
    lm = tiny_lm("gpt2")
    first = sample_contexts(lm, ContextConfig(seed=3))
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    before = torch.get_rng_state()
    again, other = sample_contexts(lm, ContextConfig(seed=3)), sample_contexts(lm, ContextConfig(seed=4))
    assert torch.equal(before, torch.get_rng_state())
    assert first == again != other


def test_prefixes_are_those_of_the_unedited_model():
    lm = tiny_lm("gpt2")
    plain = sample_contexts(lm, ContextConfig())
    with lm.edited(prepared(FT, layers=[1], lr=1e-1, steps=5).edit(lm, REQUESTS)):
        assert sample_contexts(lm, ContextConfig()) == plain


def test_braces_in_prompts_and_prefixes_are_ordinary_characters():
    lm = tiny_lm("gpt2")
    contexts = sample_contexts(lm, ContextConfig(prefixes=["{0} and {x}"]))
    request = EditRequest("In {b} the {} is", "Paris", "Rome")
    assert request.text == "In {b} the Paris is"
    found = optimize_values(lm, [request], 1, "block", ValueConfig(steps=2), contexts)
    assert torch.isfinite(found.target).all()


def test_a_batch_of_any_size_can_be_edited_in_one_call():
    lm = tiny_lm("llama")
    for count in (1, 2, 3):
        edit = prepared(FT, layers=[1], steps=2).edit(lm, REQUESTS[:count])
        assert len(edit.updates) == 1 and lm.attached == []
