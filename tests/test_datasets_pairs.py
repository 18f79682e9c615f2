"""Sentences and translations as records, BLEU over them, and the two invented languages."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from typing import Any

import pytest
from embedded import same_bits, snapshot

from edit_cli.datasets.pairs import Pairs
from edit_cli.editors.finetune.ft import FT, FTConfig
from edit_cli.errors import MissingError, UsageError
from edit_cli.lm.loading import ModelOptions
from edit_cli.metrics.bleu import bleu
from edit_cli.metrics.published import published_values
from edit_cli.monitor import Monitor
from tools.tiny_translation.languages import OBJECT, PLURAL, languages, sentences


def told_of(source: Pairs) -> tuple[list, list[str]]:
    notes: list[str] = []
    monitor: Any = Monitor()
    monitor.note = notes.append
    return list(source.load(monitor=monitor).cases), notes


def test_embedded_pairs_want_one_word_otherwise():
    cases = Pairs("pairs", others=3).load(20).cases
    for case in cases:
        (request,) = case.requests
        wanted, reference = (text.split() for text in (request.target_new, request.target_true or ""))
        assert len(wanted) == len(reference) and sum(a != b for a, b in zip(wanted, reference, strict=True)) == 1
        rewrite, *others = case.probes
        assert (rewrite.kind, rewrite.text, rewrite.target) == ("rewrite", request.text, request.target_new)
        assert len({probe.text for probe in others} - {request.text}) == 3
        assert all(probe.kind == "locality" and probe.group == "translation" for probe in others)
    splits = [
        {case.requests[0].text for case in Pairs("pairs", split=s).load().cases}
        for s in ("train", "validation", "test")
    ]
    assert all(splits) and not set.intersection(*splits) and not splits[0] & splits[2]


def test_two_texts_belong_together_line_by_line(tmp_path):
    english, german = tmp_path / "test.en", tmp_path / "test.de"
    english.write_text("a cat\na dog\n\nthe end\n")
    german.write_text("eine Katze\nein Hund\nnichts\nEnde\n")
    source = Pairs("pairs", path=str(english), reference_path=str(german), prefix="translate:", others=0)
    cases, notes = told_of(source)
    assert [(case.requests[0].text, case.requests[0].target_new) for case in cases] == [
        ("translate: a cat", "eine Katze"), ("translate: a dog", "ein Hund"), ("translate: the end", "Ende")
    ]  # fmt: skip
    assert any("dropped line 3" in note and "source is empty" in note for note in notes)
    assert [(probe.text, probe.target) for probe in cases[0].probes[1:]] == [
        ("translate: a dog", "ein Hund"), ("translate: the end", "Ende")
    ]  # fmt: skip
    german.write_text("eine Katze\n")
    with pytest.raises(MissingError, match=r"test.en has 4 lines and .*test.de 1: give two texts that belong together"):
        source.load()
    with pytest.raises(MissingError, match="dataset.reference_path=.*absent.de: no such file"):
        Pairs("pairs", path=str(english), reference_path=str(tmp_path / "absent.de")).load()
    with pytest.raises(UsageError, match="dataset.reference_path is the text of translations of dataset.path"):
        Pairs("pairs", reference_path=str(german)).load()


def test_malformed_records_are_named_by_line_and_field(tmp_path):
    good = {"source": "a cat", "reference": "eine Katze", "wanted": "ein Kater", "id": "a"}
    bad = {
        2: ({"reference": "ein Hund"}, "source is missing"),
        3: ({"source": 7, "reference": "ein Hund"}, "source is not text"),
        4: ({"source": " ", "reference": "ein Hund"}, "source is empty"),
        5: ({"source": "a dog"}, "reference is missing"),
        6: ({"source": "a dog", "reference": ["ein Hund"]}, "reference is not text"),
        7: ({"source": "a dog", "reference": ""}, "reference is empty"),
        8: ({"source": "a dog", "reference": "ein Hund", "wanted": 3}, "wanted is not text"),
        9: ({"source": "a dog", "reference": "ein Hund", "wanted": "ein Hund"}, "wanted is the reference already"),
        10: ({"source": "a dog", "reference": "ein Hund", "id": "a"}, "id occurs twice"),
        11: ({"source": "a dog", "reference": "ein Hund", "id": [1]}, "id is neither a number nor text"),
        12: (["a dog", "ein Hund"], "is a list, not an object with named fields"),
    }
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "\n".join(map(json.dumps, [good, *(row for row, _ in bad.values()), {"source": "x", "reference": "y"}]))
    )
    cases, notes = told_of(Pairs("pairs", path=str(path)))
    assert [case.requests[0].target_new for case in cases] == ["ein Kater", "y"]
    for number, (_, reason) in bad.items():
        assert sum(f"line {number}" in note and reason in note for note in notes) == 1, (number, notes)


def test_sentences_follow_the_grammar():
    spoken = languages(0)
    assert spoken == languages(0) != languages(1)
    assert len(set(spoken.words)) == len(spoken.words)
    forms = {
        noun + plural: (index, plural) for index, (noun, _) in enumerate(spoken.nouns) for plural in ("", PLURAL[0])
    }
    seconds = {
        word + plural + case: (index, plural, case)
        for index, (_, noun) in enumerate(spoken.nouns)
        for word in (noun, spoken.rarer.get(noun, noun))
        for plural in ("", PLURAL[1])
        for case in ("", OBJECT)
    }
    verbs = dict(spoken.verbs)
    for pair in islice(sentences(spoken, 3, rare=0.5), 60):
        source, reference = pair.source.split(), pair.reference.split()
        first = [forms[word] for word in source if word in forms]
        second = [seconds[word] for word in reference if word in seconds]
        assert [index for index, _ in first] == [index for index, *_ in second]
        assert [bool(plural) for _, plural in first] == [bool(plural) for _, plural, _ in second]
        assert [case for *_, case in second] == ["", OBJECT]
        (verb,) = [word for word in source if word in verbs]
        assert reference[-1].startswith(verbs[verb])
    rare = Counter(
        word in spoken.rarer.values()
        for pair in islice(sentences(spoken, 3, rare=0.0), 60)
        for word in pair.reference.split()
    )
    assert not rare[True]


def test_bleu_is_sacrebleus_over_all_sentences_of_a_case():
    sacrebleu = pytest.importorskip("sacrebleu", reason="BLEU needs sacrebleu (edit-cli[translation])")
    references = ["the cat sat on the mat today", "a dog barks at night in the rain"]
    before, after = (
        ["the cat sat on the mat today", "a dog barks at night in rain"],
        ["the cat sat", "a dog barks at day"],
    )

    def probes(written):
        return [
            {"kind": "locality", "group": "translation", "prompt": str(i), "target": reference, "generated": text}
            for i, (reference, text) in enumerate(zip(references, written, strict=True))
        ]

    line = {"before": {"probes": probes(before)}, "after": {"probes": probes(after)}}
    expected = [sacrebleu.corpus_bleu(side, [references]).score for side in (before, after)]
    values = published_values(line, "after", {})
    assert values["bleu"] == pytest.approx(expected[1])
    assert values["bleu_drawdown"] == pytest.approx(expected[0] - expected[1])
    assert published_values(line, "before", {})["bleu"] == pytest.approx(expected[0])
    assert bleu([{**probe, "group": "random"} for probe in probes(before)]) is None
    assert bleu([{**probe, "generated": None} for probe in probes(before)]) is None


def test_the_embedded_translator_is_edited_and_comes_back_exactly():
    lm = ModelOptions("tiny-translator", "embedded:tiny-translator", device="cpu").load()
    (case, *rest) = Pairs("pairs", others=1).load(12).cases
    (request,) = case.requests
    sources = [one.requests[0].text for one in (case, *rest)]
    assert lm.generate(sources, 32) == [one.right[0] for one in (case, *rest)]
    untouched = snapshot(lm)
    with lm.edited(FT(FTConfig(layers=[5], lr=1e-2), lm).edit([request])):
        assert lm.generate([request.text], 32) == [request.target_new]
    assert same_bits(snapshot(lm), untouched)
