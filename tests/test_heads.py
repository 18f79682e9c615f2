"""Conformance over methods and heads: a method works on a kind of model as an edit should, or refuses it with its
reason.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from embedded import packaged_editor, same_bits, snapshot

from edit_cli.config.catalog import names
from edit_cli.datasets.world import WorldEdits
from edit_cli.edits import store as edit_store
from edit_cli.errors import UsageError
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM

MODELS: dict[str, Any] = {"tiny-t5": "questions", "tiny-bart": "questions", "tiny-bert": "claims"}
WORK = ("ft", "ft-l", "lookup")


@cache
def shipped(name: str) -> LM:
    return ModelOptions(name=name, id=f"embedded:{name}", device="cpu").load()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", WORK)
def test_an_edit_is_a_value(method, model, tmp_path):
    """Bit-identical after `edit`; the targets become the answers; detaching is exact; saved, loaded and attached is
    the same.
    """
    lm = shipped(model)
    requests = [
        case.requests[0] for case in WorldEdits("world", records=MODELS[model], split="validation").load(2).cases
    ]
    pairs = [(request.text, request.target_new) for request in requests]
    prompts = [prompt for prompt, _ in pairs]
    before, untouched = lm.loglikelihood(pairs), snapshot(lm)
    chosen = packaged_editor(tmp_path, method, f"model={model}")
    for request in requests:
        chosen.check(lm, request)
    edit = chosen.edit(lm, requests)
    assert same_bits(snapshot(lm), untouched) and lm.attached == []
    edit_store.save(edit, tmp_path / "edit", lm, requests, {"name": method})
    with lm.edited(edit):
        after, texts = lm.loglikelihood(pairs), lm.generate(prompts, 4)
    assert all(new.nll < old.nll for new, old in zip(after, before, strict=True))
    if method != "ft-l":  # the bound may be in the way
        assert texts == [target for _, target in pairs]
    assert same_bits(snapshot(lm), untouched) and lm.loglikelihood(pairs) == before
    edit_store.attach(tmp_path / "edit", lm)
    assert (lm.loglikelihood(pairs), lm.generate(prompts, 4)) == (after, texts)
    lm.detach()
    assert same_bits(snapshot(lm), untouched)


@pytest.mark.thin(2)
@pytest.mark.parametrize("method", [name for name in names("method") if name not in WORK])
def test_a_method_says_which_models_it_cannot_work_on(method, tmp_path):
    chosen = packaged_editor(tmp_path, method, "model=tiny-gpt2")
    for lm in (shipped("tiny-t5"), shipped("tiny-bert")):
        if lm.head.kind in chosen.method.editor.heads:
            assert chosen.on(lm) is not None
            continue
        with pytest.raises(UsageError, match=f"works on .* and {lm.name} is a"):
            chosen.on(lm)
