"""IKE: what stands before a prompt, and when."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from embedded import embedded_lm, packaged_editor, prepared, requests, same_bits, snapshot, world
from torch import Tensor

from edit_cli.datasets import CounterFact
from edit_cli.editors.retrieval.demonstrations import Store, shown
from edit_cli.editors.retrieval.ike import IKE
from edit_cli.edits import store as edit_store
from edit_cli.errors import MissingError, RejectedRequest, UsageError
from edit_cli.experiment.examples import OtherRecords
from edit_cli.lm.embeddings import EmbeddingOptions, HiddenStates
from edit_cli.requests import Case, EditRequest, Probe

PLAIN = {"embedding": EmbeddingOptions("hidden")}


@cache
def lm():
    return embedded_lm()


def case(number: int, prompt: str = "{} works as a", subject: str | None = None) -> Case:
    subject = subject or f"Person{number} Name{number}"
    request = EditRequest(prompt, subject, f"new{number}", "old")
    probes = (
        Probe("rewrite", request.text, request.target_new, "old"),
        Probe("paraphrase", f"The job of {subject} is", request.target_new),
    )
    return Case(
        str(number), (request,), (*probes, Probe("neighborhood", f"Neighbor {number} works as a", f"kept{number}"))
    )


class Cases:
    """A data set of given cases."""

    def __init__(self, cases):
        self.cases = cases

    def load(self, limit):
        return self


def pairs(wanted: list[EditRequest]) -> list[tuple[str, str]]:
    return [(request.text, request.target_new) for request in wanted]


def nlls(wanted: list[EditRequest]) -> list[float]:
    return [score.nll for score in lm().loglikelihood(pairs(wanted))]


def test_the_published_recipe_shows_4_copies_12_updates_16_retains_and_the_most_similar_last():
    editor: Any = prepared(IKE, store=Cases([case(number) for number in range(40)]), demonstrations=32, **PLAIN)
    request = EditRequest("{} works as a", "Some Body", "new99")
    (texts,) = editor.edit(lm(), [request]).prefixes
    assert (
        len(texts) == 33 and texts[-1] == "New Fact: Some Body works as a new99\nPrompt: Some Body works as a new99\n\n"
    )
    kinds: Counter[str] = Counter()
    for text in texts[:-1]:
        fact, asked = text.removeprefix("New Fact: ").removesuffix("\n\n").split("\nPrompt: ")
        kinds["copy" if asked == fact else "update" if asked.startswith("The job") else "retain"] += 1
    assert kinds == {"copy": 4, "update": 12, "retain": 16}
    embed = HiddenStates(lm())
    vector = embed(["New Fact: Some Body works as a new99\nPrompt: Some Body works as a\n\n"])[0]
    store = Store(editor.config.store.cases, embed)
    likeness = [float(store.vectors[number] @ vector) for number in [_person(text) for text in texts[:-1]]]
    assert likeness == sorted(likeness) and len({_person(text) for text in texts[:-1]}) == 32


def _person(text: str) -> int:
    return int(text.split("Person")[1].split(" ")[0])


def test_what_the_model_reads_is_the_prefix_and_the_prompt():
    """Scores, texts and samples of an edited prompt are those of the written-out text; the model itself is as it
    was.
    """
    (request,) = requests(1)
    untouched = snapshot(lm())
    edit = prepared(
        IKE, store=Cases([case(number) for number in range(4)]), demonstrations=2, shares=[1, 1, 0], **PLAIN
    ).edit(lm(), [request])
    text = "".join(edit.prefixes[0]) + f"New Fact: {request.text} {request.target_new}\nPrompt: Anything goes in"
    expected = lm().loglikelihood([(text, "London")]), lm().generate([text], 3)
    alone = lm().loglikelihood([("Anything goes in", "London")])
    with lm().edited(edit):
        assert (
            lm().loglikelihood([("Anything goes in", "London")]),
            lm().generate(["Anything goes in"], 3),
        ) == expected
        sampled = lm().sample(["Anything goes in"], [3], 20, 5)[0]
        assert sampled.startswith("Anything goes in") and "New Fact" not in sampled
        assert 15 <= len(lm().tokenizer(sampled)["input_ids"]) <= 21
    assert lm().loglikelihood([("Anything goes in", "London")]) == alone and same_bits(snapshot(lm()), untouched)


def test_demonstrations_that_the_context_does_not_hold_are_left_out_the_least_similar_first():
    editor = prepared(
        IKE, store=Cases([case(number) for number in range(12)]), demonstrations=12, shares=[1, 1, 1], **PLAIN
    )
    edit = editor.edit(lm(), requests(1))
    texts = edit.prefixes[0]
    with lm().edited(edit):
        short, long = (edit.answers(lm().head, ["A b c"])[0].answerer.told("A b c", room) for room in (4, 60))
        lm().generate(["A b c"], 40)
    for text in (short, long):
        kept = text[: text.index(f"New Fact: {edit.facts[0].prompt} {edit.facts[0].answer}\nPrompt: A b c")]
        assert any("".join(texts[number:]) == kept for number in range(len(texts) + 1))
        assert len(lm().tokenizer(text)["input_ids"]) + (4 if text is short else 60) <= lm().head.max_length
    assert len(long) < len(short) < len("".join(texts))
    with (
        lm().edited(edit),
        pytest.raises(RejectedRequest, match="the new fact and the prompt are more than the model's 256 tokens"),
    ):
        lm().loglikelihood([("word " * 250, "London")])


def test_no_demonstration_is_about_the_edited_subject():
    cases = [case(0, subject="Some Body"), case(1), case(2, prompt="{} lives in", subject="Some Body")]
    edit = prepared(IKE, store=Cases(cases), demonstrations=3, shares=[1, 0, 0], copy_itself=False, **PLAIN).edit(
        lm(), [cases[0].requests[0]]
    )
    assert edit.prefixes[0] == [shown(Store(cases[1:2], HiddenStates(lm())).facts[0], "copy")]


def test_the_router_puts_the_most_similar_fact_before_a_prompt_or_none():
    wanted = requests(6)
    edit = prepared(IKE, store=None, router="embedding", threshold=0.97, **PLAIN).edit(lm(), wanted)
    bare = lm().loglikelihood([("The story of the clock is", "simple")])
    with lm().edited(edit):
        found = edit.answers(lm().head, [request.text for request in wanted])
        told = [to.answerer.told(request.text, 2) for to, request in zip(found, wanted, strict=True)]
        assert lm().loglikelihood([("The story of the clock is", "simple")]) == bare
    for text, request in zip(told, wanted, strict=True):
        assert text.endswith(f"New Fact: {request.text} {request.target_new}\nPrompt: {request.text}")


def test_several_facts_need_the_router():
    with pytest.raises(
        UsageError, match="method.router=none puts one fact before every prompt, and 2 are edited together"
    ):
        prepared(IKE, store=None, router="none", **PLAIN).edit(lm(), requests(2))
    first, second = (prepared(IKE, store=None, router="none", **PLAIN).edit(lm(), [request]) for request in requests(2))
    with lm().edited(first), pytest.raises(UsageError, match="give method.router=embedding"):
        lm().attach(second)
    assert lm().attached == []


def test_edits_that_are_attached_one_by_one_share_a_memory(monkeypatch):
    """A sequence answers as if it had been edited at once; a prompt is embedded once, however many edits there are."""
    wanted = requests(4)
    editor = prepared(IKE, store=None, threshold=0.9, **PLAIN)
    with lm().edited(editor.edit(lm(), wanted)):
        together = nlls(wanted)
    for request in wanted:
        lm().attach(editor.edit(lm(), [request]))
    seen: list[int] = []
    embed = HiddenStates.__call__

    def counted(self, texts) -> Tensor:
        seen.append(len(texts))
        return embed(self, texts)

    monkeypatch.setattr(HiddenStates, "__call__", counted)
    assert nlls(wanted) == together and seen == [4]
    for _ in wanted:
        lm().detach()


@pytest.mark.slow
def test_saved_it_answers_the_same_in_a_new_process(tmp_path):
    wanted = requests(2)
    edit = prepared(
        IKE, store=Cases([case(number) for number in range(4)]), demonstrations=2, router="embedding", **PLAIN
    ).edit(lm(), wanted)
    edit_store.save(edit, tmp_path / "edit", lm(), wanted, {"name": "ike"})
    with lm().edited(edit):
        here = nlls(wanted)
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[2]); from embedded import embedded_lm; from edit_cli.edits"
        " import store\nlm = embedded_lm(); store.attach(sys.argv[1], lm)\nprint(json.dumps([score.nll for score in"
        " lm.loglikelihood([tuple(pair) for pair in json.loads(sys.argv[3])])]))"
    )
    command = [
        sys.executable,
        "-c",
        code,
        str(tmp_path / "edit"),
        str(Path(__file__).parent),
        json.dumps(pairs(wanted)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == here


def test_demonstrations_come_from_the_same_data_set(tmp_path, monkeypatch):
    """What the run edits or asks about is none of them; with nothing else in the file the fact stands alone."""
    source = CounterFact("counterfact", records="world", split="tune")
    asked = world("tune")[:12]
    editor: Any = packaged_editor(tmp_path, "ike", "method.embedding.model=hidden")
    editor.examples = others = OtherRecords(source, asked)
    (texts,) = editor.edit(lm(), [asked[0].requests[0]]).prefixes
    told = {text.split("\n")[0].removeprefix("New Fact: ") for text in texts[:-1]}
    rest = {f"{r.text} {r.target_new}" for case in others.others() for r in case.requests}
    taken = {probe.prompt for case in asked for probe in case.probes}
    assert len(told) == editor.config.demonstrations and told <= rest
    assert 0 < len(rest) < len(world("tune")) and not any(r.startswith(tuple(taken)) for r in rest)

    notes: list[str] = []
    monkeypatch.setattr(lm().monitor, "note", notes.append)
    alone: Any = packaged_editor(tmp_path, "ike", "method.embedding.model=hidden")
    alone.examples = OtherRecords(source, world("tune"))
    for editor in (alone, packaged_editor(tmp_path, "ike", "method.embedding.model=hidden")):
        (texts,) = editor.edit(lm(), [asked[0].requests[0]]).prefixes
        assert len(texts) == 1 and "no other records of this data set" in notes.pop() and not notes


def test_another_data_set_can_be_the_store(tmp_path):
    editor: Any = packaged_editor(tmp_path, "ike", "dataset@method.store=world", "method.store.split=train")
    subjects = {case.requests[0].subject for case in editor.config.store.load(None).cases}
    assert len(subjects) > 100 and not subjects & {case.requests[0].subject for case in world("test")}
    without = packaged_editor(tmp_path, "ike", "method.store=null", "method.copy_itself=false").edit(lm(), requests(1))
    assert without.prefixes == [[]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "x"}, "method.router=x: choose auto, none or embedding"),
        ({"shares": [1, 2]}, "give three numbers"),
        ({"demonstrations": -1}, "method.demonstrations=-1"),
        (
            {"store": "world"},
            "method.store=world: choose same or null, or name a data set by dataset@method.store=NAME",
        ),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        prepared(IKE, **PLAIN, **settings).edit(lm(), requests(1))


def test_sentence_models_are_an_extra(monkeypatch):
    """Without the library, auto falls back to the model's own states and says so; a model by name is refused with
    the remedy.
    """
    from edit_cli.lm import embeddings

    monkeypatch.setattr(embeddings.importlib.util, "find_spec", lambda name: None)
    notes: list[str] = []
    monkeypatch.setattr(lm().monitor, "note", notes.append)
    found = EmbeddingOptions("auto").load(lm())
    assert isinstance(found, HiddenStates) and "sentence-transformers is not installed" in notes[0]
    torch.testing.assert_close(found(["A b", "c"]).norm(dim=-1), torch.ones(2))
    with pytest.raises(MissingError, match=r"pip install 'edit-cli\[sentences\]'"):
        EmbeddingOptions("all-MiniLM-L6-v2").load(lm())
