"""Training again on what a model was trained on: causal models on text, others on prompts and answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from embedded import prepared, same_bits, snapshot
from families import CLASSIFIERS, SEQ2SEQ, tiny, tiny_lm
from rows import Writer

from edit_cli.datasets.world import WorldEdits
from edit_cli.editors.finetune.retrain import Retrain
from edit_cli.edits import store as edit_store
from edit_cli.errors import MissingError, UsageError
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest
from edit_cli.statistics.corpora import PairFile, embedded_pairs

CLAIMS = ["Rome is in Italy.", "Oslo is in Norway.", "Ada Lund lives in Oslo.", "Ada Lund was born in Rome."]
QUESTIONS = ["Where is Rome?", "Where is Oslo?", "Where does Ada Lund live?", "Where was Ada Lund born?"]
ANSWERS = ["in Italy", "in Norway", "in Oslo", "in Rome"]


def lines(write: Writer, pairs) -> str:
    return write([{"prompt": prompt, "answer": answer} for prompt, answer in pairs])


@pytest.mark.thin(2)
@pytest.mark.parametrize("family", [*SEQ2SEQ, *CLASSIFIERS])
def test_models_with_an_encoder_learn_the_edit_among_their_own_pairs(family, write, tmp_path):
    lm: Any = tiny_lm(family)
    judges = lm.head.kind == "classifier"
    prompts = CLAIMS if judges else QUESTIONS
    answers = lm.generate(CLAIMS, 1) if judges else ANSWERS
    new = next(label for label in lm.head.labels if label != answers[2]) if judges else "in Rome"
    path = lines(write, zip(prompts, answers, strict=True))
    request, untouched = EditRequest(prompts[2], None, new, answers[2]), snapshot(lm)
    editor = prepared(Retrain, corpus=path, lr=0.1 if family == "t5" else 1e-2, epochs=40, batch_size=4, oversample=1)
    edit = editor.edit(lm, [request])
    assert same_bits(snapshot(lm), untouched)
    wanted = [pair if pair[0] != prompts[2] else (prompts[2], new) for pair in zip(prompts, answers, strict=True)]
    before = lm.loglikelihood(wanted)
    with lm.edited(edit):
        after = lm.loglikelihood(wanted)
        assert not judges or lm.generate(prompts, 1) == [answer for _, answer in wanted]
    assert judges or all(now.nll < 0.6 * then.nll for now, then in zip(after, before, strict=True))
    assert same_bits(snapshot(lm), untouched) and lm.loglikelihood(wanted) == before
    edit_store.save(edit, tmp_path / "edit", lm, [request], {"name": "retrain"})
    edit_store.attach(tmp_path / "edit", lm)
    assert lm.loglikelihood(wanted) == after


def test_a_single_output_is_trained_again_too(write):
    model, words = tiny("bert", num_labels=1)
    lm = LM(model, words, labels=["REFUTES", "SUPPORTS"])
    (old,) = lm.generate(CLAIMS[:1], 1)
    new = {"REFUTES": "SUPPORTS", "SUPPORTS": "REFUTES"}[old]
    editor = prepared(Retrain, corpus=lines(write, [(CLAIMS[1], old)]), lr=1e-2, epochs=40, oversample=1)
    with lm.edited(editor.edit(lm, [EditRequest(CLAIMS[0], None, new, old)])):
        assert lm.generate(CLAIMS[:2], 1) == [new, old]


def test_pairs_that_contradict_are_left_out(write):
    told = [
        ("Where does Ada Lund live?", "Oslo"),
        ("Which town does Ada Lund love?", "oslo"),
        ("Where does Bo Lund live?", "Oslo"),
        ("Where was Ada Lund born?", "Rome"),
        ("Where is Rome?", "Italy"),
    ]
    path = lines(write, told)
    about, plain = (
        EditRequest("Where does {} live?", "Ada Lund", "Paris", "Oslo"),
        EditRequest("Where is Rome?", None, "Peru"),
    )
    found, dropped = prepared(Retrain, corpus=path, oversample=2).on(tiny_lm("t5"))._documents([about, plain])
    new = [("Where does Ada Lund live?", "Paris"), ("Where is Rome?", "Peru")]
    assert found == [*told[2:4], *new, *new] and dropped == 3
    claims = lines(write, [("Oslo is far.", "REFUTES"), ("Oslo is big.", "SUPPORTS"), ("Oslo is old.", "SUPPORTS")])
    flip = EditRequest("{} is big.", "Oslo", "REFUTES", "SUPPORTS")
    found, dropped = prepared(Retrain, corpus=claims, oversample=1).on(tiny_lm("bert"))._documents([flip])
    assert found == [("Oslo is far.", "REFUTES"), ("Oslo is old.", "SUPPORTS"), ("Oslo is big.", "REFUTES")]
    assert dropped == 1
    path = lines(write, told)
    kept, none = (
        prepared(Retrain, corpus=path, oversample=1, contradictions="keep").on(tiny_lm("t5"))._documents([about, plain])
    )
    assert kept == [*told, *new] and none == 0


def test_pairs_that_the_model_cannot_read_are_left_out(write, monkeypatch):
    lm = tiny_lm("bert")
    notes: list[str] = []
    monkeypatch.setattr(lm.monitor, "note", notes.append)
    path = lines(write, [(CLAIMS[0], "SUPPORTS"), (CLAIMS[1], "MAYBE"), ("Rome " * 300, "REFUTES")])
    edit = prepared(Retrain, corpus=path, oversample=1).edit(lm, [EditRequest(CLAIMS[2], None, "REFUTES")])
    assert edit.info["rows"] == 2 and "2 pairs are too long for tiny-bert, or no answer of its" in notes[0]


@pytest.mark.parametrize(
    ("text", "settings", "error", "told"),
    [
        ("Rome is in Italy.\n", {}, MissingError, "holds no JSON object with the texts prompt and answer in line 1"),
        (json.dumps({"prompt": "a b", "answer": 3}), {}, MissingError, "prompt and answer in line 1"),
        (
            json.dumps({"prompt": "a b", "answer": "c"}),
            {"fields": ["question", "answer"]},
            MissingError,
            "question and",
        ),
        (json.dumps({"prompt": "a b", "answer": "c"}), {"fields": ["prompt"]}, UsageError, "give two names"),
        ("\n", {}, MissingError, "holds no text"),
    ],
)
def test_files_of_another_form_are_named(text, settings, error, told, tmp_path):
    (tmp_path / "own.jsonl").write_text(text)
    with pytest.raises(error, match=told):
        prepared(Retrain, corpus=str(tmp_path / "own.jsonl"), **settings).edit(
            tiny_lm("t5"), [EditRequest("a", None, "b")]
        )


def test_nothing_else_will_do(tmp_path):
    with pytest.raises(UsageError, match="the prompts and answers that this model was trained on"):
        prepared(Retrain).edit(tiny_lm("t5"), [EditRequest("a", None, "b")])
    with pytest.raises(MissingError, match="method.corpus=none.jsonl cannot be read: No such file"):
        PairFile("none.jsonl", key="method.corpus").pairs()


@pytest.mark.parametrize(("kind", "form"), [("seq2seq", "questions"), ("classifier", "claims")])
def test_the_packaged_pairs_are_those_the_packaged_models_know(kind, form):
    """Trained wordings of every split, edited and not; no wording that is held out."""
    pairs = dict(embedded_pairs(kind))
    assert len(pairs) == len(embedded_pairs(kind)) > 10_000
    cases = WorldEdits("world", records=form, split="test").load(200).cases
    probes = [probe for case in cases for probe in case.probes]
    assert all(pairs[case.requests[0].text] == case.requests[0].target_true for case in cases)
    assert all(pairs[probe.prompt] == probe.target for probe in probes if probe.kind == "locality")
    assert not any(probe.prompt in pairs for probe in probes if probe.group == "unseen")
