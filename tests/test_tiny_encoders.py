"""The shipped T5, BART and BERT: what they know, how their tokenizers split names, and the training of such models
end to end.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import edit_cli
from edit_cli.datasets.world import WorldEdits
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.requests import Probe
from tools.tiny_world import encoder_assets
from tools.tiny_world.__main__ import main
from tools.tiny_world.encoders import EncoderOptions, batches, epoch_facts
from tools.tiny_world.names import pool
from tools.tiny_world.tasks import asked, claimed, question_wordings, witnesses
from tools.tiny_world.world import World, load_relations, make_world

ASSETS = Path(edit_cli.__file__).parent / "assets"
FORMS: dict[str, Any] = {"tiny-t5": "questions", "tiny-bart": "questions", "tiny-bert": "claims"}
models = pytest.mark.parametrize("name", FORMS)


@cache
def shipped(name: str) -> LM:
    """No test here changes it."""
    return ModelOptions(name=name, id=f"embedded:{name}", device="cpu").load()


@cache
def world() -> World:
    return make_world(0)


@models
def test_the_manifest_says_how_it_was_made_and_what_it_knows(name):
    manifest = json.loads((ASSETS / name / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["command"].startswith(f"python -m tools.tiny_world {name.removeprefix('tiny-')} --seed 0")
    assert manifest["parameters"] == sum(parameter.numel() for parameter in shipped(name).model.parameters())
    assert manifest["recall_percent"]["trained"] >= 95 and manifest["recall_percent"]["held_out"] >= 90
    assert sum(file.stat().st_size for file in (ASSETS / name).iterdir()) < 3.6e6


def known(probe: Probe) -> str:
    """The answer that the model was trained on."""
    answer = probe.target if probe.kind == "locality" else probe.foil
    assert answer is not None
    return answer


@models
@pytest.mark.parametrize(
    "split", [*(pytest.param(split, marks=pytest.mark.slow) for split in ("train", "validation")), "test"]
)
def test_it_knows_what_its_edits_overwrite_and_what_they_must_not(name, split):
    """The records of the data set that goes with it, asked as `evaluate` asks: trained wordings, held-out ones,
    other facts.
    """
    cases = WorldEdits("world", records=FORMS[name], split=split).load(120).cases
    probes = [probe for case in cases for probe in case.probes]
    pairs = [(probe.prompt, known(probe)) for probe in probes]
    hits = [all(score.hits) for score in shipped(name).loglikelihood(pairs)]
    for kind, least in (("rewrite", 0.95), ("paraphrase", 0.9), ("locality", 0.95)):
        own = [hit for hit, probe in zip(hits, probes, strict=True) if probe.kind == kind]
        assert own and sum(own) / len(own) >= least, kind


@models
def test_it_writes_the_answer_and_stops(name):
    cases = WorldEdits("world", records=FORMS[name]).load(30).cases
    texts = shipped(name).generate([case.requests[0].text for case in cases], 5)
    right = [text == case.requests[0].target_true for text, case in zip(texts, cases, strict=True)]
    assert sum(right) >= 27


@models
def test_its_tokenizer_splits_new_names_like_known_ones(name):
    words = shipped(name).tokenizer
    for kind in dict.fromkeys(relation.kind for relation in world().relations):
        known = {fact.subject for fact in world().facts if fact.relation.kind == kind}
        new = [other for other in pool(kind, 600, random.Random("new")) if other not in known]
        pieces = [sum(len(words.tokenize(f"of {one}")) - 1 for one in group) / len(group) for group in (known, new)]
        assert abs(pieces[0] - pieces[1]) < 0.35, kind
    answers = {answer for relation in world().relations for answer in relation.objects}
    assert all(len(words.tokenize(answer)) == 1 for answer in answers)


def test_questions_are_clean_and_go_with_their_relations():
    wordings = question_wordings()
    assert list(wordings) == [relation.id for relation in load_relations()[0]]
    every = [question for own in wordings.values() for question in own]
    assert all(
        question.count("{}") == 1 and question.endswith("?") and question == question.strip() for question in every
    )
    kinds = {relation.id: relation.kind for relation in load_relations()[0]}
    for kind in set(kinds.values()):  # one question must not ask for two relations
        own = [
            question for relation, questions in wordings.items() if kinds[relation] == kind for question in questions
        ]
        assert len(set(own)) == len(own), kind


def test_facts_as_questions_and_claims():
    for fact, question, claim in zip(world().facts, asked(world()), claimed(world(), "test"), strict=True):
        assert (fact.subject, fact.object) == (question.subject, question.object)
        assert (
            len(question.trained) == 5
            and len(question.held_out) == 2
            and not set(question.trained) & set(question.held_out)
        )
        shown = {text.removesuffix(".").rpartition(" ")[2] for text in (*claim.trained, *claim.held_out)}
        assert len(shown) == 1 and (shown == {fact.object}) == (claim.object == "SUPPORTS")
    truths = [claim.object == "SUPPORTS" for claim in claimed(world(), "test")]
    assert 0.45 < sum(truths) / len(truths) < 0.55


def test_no_edit_is_about_a_witness():
    for records in ("statements", "questions", "claims"):
        for split, group in (("train", "bystander"), ("validation", "tune"), ("test", "test")):
            facts = [fact for fact in world().facts if fact.group == group]
            seen, cases = witnesses(facts), WorldEdits("world", records=records, split=split).load().cases
            assert {case.requests[0].subject for case in cases} == {fact.subject for fact in facts} - seen
            for probe in (
                probe for case in cases for probe in case.probes if probe.group in ("random", "same_relation")
            ):
                assert any(subject in probe.prompt for subject in seen)


def test_batches_hold_every_row_once_and_the_first_epochs_are_about_few_facts():
    lengths = [random.Random(n).randrange(5, 30) for n in range(50)]
    cut = list(batches(lengths, 8, random.Random(0)))
    assert sorted(index for batch in cut for index in batch) == list(range(50)) and max(map(len, cut)) == 8
    options = EncoderOptions(first_facts=10, first_epochs=2)
    assert len(set(epoch_facts(50, 0, options))) == 10 and len(epoch_facts(50, 1, options)) == 50
    assert set(epoch_facts(50, 0, options)) == set(epoch_facts(50, 1, options)) and epoch_facts(50, 2, options) == list(
        range(50)
    )


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in ("t5", "bart", "bert")])
def test_the_command_makes_the_same_model_again(kind, tmp_path, monkeypatch, capsys):
    few = replace(
        world(), facts=world().facts[:30], name_pool={kind: names[:200] for kind, names in world().name_pool.items()}
    )
    monkeypatch.setattr(encoder_assets, "make_world", lambda seed: few)
    monkeypatch.setattr("tools.tiny_world.vocabularies.REPEAT", 2)
    shape = "--layers 2" if kind == "bert" else "--layers 1 --decoder-layers 2"
    for folder in ("a", "b"):
        assert main([kind, "--epochs", "3", "--width", "32", *shape.split(), "--out", str(tmp_path / folder)]) == 0
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / folder / f"tiny-{kind}").iterdir()}
        for folder in ("a", "b")
    )
    assert first == second and {"model.safetensors", "tokenizer.json", "manifest.json"} <= first.keys()
    manifest = json.loads(first["manifest.json"])
    assert manifest["facts"] == 30 and manifest["command"].endswith(
        f"{kind} --seed 0 --epochs 3 --width 32 {shape} --threads 1"
    )
    assert "30 facts; recall: trained wordings" in capsys.readouterr().out
    lm = ModelOptions(name="again", id=str(tmp_path / "a" / f"tiny-{kind}"), device="cpu").load()
    assert all(torch.isfinite(parameter).all() for parameter in lm.model.parameters())


def test_a_decoder_of_no_blocks_is_refused(tmp_path, capsys):
    """An encoder of one block is not: its facts are looked up in the decoder."""
    assert main(["bart", "--layers", "1", "--decoder-layers", "0", "--out", str(tmp_path)]) == 2
    assert "--decoder-layers must be at least 1" in capsys.readouterr().err and not list(tmp_path.iterdir())
