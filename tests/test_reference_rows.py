"""What every table needs beside its methods: no editing, the right fact before every prompt, facts that are looked up
and told, fine-tuning breadth first.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from embedded import embedded_lm, packaged_editor, prepared, requests, same_bits, snapshot, world

from edit_cli.config.schema import SettingError
from edit_cli.datasets.world import WorldEdits
from edit_cli.editors.finetune.locft import LocFT, Shuffled
from edit_cli.editors.meta import checkpoints
from edit_cli.editors.none import NoEditing
from edit_cli.editors.retrieval.base import Fact, told
from edit_cli.editors.retrieval.icl_oracle import ICLOracle
from edit_cli.editors.retrieval.rag import RAG
from edit_cli.editors.retrieval.rp import RP
from edit_cli.editors.retrieval.serac import SERAC
from edit_cli.edits import store as edit_store
from edit_cli.lm.loading import ModelOptions
from edit_cli.requests import Case, EditRequest, Probe

KINDS: dict[str, Any] = {"tiny-gpt2": "statements", "tiny-t5": "questions", "tiny-bert": "claims"}


@cache
def lm(name: str = "tiny-gpt2"):
    return ModelOptions(name=name, id=f"embedded:{name}", device="cpu").load()


@cache
def cases(name: str = "tiny-gpt2"):
    return WorldEdits(name="world", records=KINDS[name], split="validation").load(3).cases


def nlls(model, pairs):
    return [score.nll for score in model.loglikelihood(pairs)]


def heard(model, edit, prompts, monkeypatch):
    """What the model reads of each prompt while the edit is attached."""
    read = []
    ask = model.head.loglikelihood

    def hear(pairs):
        read.extend(pairs)
        return ask(pairs)

    monkeypatch.setattr(model.head, "loglikelihood", hear)
    with model.edited(edit):
        model.loglikelihood([(prompt, "Paris") for prompt in prompts])
    monkeypatch.undo()
    return [prompt for prompt, _ in read]


@pytest.mark.parametrize("name", KINDS)
def test_no_editing_changes_nothing_and_is_an_edit_like_any_other(name, tmp_path):
    model, wanted = lm(name), [case.requests[0] for case in cases(name)]
    edit = prepared(NoEditing).edit(model, wanted)
    pairs = [(request.text, request.target_new) for request in wanted]
    before, weights = nlls(model, pairs), snapshot(model)
    edit_store.save(edit, tmp_path / "edit", model, wanted, {"name": "none"})
    edit_store.attach(tmp_path / "edit", model)
    assert nlls(model, pairs) == before and same_bits(snapshot(model), weights)
    assert model.detach().touches(model) == []


@pytest.mark.parametrize("name", KINDS)
def test_the_oracle_tells_each_probe_the_fact_of_its_case(name, tmp_path):
    model, known = lm(name), cases(name)
    edit = prepared(ICLOracle).on(model).edit_cases(known)
    edit_store.save(edit, tmp_path / "edit", model, [case.requests[0] for case in known], {"name": "icl-oracle"})
    pairs = [(probe.prompt, probe.target) for case in known for probe in case.probes]
    facts = {
        probe.prompt: Fact(case.requests[0].text, case.requests[0].target_new).text
        for case in known
        for probe in case.probes
    }
    expected = nlls(model, [(f"New Fact: {facts[prompt]}\nPrompt: {prompt}", target) for prompt, target in pairs])
    for attached in (edit, edit_store.load(tmp_path / "edit", model)):
        with model.edited(attached):
            assert nlls(model, pairs) == pytest.approx(expected, rel=1e-5)
            assert model.generate(["Nobody asked this before"], 2) == model.head.generate(
                ["Nobody asked this before"], 2
            )


def case(number: int, prompt: str, answer: str, *probes: Probe) -> Case:
    request = EditRequest(prompt, None, answer)
    return Case(str(number), (request,), (Probe("rewrite", prompt, answer), *probes))


def test_where_prompts_meet_the_oracle_prefers_the_case_that_they_are_about(monkeypatch):
    first = case(1, "One lives in", "Rome", Probe("neighborhood", "Two lives in", "Oslo"))
    second = case(2, "Two lives in", "Bonn", Probe("neighborhood", "Three lives in", "Oslo"))
    third = case(3, "Four lives in", "Kyiv", Probe("neighborhood", "Three lives in", "Oslo"))
    prompts = ["Two lives in", "Three lives in", "Four lives in"]
    edit = prepared(ICLOracle).on(lm()).edit_cases([first, second, third])
    assert heard(lm(), edit, prompts, monkeypatch) == [
        "New Fact: Two lives in Bonn\nPrompt: Two lives in",
        "New Fact: Two lives in Bonn\nFour lives in Kyiv\nPrompt: Three lives in",
        "New Fact: Four lives in Kyiv\nPrompt: Four lives in",
    ]
    bare = prepared(ICLOracle, locality="bare").on(lm()).edit_cases([first, second, third])
    assert "Three lives in" in heard(lm(), bare, prompts, monkeypatch)


def test_oracles_on_top_of_each_other_are_one_and_a_correction_replaces_what_it_corrects(monkeypatch):
    probe = Probe("paraphrase", "The home of One is", "Rome")
    editor = prepared(ICLOracle).on(lm())
    old = editor.edit_cases([case(1, "One lives in", "Rome", probe)])
    new = editor.edit_cases([case(2, "One lives in", "Bonn", probe)])
    with lm().edited(old):
        assert heard(lm(), new, [probe.prompt], monkeypatch) == [f"New Fact: One lives in Bonn\nPrompt: {probe.prompt}"]
        assert heard(lm(), prepared(ICLOracle).on(lm()).edit_cases([]), [probe.prompt], monkeypatch) == [
            f"New Fact: One lives in Rome\nPrompt: {probe.prompt}"
        ]


def test_the_oracle_leaves_out_what_the_context_does_not_hold():
    shared = Probe("neighborhood", "Nobody lives in", "Oslo")
    many = [case(i, f"Person number {i} of the long list lives in", "Rome", shared) for i in range(60)]
    edit = prepared(ICLOracle).on(lm()).edit_cases(many)
    with lm().edited(edit):
        (score,) = lm().loglikelihood([(shared.prompt, "Oslo")])
    assert score.nll > 0


def test_editors_that_do_not_look_at_probes_edit_the_requests_of_cases():
    known = world("tune")[:2]
    by_cases = prepared(NoEditing).on(lm()).edit_cases(known)
    assert by_cases.state() == prepared(NoEditing).edit(lm(), [r for c in known for r in c.requests]).state()


@pytest.mark.parametrize("name", KINDS)
def test_rag_tells_the_most_similar_fact_and_leaves_far_prompts_alone(name, tmp_path):
    model, known = lm(name), cases(name)
    wanted = [case.requests[0] for case in known]
    editor = prepared(RAG, threshold=0.99)
    edit = editor.edit(model, wanted)
    edit_store.save(edit, tmp_path / "edit", model, wanted, {"name": "rag"})
    pairs = [(request.text, request.target_new) for request in wanted]
    far = [("It is not about any of them at all", wanted[0].target_new)]
    facts = [f"New Fact: {Fact(*pair).text}\nPrompt: {pair[0]}" for pair in pairs]
    expected = nlls(model, [(text, answer) for text, (_, answer) in zip(facts, pairs, strict=True)])
    alone = nlls(model, far)
    for attached in (edit, edit_store.load(tmp_path / "edit", model)):
        with model.edited(attached):
            assert nlls(model, pairs) == pytest.approx(expected, rel=1e-5)
            assert nlls(model, far) == pytest.approx(alone, rel=1e-5)
    everywhere = prepared(RAG, threshold=-1.0).edit(model, wanted)
    with model.edited(everywhere):
        assert nlls(model, far) != pytest.approx(alone, rel=1e-3)


def test_rp_takes_what_serac_was_trained_and_asks_the_model_itself(tmp_path, monkeypatch):
    model, cache = embedded_lm(), f"method.cache_dir={tmp_path}"
    serac = packaged_editor(tmp_path, "serac", cache)
    about = {"model": {"name": model.name}, "dataset": {"name": "world"}}
    checkpoints.save(tmp_path / "trained", serac.on(model).build(), {**serac.on(model).identity(), **about})
    rp = packaged_editor(tmp_path, "rp", cache, "method.threshold=0.0001")
    wanted = requests(2)
    config: Any = rp.config
    assert RP.kind(config) == SERAC.kind(config)
    assert rp.on(model).kind(config) == serac.on(model).kind(serac.on(model).config)
    edit = rp.edit(model, wanted)
    read = heard(model, edit, [request.text for request in wanted], monkeypatch)
    known = [f"{request.text} {request.target_new}" for request in wanted]
    parts = [
        text.partition(f". {request.text}") for text, request in zip(read, wanted, strict=True)
    ]  # join of conf/tuned
    assert all(fact in known and not rest for fact, _, rest in parts)
    edit.config = replace(config, template="New Fact: {fact}\nPrompt: {prompt}")
    assert all(text.startswith("New Fact: ") for text in heard(model, edit, [wanted[0].text], monkeypatch))
    edit.config = replace(config, threshold=0.9999)
    far = ["It is not about any of them"]
    assert heard(model, edit, far, monkeypatch) == far


def test_templates_take_every_brace_and_refuse_what_lacks_a_part():
    assert told("{fact}! {x} {prompt}", "a {prompt}", "b {fact}") == "a {prompt}! {x} b {fact}"
    for editor in (RAG, ICLOracle, RP):
        with pytest.raises(SettingError, match=r"template=\{fact\}"):
            editor.Config(template="{fact}")


@pytest.mark.parametrize("name", KINDS)
def test_locft_learns_all_facts_together_in_one_late_matrix(name):
    model, wanted = lm(name), [case.requests[0] for case in cases(name)]
    edit = prepared(LocFT, lr=5e-3, steps=40, batch_size=2).edit(model, wanted)
    depth = model.layout.depth
    assert list(edit.updates) == [f"{model.layout.mlp_out(int(0.7 * depth))}.weight"]
    pairs = [(request.text, request.target_new) for request in wanted]
    before = nlls(model, pairs)
    with model.edited(edit):
        assert all(new < old for new, old in zip(nlls(model, pairs), before, strict=True))
    assert edit.info["losses"][-1] < edit.info["losses"][0] / 2


def test_locft_learns_where_an_answer_ends_and_stops_once_all_facts_are_reached():
    model, wanted = lm(), requests(2)
    prompts, answers = [request.text for request in wanted], [request.target_new for request in wanted]
    edit = prepared(LocFT, layers=[0], lr=5e-3, steps=200).edit(model, wanted)
    assert edit.info["losses"][-1] < 1e-2 and len(edit.info["losses"]) < 200
    with model.edited(edit):
        assert [text.strip() for text in model.generate(prompts, 8)] == answers
    open_ended = prepared(LocFT, layers=[0], lr=5e-3, steps=200, end=False).edit(model, wanted)
    assert len(open_ended.info["losses"]) < 200
    with model.edited(open_ended):
        assert not set(answers) & {text.strip() for text in model.generate(prompts, 8)}


def test_every_pass_sees_every_fact_once_in_an_order_of_its_own():
    batches = Shuffled(list(range(7)), 3, seed=1)
    first, second = ([row for batch in batches for row in batch] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
    assert [row for batch in Shuffled(list(range(7)), 3, seed=1) for row in batch] == first
