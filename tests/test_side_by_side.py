"""Fine-tunings side by side are those one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from embedded import embedded_lm, same_bits, snapshot, world
from families import tiny, tiny_lm

from edit_cli.editors.finetune import side_by_side
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest
from edit_cli.testing.parts import packaged_method

FACTS = [[request] for case in world("tune")[:5] for request in case.requests]
WORDS = [
    [EditRequest("The mother tongue of {} is", "Ada Lund", "Oslo")],
    [EditRequest("{} lives in", "Ada Lund", "Rome"), EditRequest("{} works there, in", "Zoë", "Paris")],
    [EditRequest("In the old town, where the river bends, {} waits for", "Zoë", "Tokyo")],
]


def assert_alike(lm: Any, method: str, batches: list[list[EditRequest]], *settings: str) -> list[int]:
    """The steps of each."""
    untouched = snapshot(lm)
    made = packaged_method(method, *settings)
    together = made.begin(lm).edit_each(batches)
    assert together is not None and same_bits(snapshot(lm), untouched)
    for batch, found in zip(batches, together, strict=True):
        alone = made.begin(lm).edit(batch)
        assert found.info["losses"] == pytest.approx(alone.info["losses"], rel=1e-3, abs=1e-4)
        assert found.info["diagnosis"] == alone.info["diagnosis"]
        assert found.updates.keys() == alone.updates.keys()
        for name, update in alone.updates.items():
            assert (found.updates[name] - update).norm() <= 2e-3 * update.norm() and update.norm() > 0
    return [edit.info["diagnosis"]["steps"] for edit in together]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ft", ["method.layers=[5]"]),
        ("ft", ["method.layers=[0,3]", "method.weight_decay=0.01", "method.steps=6"]),
        ("ft", ["method.layers=[4]", "method.objective=prompt_last", "method.steps=4"]),
        ("ft-l", ["method.layers=[4]", "method.norm_constraint=1e-3", "method.steps=6"]),
        ("ft-l", ["method.layers=[2,4]", "method.norm=l2", "method.norm_constraint=0.2", "method.steps=6"]),
    ],
)
def test_each_is_what_it_is_alone(method, settings):
    steps = assert_alike(embedded_lm(), method, FACTS, *settings)
    if settings == ["method.layers=[5]"]:
        assert len(set(steps)) > 1 and max(steps) < 25  # each ends by itself


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text", "t5", "bart"])
def test_of_every_make(family):
    assert_alike(tiny_lm(family), "ft", WORDS, "method.layers=[1]", "method.steps=5", "method.lr=1e-3")


def test_classifiers_too():
    lm = tiny_lm("bert")
    one, other = getattr(lm.head, "labels", ["", ""])[:2]
    facts = [[EditRequest("Here is {}.", "Ada", one)], [EditRequest("{} is not here.", "Bo", other)]]
    assert_alike(lm, "ft", facts, "method.layers=[1]", "method.steps=5", "method.lr=1e-3")


def test_as_many_at_once_as_there_is_room_for(monkeypatch):
    """What room there is changes nothing but last digits; without room for two they are made one by one."""
    size = embedded_lm().weight("transformer.h.5.mlp.c_proj").numel() * 4 * side_by_side.COPIES
    monkeypatch.setattr(side_by_side, "KEPT", 2 * size)
    assert_alike(embedded_lm(), "ft", FACTS, "method.layers=[5]", "method.steps=4")
    monkeypatch.setattr(side_by_side, "KEPT", 2 * size - 1)
    assert packaged_method("ft", "method.layers=[5]").begin(embedded_lm()).edit_each(FACTS) is None


def test_a_pass_holds_no_more_rows_than_a_step_may(monkeypatch):
    """Of edits of one, two, one, one and one facts, in steps of two."""
    seen: list[int] = []
    plain = side_by_side._train

    def counted(*arguments: Any) -> None:
        seen.append(len(arguments[2]))
        plain(*arguments)

    monkeypatch.setattr(side_by_side, "_train", counted)
    settings = ["method.layers=[1]", "method.steps=2", "method.batch_size=2"]
    assert_alike(tiny_lm("llama"), "ft", [*WORDS, *WORDS[::2]], *settings)
    assert seen == [1, 1, 2, 1]


@pytest.mark.parametrize("settings", [["method.part=block"], ["method.batch_size=1"]])
def test_others_are_made_one_by_one(settings):
    editor = packaged_method("ft", "method.layers=[1]", *settings).begin(tiny_lm("llama"))
    assert editor.edit_each(WORDS) is None


def test_weights_of_a_model_in_few_digits_are_float32():
    model, words = tiny("llama")
    lm = LM(model.to(torch.bfloat16), words)
    together = packaged_method("ft", "method.layers=[1]", "method.steps=2").begin(lm).edit_each(WORDS)
    assert together is not None
    assert {update.dtype for edit in together for update in edit.updates.values()} == {torch.float32}
