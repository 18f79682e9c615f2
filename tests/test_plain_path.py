"""The fast path as a whole against the plain one: values, updates, and what is scored on many records."""

from __future__ import annotations

import pytest
import torch
from embedded import embedded_lm, prepared, world
from oracle import plain_successes, plain_update, plain_value

from edit_cli.editors.locate.memit import MEMIT
from edit_cli.editors.locate.value_optimization import optimize_values
from edit_cli.edits.edit import WeightDelta
from edit_cli.statistics.corpora import EmbeddedText
from edit_cli.statistics.moments import MomentStore

LAYERS, WEIGHT = [0, 1, 2, 3], 200.0


@pytest.fixture
def editor(tmp_path):
    moments = MomentStore(corpus=EmbeddedText(), tokens=10_000, cache_dir=str(tmp_path))
    return prepared(MEMIT, layers=LAYERS, covariance_weight=WEIGHT, moments=moments)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def stored(lm, edit: WeightDelta) -> dict[str, torch.Tensor]:
    """Updates (d, m) by weight of an edit of the embedded model, whose projections are stored (m, d)."""
    return {name: edit.stored(lm, name).T for name in edit.updates}


def test_updates_equal_those_of_whole_passes_and_a_dense_solve(editor):
    lm = embedded_lm()
    requests = [case.requests[0] for case in world()[:6]]
    contexts = editor.on(lm).contexts
    moments = {layer: editor.config.moments.second_moment(lm, layer).matrix for layer in LAYERS}
    found = stored(lm, editor.edit(lm, requests))
    targets = optimize_values(lm, requests, LAYERS[-1], "block", editor.config.value, contexts).target
    expected = plain_update(lm, requests, LAYERS, targets, contexts, moments, WEIGHT)
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        assert difference(found[name], update) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("count", [6, 200])
def test_the_same_records_succeed_as_on_the_plain_path(editor, count):
    lm, cases = embedded_lm(), world()[:count]
    requests = [case.requests[0] for case in cases]
    contexts = editor.on(lm).contexts
    moments = {layer: editor.config.moments.second_moment(lm, layer).matrix for layer in LAYERS}
    edit = editor.edit(lm, requests)
    values = optimize_values(lm, requests, LAYERS[-1], "block", editor.config.value, contexts).target
    plain = torch.stack(
        [plain_value(lm, request, LAYERS[-1], "block", editor.config.value, contexts)[0] for request in requests], dim=1
    )
    assert float(((values - plain).norm(dim=0) / plain.norm(dim=0)).max()) < 1e-3
    updates = plain_update(lm, requests, LAYERS, plain, contexts, moments, WEIGHT)
    for name, update in stored(lm, edit).items():
        assert difference(update, updates[name]) < 1e-3, name

    asked = [(p.kind, p.prompt, p.target, p.foil) for case in cases for p in case.probes if p.target and p.foil]
    with lm.edited(edit):
        targets = lm.loglikelihood([(prompt, target) for _, prompt, target, _ in asked])
        foils = lm.loglikelihood([(prompt, foil) for _, prompt, _, foil in asked])
    found = [(kind, t.nll < f.nll, all(t.hits)) for (kind, *_), t, f in zip(asked, targets, foils, strict=True)]
    with torch.no_grad():
        for name, update in updates.items():
            lm.parameter(name).add_(update.T.to(torch.float32))
    expected = [answer for case in cases for answer in plain_successes(lm, case)]
    assert found == expected
    assert sum(success for _, success, _ in expected) > 0.9 * len(expected) > 0, (
        "an edit that does nothing would agree with itself too"
    )
