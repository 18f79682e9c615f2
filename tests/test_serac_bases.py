"""SERAC trained beside one model and used on two: what is learned, what stays, and what is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from embedded import embedded_lm, random_llama, same_bits, snapshot
from transformers import AutoTokenizer

from edit_cli import assets
from edit_cli.editors.base import Context
from edit_cli.editors.meta import checkpoints
from edit_cli.editors.meta.base import TrainingConfig
from edit_cli.editors.retrieval.scope_classifier import ScopeConfig
from edit_cli.editors.retrieval.serac import SERAC, SERACConfig
from edit_cli.edits import store as edit_store
from edit_cli.edits.store import read_manifest
from edit_cli.errors import MissingError
from edit_cli.lm.auxiliary_model import AuxiliaryModelConfig
from edit_cli.lm.model import LM
from edit_cli.requests import Case, EditRequest, Probe
from edit_cli.training.loop import Training

JOBS = ("pilot", "baker", "judge", "farmer", "painter", "doctor")
GPT2 = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 64}


def case(number: int) -> Case:
    name, job = f"First{number} Last{number}", JOBS[number % len(JOBS)]
    request = EditRequest("{} works as a", name, job, JOBS[(number + 1) % len(JOBS)])
    within = (Probe("rewrite", request.text, job), Probe("paraphrase", f"The job of {name} is", job))
    return Case(
        str(number), (request,), (*within, Probe("neighborhood", f"Neighbour{number} works as a", "judge", "pilot"))
    )


CASES = [case(number) for number in range(6)]


@cache
def first() -> LM:
    return embedded_lm()


@cache
def second() -> LM:
    """Another architecture, other weights, the same words."""
    return random_llama("second")


def serac(lm: LM, train_command: str | None = None, **settings) -> SERAC:
    config = SERACConfig(
        scope=ScopeConfig(model=AuxiliaryModelConfig(checkpoint="embedded:tiny-gpt2"), pooling="last",
        trained_blocks=0, head=32, describes="prompt"),
        counterfactual=AuxiliaryModelConfig(family="gpt2", sizes=GPT2), edit_weight=1.0, all_pairs=1.0,
        training=TrainingConfig(steps=150, edits=6, lr=4e-3, warmup=5, clip=1.0, validate_every=150,
        validation_edits=6, trackers=[]),
        **settings,
    )  # fmt: skip
    return SERAC(config, lm, Context(train_command=None if train_command is None else lambda: train_command))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Trained beside the first model, on the disk."""
    folder = tmp_path_factory.mktemp("serac")
    untouched = snapshot(first())
    done = Training(serac(first()), CASES, CASES, folder, "", lambda _: None).run()
    assert same_bits(snapshot(first()), untouched)
    about = {"model": {"name": "tiny-gpt2"}, "dataset": {"name": "none"}}
    checkpoints.save(folder / "networks", done.net, {**serac(first()).identity(), **about})
    return folder / "networks"


@pytest.mark.slow
def test_an_answer_ends_and_running_text_goes_on_as_the_model_would(checkpoint):
    """h alone stops after the answer; behind a base the base writes what follows, in replies and in sampled texts."""
    for lm in (first(), second()):
        edit = serac(lm, checkpoint=str(checkpoint)).edit([case.requests[0] for case in CASES])
        asked = [case.requests[0].text for case in CASES]
        told = [f" {case.requests[0].target_new}" for case in CASES]
        assert edit.net is not None
        alone = edit.net.head.generate(
            [edit.config.read(fact, prompt) for fact, prompt in zip(edit.facts, asked, strict=True)], 12
        )
        assert alone == told
        whole = [prompt + answer for prompt, answer in zip(asked, told, strict=True)]
        rooms = [12 - len(lm.tokenizer(answer)["input_ids"]) for answer in told]
        more = [lm.generate([text], room)[0] for text, room in zip(whole, rooms, strict=True)]
        texts = lm.sample(whole, range(len(whole)), 30, 5)
        with lm.edited(edit):
            assert lm.generate(asked, 12) == [answer + rest for answer, rest in zip(told, more, strict=True)]
            assert lm.sample(asked, range(len(asked)), 30, 5) == texts
            assert lm.generate(asked[:1], 1) == told[:1]  # no room for more
        assert any(more)


@pytest.mark.parametrize("base", [first, second])
def test_what_was_learnt_beside_one_model_works_on_either(base, checkpoint):
    lm = base()
    untouched = snapshot(lm)
    inside = [(probe.prompt, probe.target) for case in CASES for probe in case.probes[:2]]
    outside = [(case.probes[2].prompt, "judge") for case in CASES] + [("The capital of the country is", "judge")]
    before = lm.loglikelihood(inside), lm.loglikelihood(outside), lm.generate([prompt for prompt, _ in outside], 3)
    edit = serac(lm, checkpoint=str(checkpoint)).edit([case.requests[0] for case in CASES])
    with lm.edited(edit):
        right = [all(score.hits) for score in lm.loglikelihood(inside)]
        assert (lm.loglikelihood(outside), lm.generate([prompt for prompt, _ in outside], 3)) == before[1:]
        assert lm.generate([inside[0][0]], 1)[0].split()[0] == inside[0][1]
    assert sum(right) >= 0.9 * len(right) > sum(all(score.hits) for score in before[0]) + 5
    assert lm.loglikelihood(inside) == before[0] and same_bits(snapshot(lm), untouched)


def test_two_bases_ask_the_same_networks_and_route_alike(checkpoint):
    requests = [case.requests[0] for case in CASES]
    prompts = [probe.prompt for case in CASES for probe in case.probes] + [request.text for request in requests]
    routed = []
    for lm in (first(), second()):
        edit = serac(lm, checkpoint=str(checkpoint)).edit(requests)
        with lm.edited(edit):
            found: list[Any] = edit.destinations(lm.head, prompts)
        routed.append([to and to.answerer.told(to.prompt, 0) for to in found])
    assert routed[0] == routed[1] and any(routed[0]) and not all(routed[0])


def test_soft_mixing_is_no_switch_and_says_so_in_its_numbers(checkpoint):
    """A prompt out of scope is not answered bit for bit there, and one in scope is not answered by h alone."""
    lm, requests = first(), [case.requests[0] for case in CASES]
    pair = [(CASES[0].probes[1].prompt, "pilot"), (CASES[0].probes[2].prompt, "pilot")]
    before = [lm.loglikelihood([one])[0] for one in pair]
    found = {}
    for mixing in ("hard", "soft"):
        with lm.edited(serac(lm, checkpoint=str(checkpoint), mixing=mixing).edit(requests)):
            found[mixing] = [lm.loglikelihood([one])[0] for one in pair]
    assert found["hard"][1] == before[1]
    assert all(soft.nll != hard.nll for soft, hard in zip(found["soft"], found["hard"], strict=True))


def test_other_words_and_missing_networks_are_one_clear_line(checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(assets.FOLDER / "tiny-gpt2")
    tokenizer.add_tokens(["<another>"])
    other = random_llama("other-words", tokenizer)
    command = "edit-cli train-editor method=serac model=tiny-gpt2 dataset=world"
    made = serac(first(), command, checkpoint=str(checkpoint))
    requests = [CASES[0].requests[0]]
    edit_store.save(made.edit(requests), tmp_path / "edit", first(), requests, {"name": "serac"})
    assert "train_command" in str(read_manifest(tmp_path / "edit"))
    attempts = {
        "was trained for tiny-gpt2, and these are other words than other-words has": (
            lambda: serac(other, command, checkpoint=str(checkpoint)).edit(requests),
            lambda: edit_store.attach(tmp_path / "edit", other),
        ),
        "this editor has not been trained for tiny-gpt2": (
            lambda: serac(first(), command, cache_dir=str(tmp_path)).edit(requests),
        ),
    }
    for told, ways in attempts.items():
        for attempt in ways:
            with pytest.raises(MissingError) as caught:
                attempt()
            (line,) = str(caught.value).splitlines()
            assert told in line and "`edit-cli train-editor method=serac model=tiny-gpt2 dataset=world`" in line
