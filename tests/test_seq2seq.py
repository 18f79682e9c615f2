"""Encoder-decoder models: the two questions, held to plain transformers computations; where they keep things; edits
and their undo.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from embedded import prepared, same_bits, snapshot
from families import CONTEXT, DECODER, ENCODER, SEQ2SEQ, WIDTH, distributions, head_as, tiny, tiny_lm, tokenizer
from transformers import T5ForConditionalGeneration

from edit_cli.editors.finetune.ft import FT
from edit_cli.editors.retrieval.lookup import Lookup
from edit_cli.edits import store as edit_store
from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.lm.heads.seq2seq import Seq2SeqHead
from edit_cli.lm.layout import LayoutOptions, discover
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.lm.reading import HookPoint, read
from edit_cli.requests import EditRequest

pytestmark = pytest.mark.thin(2)

PAIRS = [
    ("What is the capital of France?", "Paris"),
    ("Where does Ada Lund live?", "in Oslo, because I said so"),
    ("Q", "東京"),
    ("On which shore does the old lighthouse of Marlow stand, therefore?", "northern"),
]
families = pytest.mark.parametrize("family", SEQ2SEQ)


@cache
def shared(family: str) -> LM:
    """One model a family; no test here changes it."""
    return tiny_lm(family)


def plain(lm: LM, prompt: str, target: str) -> tuple[list[float], list[int], list[int]]:
    """(nll of each target token, target ids, arg-max ids): one row, the labels shifted by transformers itself."""
    words = lm.tokenizer
    labels = words(text_target=target)["input_ids"]
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([words(prompt)["input_ids"]]), labels=torch.tensor([labels])).logits[0]
    own = [at for at, token in enumerate(labels) if token not in words.all_special_ids]
    scores = logits.float().log_softmax(-1)
    return [-scores[at, labels[at]].item() for at in own], [labels[at] for at in own], scores.argmax(-1)[own].tolist()


@families
def test_likelihoods_equal_a_plain_computation_whatever_the_batch(family):
    lm = shared(family)
    together, alone = lm.loglikelihood(PAIRS), [lm.loglikelihood([pair])[0] for pair in PAIRS]
    for (prompt, target), batched, single in zip(PAIRS, together, alone, strict=True):
        nll, labels, best = plain(lm, prompt, target)
        assert batched.nll == pytest.approx(sum(nll) / len(nll), abs=1e-4)
        assert single.nll == pytest.approx(batched.nll, abs=1e-4)
        assert batched.predicted == single.predicted == tuple(best)
        assert batched.hits == tuple(a == b for a, b in zip(best, labels, strict=True))
    for scores, (prompt, target) in zip(distributions(lm, PAIRS), PAIRS, strict=True):
        nll, labels, _ = plain(lm, prompt, target)
        torch.testing.assert_close(-scores[range(len(labels)), labels], torch.tensor(nll), atol=1e-4, rtol=1e-4)


@families
def test_the_end_token_belongs_to_what_is_written_and_not_to_what_is_scored(family):
    lm = shared(family)
    rows = lm.head.encode(PAIRS[:2])
    scored, written = lm.head.answers(rows), lm.head.answers(rows, end=True)
    assert scored.labels.tolist() == [i for row in rows for i in row.target]
    assert written.labels.tolist() == [i for row in rows for i in (*row.target, lm.tokenizer.eos_token_id)]
    assert written.rows.bincount().tolist() == [len(row.target) + 1 for row in rows]
    kept = written.labels != lm.tokenizer.eos_token_id
    torch.testing.assert_close(written.logits[kept], scored.logits)


@families
def test_greedy_answers_equal_those_of_transformers(family):
    lm = tiny_lm(family)
    lm.model.generation_config.forced_eos_token_id = None  # BART's cuts off the last token of a text that does not end
    prompts = [prompt for prompt, _ in PAIRS]
    expected = []
    for prompt in prompts:
        # as in the files of published models
        forced = {"forced_bos_token_id": lm.tokenizer.bos_token_id} if family == "bart" else {}
        ids = lm.tokenizer(prompt, return_tensors="pt")["input_ids"]
        output = lm.model.generate(
            input_ids=ids, max_new_tokens=6 + len(forced), do_sample=False, num_beams=1, **forced
        )
        expected.append(lm.tokenizer.decode(output[0], skip_special_tokens=True).split("\n")[0])
    assert lm.generate(prompts, 6) == expected
    assert [lm.generate([prompt], 6)[0] for prompt in prompts] == expected
    assert any(expected)


@families
def test_the_tokenizers_padding_side_changes_nothing(family):
    model, words = tiny(family)
    words.padding_side = "left"
    lm = LM(model, words, batch_tokens=40)
    for one, other in zip(lm.loglikelihood(PAIRS), shared(family).loglikelihood(PAIRS), strict=True):
        assert one.nll == pytest.approx(other.nll, abs=1e-4) and one.predicted == other.predicted
    assert lm.generate([PAIRS[0][0], PAIRS[3][0]], 4) == shared(family).generate([PAIRS[0][0], PAIRS[3][0]], 4)


def test_the_start_token_and_what_the_tokenizer_puts_first_are_fed_and_not_scored():
    for family, first in (("t5", (0,)), ("bart", (2, 1))):
        lm = shared(family)
        fed: list[Any] = []
        (row,) = lm.head.encode([PAIRS[0]])
        decoder = lm.model.get_decoder()
        handle = decoder.register_forward_pre_hook(
            lambda _, __, given, fed=fed: fed.append(given["input_ids"]), with_kwargs=True
        )
        scores = lm.head.answers([row])
        handle.remove()
        assert tuple(fed[0][0].tolist()) == (*first, *row.target[:-1])
        assert tuple(scores.labels.tolist()) == row.target and head_as(lm.head, Seq2SeqHead).lead == first


@families
def test_sampled_answers_depend_on_their_seeds_alone(family):
    lm = shared(family)
    prompts = [prompt for prompt, _ in PAIRS]
    together = lm.sample(prompts, [1, 2, 3, 4], 24, 5)
    assert together == [
        lm.sample([prompt], [seed], 24, 5)[0] for prompt, seed in zip(prompts, (1, 2, 3, 4), strict=True)
    ]
    assert all(text.startswith(prompt + " ") for text, prompt in zip(together, prompts, strict=True))
    assert together != lm.sample(prompts, [5, 6, 7, 8], 24, 5)


LAYOUTS = {
    "t5": (("encoder.block", "layer.1.DenseReluDense.wo", "encoder.final_layer_norm"),
           ("decoder.block", "layer.2.DenseReluDense.wo", "decoder.final_layer_norm"), ("wi",)),
    "t5_v1_1": (("encoder.block", "layer.1.DenseReluDense.wo", "encoder.final_layer_norm"),
                ("decoder.block", "layer.2.DenseReluDense.wo", "decoder.final_layer_norm"), ("wi_0", "wi_1")),
    "bart": (("model.encoder.layers", "fc2", "model.encoder.layers.2"), ("model.decoder.layers", "fc2",
    "model.decoder.layers.1"), ("fc1",)),
}  # fmt: skip


@families
def test_layout_is_found_on_both_stacks(family):
    layout = shared(family).layout
    *expected, ins = LAYOUTS[family]
    assert [(stack.name, stack.first, stack.depth) for stack in layout.stacks] == [
        ("encoder", 0, ENCODER),
        ("decoder", ENCODER, DECODER),
    ]
    assert [(stack.blocks, layout.mlp(stack.first).out, stack.final_norm) for stack in layout.stacks] == expected
    assert (layout.depth, layout.width, layout.prompt_depth) == (ENCODER + DECODER, WIDTH, ENCODER)
    for layer in range(layout.depth):
        stack = layout.stack(layer)
        out = layout.mlp(layer).out
        parent = out.rpartition(".")[0]
        names = [f"{parent}.{name}".lstrip(".") for name in ins] + [out]
        block = f"{stack.blocks}.{layer - stack.first}"
        assert layout.mlp_weights(layer) == tuple(f"{block}.{name}.weight" for name in names)
        assert layout.mlp_weights(layer, second_in=False) == tuple(
            f"{block}.{name}.weight" for name in (names[0], names[-1])
        )
    assert layout.last_layers(2) == [1, 2, 3, 4] and layout.last_layers(1) == [2, 4]
    with pytest.raises(
        UsageError, match=r"layer 5 does not exist: .* 0 to 4 \(0 to 2 in the encoder, 3 to 4 in the decoder\)"
    ):
        layout.block(5)
    with pytest.raises(UsageError, match="an encoder and a decoder"):
        discover(shared(family).model, LayoutOptions(blocks="encoder.block"))


@families
def test_final_states_of_the_prompt_are_the_encoders(family):
    lm = shared(family)
    rows = lm.head.encode([(prompt, None) for prompt, _ in PAIRS])
    found = read(
        lm, rows, [len(row.ids) - 1 for row in rows], [HookPoint(lm.layout.final_norm, "output")], reduce="mean"
    )[0]
    for row, mean in zip(rows, found, strict=True):
        with torch.no_grad():
            states = lm.model.get_encoder()(input_ids=torch.tensor([row.ids])).last_hidden_state[0]
        torch.testing.assert_close(mean, states.mean(0), atol=1e-5, rtol=1e-4)


@families
@pytest.mark.parametrize("layer", [ENCODER - 1, ENCODER + DECODER - 1])
def test_an_edit_is_written_in_either_stack_and_comes_off_exactly(family, layer, tmp_path):
    lm = tiny_lm(family)
    requests = [EditRequest(prompt, None, target) for prompt, target in (PAIRS[0], PAIRS[3])]
    pairs = [(request.text, request.target_new) for request in requests]
    before, untouched = lm.loglikelihood(pairs), snapshot(lm)
    edit = prepared(FT, layers=[layer], lr=1e-1, steps=100).edit(lm, requests)
    assert same_bits(snapshot(lm), untouched)
    assert list(edit.updates) == [f"{lm.layout.mlp_out(layer)}.weight"]
    edit_store.save(edit, tmp_path / "edit", lm, requests, {"name": "ft"})
    with lm.edited(edit):
        after, texts = lm.loglikelihood(pairs), lm.generate([prompt for prompt, _ in pairs], 8)
    assert all(new.nll < old.nll for new, old in zip(after, before, strict=True))
    if layer >= ENCODER:
        assert all(all(new.hits) for new in after) and not all(all(old.hits) for old in before)
        assert texts == [target for _, target in pairs]  # the end was learned too
    assert same_bits(snapshot(lm), untouched) and lm.loglikelihood(pairs) == before
    edit_store.attach(tmp_path / "edit", lm)
    assert lm.loglikelihood(pairs) == after
    lm.detach()
    assert same_bits(snapshot(lm), untouched)


def test_a_stored_answer_is_looked_up():
    lm = tiny_lm("t5")
    route = prepared(Lookup, mode="nearest", radius=1e-3).edit(lm, [EditRequest(PAIRS[0][0], None, "Rome")])
    with lm.edited(route):
        assert lm.generate([PAIRS[0][0], PAIRS[1][0]], 4) == ["Rome", shared("t5").generate([PAIRS[1][0]], 4)[0]]
        assert lm.loglikelihood([(PAIRS[0][0], "Rome")])[0].nll < 1e-6


@pytest.mark.parametrize("family", ["t5_v1_1", "bart"])
def test_a_saved_model_is_loaded_as_what_it_is(family, tmp_path):
    lm = shared(family)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    again = ModelOptions(name="copy", id=str(tmp_path), device="cpu").load()
    assert again.head.kind == "seq2seq" and again.loglikelihood(PAIRS) == lm.loglikelihood(PAIRS)
    assert again.fingerprint() == lm.fingerprint()
    with pytest.raises(UsageError, match="model.kind=x: choose auto, causal, seq2seq, classifier or image"):
        ModelOptions(name="copy", id=str(tmp_path), device="cpu", kind="x")  # type: ignore[arg-type]


def test_what_cannot_be_asked_is_refused():
    lm = shared("bart")
    with pytest.raises(RejectedRequest, match="target is empty"):
        lm.head.encode([("Who?", " ")])
    with pytest.raises(RejectedRequest, match=f"more than the model's {CONTEXT}"):
        lm.loglikelihood([("Paris " * 200, "Rome")])
    with pytest.raises(UsageError, match="model.perplexity_text=null"):
        lm.token_nlls(["Paris"], 8)
    with pytest.raises(UsageError, match="needs a causal language model"):
        prepared(FT, layers=[0], objective="prompt_last").edit(lm, [EditRequest("Who?", None, "Rome")])
    model, words = tiny("t5", decoder_start_token_id=None)
    model.generation_config.decoder_start_token_id = None
    assert isinstance(model, T5ForConditionalGeneration)
    with pytest.raises(UsageError, match="decoder_start_token_id"):
        LM(model, words).loglikelihood(PAIRS[:1])


def test_a_target_is_tokenized_without_a_leading_space():
    for kind in ("bytes", "pieces"):
        words = tokenizer(kind, eos=True)
        model, _ = tiny("t5", vocab_size=len(words))
        (row,) = LM(model, words).head.encode([("Where?", " Oslo ")])
        assert list(row.target) == words("Oslo", add_special_tokens=False)["input_ids"]
        assert row.after == (words.eos_token_id,) and row.ids[-1] == words.eos_token_id
