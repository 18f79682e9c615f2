"""Values that are kept for another run: the same bits, of the unedited model alone, and of no other search."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from embedded import embedded_lm, packaged_editor, world
from safetensors import safe_open
from safetensors.torch import save_file
from stats_helpers import Recorder

from edit_cli.editors.locate import value_optimization
from edit_cli.editors.locate.context_prefixes import ContextConfig, sample_contexts
from edit_cli.editors.locate.value_batch import ValueConfig
from edit_cli.editors.locate.value_optimization import Values, optimize_values
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.errors import MissingError

LAYER = 3


@pytest.fixture
def searched(monkeypatch):
    """How many values each search was asked for."""
    counts = []
    search = value_optimization._search

    def counted(lm, parts, *rest):
        counts.append(len(parts))
        return search(lm, parts, *rest)

    monkeypatch.setattr(value_optimization, "_search", counted)
    return counts


@pytest.fixture
def lm():
    lm = embedded_lm()
    lm.monitor = Recorder()
    return lm


def values_of(lm, facts, options, layer=LAYER):
    requests = [world()[number].requests[0] for number in facts]
    contexts = sample_contexts(lm, ContextConfig(prefixes=["The city"]))
    return optimize_values(lm, requests, layer, "block", options, contexts)


def assert_same(found: Values, expected: Values):
    for name, tensor in expected.tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name


def files_in(options):
    return sorted(path for path in (Path(options.cache_dir) / "tiny-gpt2").iterdir())


@pytest.fixture
def options(tmp_path):
    return ValueConfig(steps=3, reuse=True, cache_dir=str(tmp_path))


def test_a_later_run_takes_the_same_bits_and_says_so(lm, options, searched):
    first = values_of(lm, [0, 1, 2], options)
    assert len(files_in(options)) == 3
    second = values_of(lm, [0, 1, 2], replace(options, batch_tokens=40))
    assert searched == [3, 0]
    assert_same(second, first)
    assert (first.taken, second.taken) == ([False] * 3, [True] * 3)


def test_only_what_is_missing_is_looked_for(lm, options, searched):
    first = values_of(lm, [0, 2], options)
    whole = values_of(lm, [0, 1, 2, 3], options)
    assert searched == [2, 2]
    assert whole.taken == [True, False, True, False]
    assert_same(whole.of(0), first.of(0))
    assert_same(whole.of(2), first.of(1))
    alone = values_of(lm, [1, 3], replace(options, reuse=False))
    assert_same(whole.of(1), alone.of(0))
    assert_same(whole.of(3), alone.of(1))


@pytest.mark.parametrize("other", [{"steps": 4}, {"lr": 0.1}, {"kl_prompt": "{} and"}, {"layer": 2}])
def test_another_search_takes_none_of_them(lm, options, searched, other):
    values_of(lm, [0, 1], options)
    settings = {name: value for name, value in other.items() if name != "layer"}
    values_of(lm, [0, 1], replace(options, **settings), other.get("layer", LAYER))
    assert searched == [2, 2]


def test_an_edited_model_neither_takes_nor_keeps_any(lm, options, searched):
    values_of(lm, [0], options)
    width = lm.layout.width
    name = f"{lm.layout.mlp_out(1)}.weight"
    with lm.edited(WeightDelta({name: Factors(torch.ones(width, 1), torch.ones(1, lm.key_width(1)))})):
        edited = values_of(lm, [0, 1], options)
        assert not torch.equal(edited.of(0).target, values_of(lm, [0], replace(options, reuse=False)).target)
    assert searched == [1, 2, 1] and len(files_in(options)) == 1


def test_other_weights_take_none_of_them(lm, options, searched):
    values_of(lm, [0], options)
    other = embedded_lm()
    with torch.no_grad():
        other.model.transformer.h[1].mlp.c_proj.weight[0, 0] += 1
    values_of(other, [0], options)
    assert searched == [1, 1]


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def changed(tensors, about):
    def change(path):
        with safe_open(path, "pt") as file:
            now = {name: file.get_tensor(name) for name in ("target", "initial")}
            told = file.metadata()["edit-cli"]
        save_file({**now, **tensors}, path, {"edit-cli": about(told)})

    return change


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        changed({"target": torch.ones(3)}, str),
        changed({"target": torch.full((128,), torch.nan)}, str),
        changed({}, lambda told: told.replace('"format": 1', '"format": 2')),
        changed({}, lambda told: told.replace('"steps": 3', '"steps": -3')),
        changed({}, lambda told: told[1:]),
    ],
    ids=["cut", "width", "nan", "format", "steps", "json"],
)
def test_a_damaged_file_is_told_and_made_again(lm, options, searched, damage):
    first = values_of(lm, [0], options)
    (path,) = files_in(options)
    damage(path)
    assert_same(values_of(lm, [0], options), first)
    assert searched == [1, 1]
    told = lm.monitor.notes[-1]
    assert told.count(str(path)) == told.count("it is looked for again") == 1
    assert_same(values_of(lm, [0], options), first)
    assert searched == [1, 1, 0]


def test_a_folder_that_cannot_be_made_is_named_before_the_search(lm, options, searched, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MissingError, match="method.value.cache_dir="):
        values_of(lm, [0], replace(options, cache_dir=str(tmp_path / "file")))
    assert searched == []


@pytest.mark.parametrize("method", ["memit", "rome"])
def test_an_edit_tells_how_many_values_were_there(method, tmp_path):
    lm = embedded_lm()
    made = packaged_editor(tmp_path, method, "method.value.reuse=true", "method.value.steps=2")
    facts = [case.requests[0] for case in world()[:1]]
    first, second = (made.edit(lm, facts) for _ in range(2))
    assert "taken" not in first.diagnosis(lm) and second.diagnosis(lm)["taken"] == 1
    for name, update in first.updates.items():
        assert torch.equal(update.left, second.updates[name].left)
