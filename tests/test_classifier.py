"""Sequence classifiers: labels as targets, held to plain transformers computations; edits and their undo."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from embedded import prepared, same_bits, snapshot
from families import CLASSIFIERS, CONTEXT, DEPTH, LABELS, WIDTH, distributions, head_as, tiny, tiny_lm

from edit_cli.editors.finetune.ft import FT
from edit_cli.editors.locate.memit import MEMIT
from edit_cli.editors.locate.rome import ROME
from edit_cli.editors.retrieval.lookup import Lookup
from edit_cli.edits import store as edit_store
from edit_cli.errors import MissingError, RejectedRequest, UsageError
from edit_cli.lm.heads.classifier import ClassifierHead
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.lm.reading import HookPoint, read
from edit_cli.requests import EditRequest

CLAIMS = [
    "The capital of France is Paris.",
    "Ada Lund lives in Oslo, and therefore the river runs past Rome.",
    "C",
    "O'Brien's café is in 東京.",
]
PAIRS = list(zip(CLAIMS, ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO", "refutes"), strict=True))
NUMBERS = [1, 0, 2, 0]
families = pytest.mark.parametrize("family", CLASSIFIERS)


@cache
def shared(family: str) -> LM:
    """One model a family; no test here changes it."""
    return tiny_lm(family)


@torch.no_grad()
def plain(lm: LM, claim: str) -> torch.Tensor:
    """Log-probabilities of the labels: one row, as transformers' documentation shows it."""
    return (
        lm.model(**lm.tokenizer(claim, return_tensors="pt", return_token_type_ids=False))
        .logits[0]
        .float()
        .log_softmax(-1)
    )


@families
def test_likelihoods_equal_a_plain_computation_whatever_the_batch(family):
    lm = shared(family)
    together, alone = lm.loglikelihood(PAIRS), [lm.loglikelihood([pair])[0] for pair in PAIRS]
    for (claim, _), number, batched, single in zip(PAIRS, NUMBERS, together, alone, strict=True):
        scores = plain(lm, claim)
        best = int(scores.argmax())
        assert batched.nll == pytest.approx(-scores[number].item(), abs=1e-4)
        assert single.nll == pytest.approx(batched.nll, abs=1e-4)
        assert batched.predicted == single.predicted == (best,)
        assert batched.hits == (best == number,)
    for logprobs, claim in zip(distributions(lm, PAIRS), CLAIMS, strict=True):
        torch.testing.assert_close(logprobs[0], plain(lm, claim), atol=1e-4, rtol=1e-4)


@families
def test_the_answer_is_the_likeliest_labels_name(family):
    lm = shared(family)
    expected = [LABELS[int(plain(lm, claim).argmax())] for claim in CLAIMS]
    assert lm.generate(CLAIMS, 5) == expected
    model, words = tiny(family)
    words.padding_side = "left"
    assert LM(model, words, batch_tokens=20).generate(CLAIMS, 5) == expected


@families
def test_layout_is_found(family):
    layout = shared(family).layout
    (stack,) = layout.stacks
    assert (stack.name, layout.depth, layout.prompt_depth, layout.width) == ("encoder", DEPTH, DEPTH, WIDTH)
    blocks, ins, out = {
        "bert": ("bert.encoder.layer", "intermediate.dense", "output.dense"),
        "roberta": ("roberta.encoder.layer", "intermediate.dense", "output.dense"),
        "distilbert": ("distilbert.transformer.layer", "ffn.lin1", "ffn.lin2"),
    }[family]
    assert layout.final_norm == f"{blocks}.{DEPTH - 1}"
    assert layout.mlp_weights(1) == (f"{blocks}.1.{ins}.weight", f"{blocks}.1.{out}.weight")
    assert layout.last_layers(2) == [1, 2]


@families
def test_final_states_are_read(family):
    lm = shared(family)
    rows = lm.head.encode([(claim, None) for claim in CLAIMS])
    found = read(
        lm, rows, [len(row.ids) - 1 for row in rows], [HookPoint(lm.layout.final_norm, "output")], reduce="mean"
    )[0]
    for row, mean in zip(rows, found, strict=True):
        with torch.no_grad():
            states = lm.model.base_model(input_ids=torch.tensor([row.ids])).last_hidden_state[0]
        torch.testing.assert_close(mean, states.mean(0), atol=1e-5, rtol=1e-4)


@families
def test_a_label_is_flipped_and_comes_back_exactly(family, tmp_path):
    lm = tiny_lm(family)
    wanted = [next(label for label in LABELS if label != answer) for answer in lm.generate(CLAIMS[:2], 1)]
    requests = [EditRequest(claim, None, label) for claim, label in zip(CLAIMS[:2], wanted, strict=True)]
    pairs = list(zip(CLAIMS[:2], wanted, strict=True))
    before, untouched = lm.loglikelihood(pairs), snapshot(lm)
    edit = prepared(FT, layers=[DEPTH - 1], lr=2e-2, steps=60).edit(lm, requests)
    assert same_bits(snapshot(lm), untouched)
    edit_store.save(edit, tmp_path / "edit", lm, requests, {"name": "ft"})
    with lm.edited(edit):
        after = lm.loglikelihood(pairs)
        assert lm.generate(CLAIMS[:2], 1) == wanted
    assert all(not old.hits[0] and new.hits[0] for new, old in zip(after, before, strict=True))
    assert same_bits(snapshot(lm), untouched) and lm.loglikelihood(pairs) == before
    edit_store.attach(tmp_path / "edit", lm)
    assert lm.loglikelihood(pairs) == after
    lm.detach()
    assert same_bits(snapshot(lm), untouched)


def test_a_stored_label_is_looked_up():
    lm = tiny_lm("bert")
    (old,) = lm.generate(CLAIMS[:1], 1)
    new = next(label for label in LABELS if label != old)
    with lm.edited(prepared(Lookup, mode="exact").edit(lm, [EditRequest(CLAIMS[0], None, new.lower())])):
        assert lm.generate(CLAIMS[:2], 1) == [new, shared("bert").generate(CLAIMS[1:2], 1)[0]]
        assert lm.loglikelihood([(CLAIMS[0], new)])[0].hits == (True,)
        assert lm.loglikelihood([(CLAIMS[0], old)])[0].hits == (False,)


@families
def test_a_saved_model_is_loaded_as_what_it_is(family, tmp_path):
    lm = shared(family)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    again = ModelOptions(name="copy", id=str(tmp_path), device="cpu").load()
    assert again.head.kind == "classifier" and head_as(again.head, ClassifierHead).labels == LABELS
    assert again.loglikelihood(PAIRS) == lm.loglikelihood(PAIRS)


def test_a_language_model_is_no_classifier_unless_it_was_trained_to_be(tmp_path):
    model, words = tiny("gpt2")
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    with pytest.raises(MissingError, match="1 weight is missing in its files, such as score.weight"):
        ModelOptions(name="copy", id=str(tmp_path), device="cpu", kind="classifier").load()


def test_what_cannot_be_asked_is_refused():
    lm = shared("bert")
    with pytest.raises(
        RejectedRequest, match="'perhaps' is no label of this classifier, which has REFUTES, SUPPORTS, NOT ENOUGH INFO"
    ):
        lm.loglikelihood([("Paris is in Peru.", "perhaps")])
    for family in CLASSIFIERS:
        with pytest.raises(RejectedRequest, match=f"more than the model's {CONTEXT}"):
            shared(family).generate(["Paris " * 200], 1)
        assert shared(family).generate(["Paris" * 1 + " C" * (CONTEXT // 2 - 4)], 1)
    with pytest.raises(UsageError, match="protocol.observe.sample=false"):
        lm.sample(["Paris"], [0], 8, 5)
    with pytest.raises(UsageError, match="model.perplexity_text=null"):
        lm.token_nlls(["Paris"], 8)


NAMES = ["REFUTES", "SUPPORTS"]


@families
def test_a_single_output_tells_two_labels_apart(family, tmp_path):
    """σ of the output is the second label's probability; a flip is learned, kept, and taken back bit for bit."""
    model: Any
    model, words = tiny(family, num_labels=1)
    lm: Any = LM(model, words, labels=NAMES)
    assert model.config.num_labels == 1 and lm.head.labels == NAMES and lm.head.classes == 2
    with torch.no_grad():
        rows = [words(claim, return_tensors="pt", return_token_type_ids=False) for claim in CLAIMS]
        outputs = torch.cat([model(**row).logits[0] for row in rows])
    for name, sign in (("supports", 1), ("REFUTES", -1)):
        for found, z in zip(lm.loglikelihood([(claim, name) for claim in CLAIMS]), outputs, strict=True):
            assert found.nll == pytest.approx(-float((sign * z).sigmoid().log()), abs=1e-4)
            assert found.hits == (bool(sign * z > 0),)
    assert lm.generate(CLAIMS, 3) == [NAMES[int(z > 0)] for z in outputs]
    torch.testing.assert_close(lm.target_logprobs([(CLAIMS[0], "SUPPORTS")])[0].exp().sum(), torch.tensor(1.0))

    untouched, request = snapshot(lm), EditRequest(CLAIMS[0], None, NAMES[int(outputs[0] <= 0)])
    edit = prepared(FT, layers=[DEPTH - 1], lr=2e-2, steps=60).edit(lm, [request])
    with lm.edited(edit):
        assert lm.generate(CLAIMS[:1], 1) == [request.target_new]
        assert (float(model(**rows[0]).logits) > 0) == (request.target_new == "SUPPORTS")
    assert same_bits(snapshot(lm), untouched)

    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    plain: Any = ModelOptions(name="copy", id=str(tmp_path), device="cpu")
    assert plain.load().head.labels == ["LABEL_0", "LABEL_1"]
    assert replace(plain, labels=NAMES).load().generate(CLAIMS, 1) == lm.generate(CLAIMS, 1)


def test_labels_are_named_once_each():
    model, words = tiny("bert")
    renamed = LM(model, words, labels=["no", "yes", "maybe"])
    assert renamed.generate(CLAIMS, 1) == [
        ["no", "yes", "maybe"][LABELS.index(x)] for x in shared("bert").generate(CLAIMS, 1)
    ]
    for wrong in (["no", "yes"], ["no", "yes", "No"]):
        with pytest.raises(UsageError, match="this classifier tells 3 labels apart, so give as many names"):
            LM(model, words, labels=wrong)
    with pytest.raises(UsageError, match="names a classifier's labels, and this model writes text"):
        LM(*tiny("gpt2"), labels=["no", "yes"])
    single, _ = tiny("bert", num_labels=1, problem_type="regression")
    with pytest.raises(UsageError, match=r"has a single output, a number.*model.labels=\[NAME,NAME\]"):
        LM(single, words)
    given: Any = LM(single, words, labels=NAMES)
    assert given.head.labels == NAMES


@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize("method", [ROME, MEMIT])
def test_methods_for_causal_models_say_so(family, method):
    editor = prepared(method, layers=[0])
    kind = "a sequence classifier" if family == "bert" else "an encoder-decoder model"
    with pytest.raises(
        UsageError, match=f"{method.__name__} works on a causal language model, and tiny-{family} is {kind}"
    ):
        editor.check(tiny_lm(family), EditRequest("{} is in", "Paris", "Rome"))
