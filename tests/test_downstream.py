"""General ability: which items flip, how a model is asked, and what a run keeps of it."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from embedded import embedded_lm, prepared, requests

from edit_cli.editors.finetune.ft import FT
from edit_cli.editors.retrieval.lookup import Lookup
from edit_cli.errors import MissingError
from edit_cli.experiment import downstream
from edit_cli.experiment.downstream import GeneralAbility, downstream_of
from edit_cli.metrics.downstream import flips, harness, world_choice
from edit_cli.metrics.downstream.harness import Harness, Rows
from edit_cli.metrics.downstream.options import DownstreamOptions

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-evaluation-harness (the extra `downstream`)"
)
QUICK = ("limit=2", "protocol.observe.sample=false", "protocol.observe.generate=false", "model.device=cpu")


@cache
def lm():
    return embedded_lm()


def item(number: int, **values: float) -> flips.Item:
    return flips.Item(task="t", item=number, values=values)


def test_flips_are_told_item_by_item():
    before = [item(number, acc=right) for number, right in enumerate((1, 1, 1, 0, 0, 0))]
    after = [item(number, acc=right) for number, right in enumerate((1, 0, 0, 0, 1, 0))]
    (entry,) = flips.compared(before, after).values()
    assert (entry["lost"], entry["gained"], entry["n"]) == (2, 1, 6)
    assert (entry["before"], entry["after"]) == (50.0, pytest.approx(100 / 3))
    assert entry["change"] == pytest.approx(-50 / 3) and 0 < entry["p"] <= 1
    assert entry["ci95"][0] <= entry["change"] <= entry["ci95"][1]


def test_only_items_that_both_states_have_are_compared_and_other_numbers_have_no_flips():
    before, after = [item(0, f1=0.5), item(1, f1=1.0)], [item(1, f1=0.25), item(2, f1=1.0)]
    entry = flips.compared(before, after)["f1"]
    assert (entry["n"], entry["before"], entry["after"], entry["lost"]) == (1, 1.0, 0.25, None)


def test_without_the_unedited_model_there_is_nothing_to_compare():
    state = flips.State(edits=4, seconds=1.0, items={"t": [item(0, acc=1.0)]})
    assert flips.summary([state]) == [] == flips.summary([])


def plain_score(model, text: str, answer: str) -> tuple[float, bool]:
    """(log-likelihood of the answer's tokens, whether each is the likeliest), by one plain pass."""
    tokenizer = model.tokenizer
    known = len(tokenizer(text)["input_ids"])
    ids = torch.tensor([tokenizer(text + answer)["input_ids"]])
    with torch.no_grad():
        logprobs = model.model(input_ids=ids).logits[0, known - 1 : -1].log_softmax(-1)
    target = ids[0, known:]
    return float(logprobs.gather(1, target[:, None]).sum()), bool((logprobs.argmax(-1) == target).all())


def test_a_continuation_scores_what_a_plain_pass_says_with_edits_in_place():
    wanted = requests(2)
    rows = [(request.text, f" {request.target_new}") for request in wanted]
    edit = prepared(FT, layers=[0], lr=5e-3).edit(lm(), wanted)
    seen = []
    for attached in (False, True):
        if attached:
            lm().attach(edit)
        found = Rows(lm()).scores(rows)
        for (score, greedy), (expected, likeliest) in zip(
            found, (plain_score(lm(), *row) for row in rows), strict=True
        ):
            assert score == pytest.approx(expected, abs=1e-3) and greedy == likeliest
        seen.append([greedy for _, greedy in found])
    lm().detach()
    assert seen == [[False, False], [True, True]]


def test_routes_answer_tasks_too():
    wanted = requests(1)
    rows = [(wanted[0].text, f" {wanted[0].target_new}")]
    with lm().edited(prepared(Lookup, mode="exact").edit(lm(), wanted)):
        ((score, greedy),) = Rows(lm()).scores(rows)
        (text,) = Rows(lm()).texts([(wanted[0].text, {"until": ["\n"], "max_gen_toks": 4})])
    assert greedy and score > -1e-3 and text.strip() == wanted[0].target_new


def test_texts_are_greedy_and_end_where_the_task_says():
    prompt = requests(1)[0].text
    rows = Rows(lm())
    (one_line,) = rows.texts([(prompt, {"until": ["\n"], "max_gen_toks": 5})])
    (several,) = rows.texts([(prompt, {"until": ["@@"], "max_gen_toks": 5})])
    assert one_line == lm().generate([prompt], 5)[0] and several.split("\n")[0].startswith(one_line.rstrip())
    cut = one_line.strip()[1:3]
    assert rows.texts([(prompt, {"until": cut, "max_gen_toks": 5})])[0] == several[: several.index(cut)]


def test_what_the_context_does_not_hold_loses_its_beginning():
    rows = Rows(lm())
    long = "The river is calm. " * 200 + "Nobody works as a"
    kept = rows.fitting(long, 10)
    assert rows.cut == 1 and long.endswith(kept) and rows.count(kept) <= lm().head.max_length - 10 < rows.count(long)
    ((score, _),) = rows.scores([(long, " doctor")])
    assert score < 0
    assert rows.fitting("Short", 10) == "Short" and rows.fitting("", 10)


def test_the_embedded_task_is_about_facts_that_the_model_knows():
    items = world_choice.items()
    assert len(items) == world_choice.COUNT and {item["label"] for item in items} == {0, 1, 2, 3}
    rows = [(item["query"], f" {choice}") for item in items[:10] for choice in item["choices"]]
    scores = [score for score, _ in Rows(lm()).scores(rows)]
    four = [scores[start : start + 4] for start in range(0, 40, 4)]
    best = [some.index(max(some)) for some in four]
    assert best == [item["label"] for item in items[:10]]


class Answers:
    """A harness whose items are right until something is attached."""

    def __init__(self, options):
        self.asked = 0

    def ask(self, model):
        self.asked += 1
        return {"t": [item(0, acc=float(not model.attached)), item(1, acc=1.0)]}


def test_a_state_is_asked_once_and_a_run_goes_on_from_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(downstream, "Harness", Answers)
    general = GeneralAbility(DownstreamOptions(downstream=["t"]), tmp_path)
    for _ in range(2):
        general.ask(lm(), 0)
    with lm().edited(prepared(Lookup).edit(lm(), requests(1))):
        general.ask(lm(), 1)
    again = GeneralAbility(DownstreamOptions(downstream=["t"]), tmp_path)
    again.ask(lm(), 1)
    harnesses: list[Any] = [general.harness, again.harness]
    assert [harness.asked for harness in harnesses] == [2, 0]
    (state,) = downstream_of(tmp_path)["downstream"]
    assert state["tasks"]["t"]["acc"]["lost"] == 1 and state["edits"] == 1
    (tmp_path / "downstream" / "000001.json").write_text(json.dumps({"edits": 1, "seconds": 0.0, "items": 3}))
    with pytest.raises(MissingError, match=r"000001\.json is damaged: items"):
        downstream_of(tmp_path)


def test_a_run_without_tasks_asks_none(tmp_path):
    general = GeneralAbility(DownstreamOptions(), tmp_path)
    job: Any = None  # which is not looked at
    general.require(job)
    general.ask(lm(), 0)
    assert downstream_of(tmp_path) == {} and not list(tmp_path.iterdir())


def test_a_missing_library_is_told_before_the_model_is_loaded(cli, monkeypatch):
    monkeypatch.setattr(harness, "LIBRARY", "no_such_library")
    monkeypatch.setattr("edit_cli.lm.loading.ModelOptions.load", lambda *_: pytest.fail("the model was loaded"))
    for command in ("evaluate", "sequential"):
        ended = cli(command, "method=lookup", *QUICK, "protocol.downstream=[world_choice]")
        assert ended.code == 3 and "pip install 'edit-cli[downstream]'" in ended.err


def test_a_classifier_is_refused():
    with pytest.raises(harness.UsageError, match="classifier"):
        Harness(DownstreamOptions(downstream=["world_choice"])).require("classifier", "some model")


@needs_library
def test_evaluate_tells_what_flipped(cli):
    ended = cli(
        *("evaluate", "method=ft", *QUICK, "protocol.batch_size=all", "method.lr=0.05"),
        *("protocol.downstream=[world_choice]", "protocol.downstream_limit=20"),
    )
    assert ended.code == 0 and "GENERAL ABILITY" in ended.out
    run = Path(ended.out.splitlines()[-1])
    (state,) = json.loads((run / "summary.json").read_text())["downstream"]
    entry = state["tasks"]["world_choice"]["acc"]
    assert (entry["n"], entry["before"]) == (20, 100.0) and entry["lost"] > 0
    assert entry["after"] == pytest.approx(100 - 5 * entry["lost"])
    assert "GENERAL ABILITY" in cli("show", str(run)).out


@needs_library
def test_a_sequence_asks_at_checkpoints(cli):
    ended = cli(
        *("sequential", "method=lookup", *QUICK, "protocol.batch_size=1", "protocol.holdout=0"),
        *("protocol.checkpoints=[1,2]", "protocol.downstream=[world_choice]", "protocol.downstream_limit=5"),
    )
    assert ended.code == 0
    run = Path(ended.out.splitlines()[-1])
    assert sorted(file.name for file in (run / "downstream").iterdir()) == [f"00000{n}.json" for n in range(3)]


@needs_library
def test_a_task_that_does_not_exist_is_named_with_one_that_does(cli):
    ended = cli("evaluate", "method=lookup", *QUICK, "protocol.downstream=[world_choise]")
    assert ended.code == 2 and "world_choise is no task" in ended.err and "world_choice" in ended.err
