"""Second moments on disk: found again by what they depend on, continued after a kill, checked when they are read."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from stats_helpers import Recorder, corpus_file, language_model, store, texts
from tokenizers.normalizers import Lowercase

from edit_cli.files.described import Damaged
from edit_cli.statistics import collect as stats_pass
from edit_cli.statistics import files as stats_cache
from edit_cli.statistics.corpora import TextFile
from edit_cli.statistics.files import check


def refuse_to_run(lm) -> None:
    def refuse(*_):
        raise AssertionError("the model ran")

    lm.model.register_forward_pre_hook(refuse)


def test_a_hit_does_not_run_the_model(tmp_path):
    first = store(tmp_path).second_moment(language_model("gpt2"), 1)
    lm = language_model("gpt2")  # the same weights, another object
    refuse_to_run(lm)
    again = store(tmp_path).second_moment(lm, 1)
    assert again.cached and not first.cached
    assert torch.equal(again.matrix, first.matrix) and again.tokens == first.tokens and again.path == first.path
    assert lm.monitor.notes == [] and lm.monitor.tasks == []


def test_a_store_reads_each_file_once(tmp_path):
    lm, mine = language_model("gpt2"), store(tmp_path)
    moment = mine.second_moment(lm, 1)
    moment.path.unlink()
    assert mine.second_moment(lm, 1) is moment


def test_a_miss_is_said_and_timed(tmp_path):
    lm = language_model("gpt2")
    store(tmp_path).collect(lm, [0, 2])
    assert "layers 0, 2 of tiny-gpt2" in lm.monitor.notes[0] and "corpus" in lm.monitor.notes[0]
    assert lm.monitor.seconds["statistics"] > 0


def test_only_missing_layers_are_computed(tmp_path):
    store(tmp_path).second_moment(language_model("gpt2"), 1)
    lm = language_model("gpt2")
    moments = store(tmp_path).collect(lm, [0, 1, 2])
    assert [moment.cached for moment in moments] == [False, True, False]
    assert lm.monitor.tasks[0][0] == "second moments, layers 0, 2 (documents)"


@pytest.mark.parametrize(
    "change",
    [{"tokens": 100}, {"documents": 20}, {"seed": 2}, {"max_length": 9}, {"dtype": "float32"}, {"include_bos": False}],
    ids=str,
)
def test_other_settings_are_another_entry(tmp_path, change):
    store(tmp_path).second_moment(language_model("llama"), 1)
    assert not store(tmp_path, **change).second_moment(language_model("llama"), 1).cached


def test_other_weights_text_tokenizer_or_dtype_are_another_entry(tmp_path):
    store(tmp_path).second_moment(language_model("gpt2"), 1)
    assert not store(tmp_path).second_moment(language_model("gpt2", seed=1), 1).cached
    assert not store(tmp_path).second_moment(language_model("gpt2", dtype=torch.bfloat16), 1).cached
    other = language_model("gpt2")
    other.tokenizer.backend_tokenizer.normalizer = Lowercase()
    assert not store(tmp_path).second_moment(other, 1).cached
    longer = store(tmp_path, corpus=corpus_file(tmp_path, [*texts(), "one more line"]))
    assert not longer.second_moment(language_model("gpt2"), 1).cached
    assert store(tmp_path).second_moment(language_model("gpt2"), 1).cached


def test_one_changed_weight_in_the_last_layer_is_enough(tmp_path):
    store(tmp_path).second_moment(language_model("gpt2"), 0)
    lm = language_model("gpt2")
    lm.parameter("transformer.h.2.mlp.c_proj.weight").data[0, 0] += 1e-3
    assert not store(tmp_path).second_moment(lm, 0).cached


def test_a_moved_file_and_other_batches_are_the_same_entry(tmp_path):
    store(tmp_path).second_moment(language_model("gpt2"), 1)
    (tmp_path / "there").mkdir()
    moved = store(tmp_path, corpus=corpus_file(tmp_path / "there"), batch_tokens=77)
    assert moved.second_moment(language_model("gpt2"), 1).cached


def test_models_of_one_name_do_not_mix(tmp_path):
    a, b = (store(tmp_path).second_moment(language_model("gpt2", seed, name="same"), 1) for seed in (0, 1))
    assert a.path.parent == b.path.parent and a.path != b.path


# --- resuming
# -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_steps(monkeypatch):
    """Partial sums after every chunk of one batch."""
    monkeypatch.setattr(stats_pass, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(stats_pass, "CHUNK_BATCHES", 1)
    monkeypatch.setattr(stats_pass.time, "monotonic", lambda: 0.0)


@pytest.mark.parametrize("limit", [{}, {"documents": 50}, {"tokens": 700}], ids=str)
def test_a_killed_pass_goes_on_where_it_stopped(tmp_path, small_steps, limit):
    whole = store(tmp_path, cache_dir=str(tmp_path / "whole"), **limit).collect(language_model("gpt2"), [0, 2])
    killed = language_model("gpt2")
    killed.monitor = Recorder(give_up_after=whole[0].tokens // 2 if "tokens" in limit else 30)
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, **limit).collect(killed, [0, 2])
    assert not any(module._forward_pre_hooks for module in killed.model.modules())

    lm, rows = language_model("gpt2"), []
    lm.module("transformer.wte").register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    resumed = store(tmp_path, **limit).collect(lm, [0, 2])
    assert any(note.startswith("continuing") for note in lm.monitor.notes)
    assert whole[0].documents is not None and 0 < sum(rows) < whole[0].documents
    for a, b in zip(resumed, whole, strict=True):
        assert torch.equal(a.matrix, b.matrix)
        assert (a.tokens, a.documents, a.position0_share) == (b.tokens, b.documents, b.position0_share)
    assert not list(tmp_path.rglob("partial_*"))


def test_fewer_layers_go_on_from_the_same_partial_sums_and_more_start_over(tmp_path, small_steps):
    killed = language_model("gpt2")
    killed.monitor = Recorder(give_up_after=30)
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path).collect(killed, [0, 2])
    more, fewer = language_model("gpt2"), language_model("gpt2")
    elsewhere = store(tmp_path, cache_dir=str(tmp_path / "whole")).collect(more, [0, 1, 2])
    assert torch.equal(store(tmp_path).second_moment(fewer, 2).matrix, elsewhere[2].matrix)
    assert any(note.startswith("continuing") for note in fewer.monitor.notes)


def test_partial_sums_of_other_documents_are_not_used(tmp_path, small_steps):
    class Drifting(TextFile):
        """A source that gives other documents under the same identity, as a hub without a pinned revision may."""

        def identity(self):
            return {"kind": "drifting"}

    killed = language_model("gpt2")
    killed.monitor = Recorder(give_up_after=30)
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, corpus=Drifting(corpus_file(tmp_path).path)).second_moment(killed, 1)
    other = corpus_file(tmp_path, [text.upper() for text in texts()])
    lm = language_model("gpt2")
    moment = store(tmp_path, corpus=Drifting(other.path)).second_moment(lm, 1)
    assert any("started over" in note for note in lm.monitor.notes)
    expected = store(tmp_path, corpus=other, cache_dir=str(tmp_path / "whole")).second_moment(language_model("gpt2"), 1)
    assert torch.equal(moment.matrix, expected.matrix)


# --- checks
# -------------------------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def poison(path):
    tensors, about = stats_cache.read(path)
    tensors["second_moment"][0, 1] = float("nan")
    stats_cache.write(path, tensors, about)


def skew(path):
    tensors, about = stats_cache.read(path)
    tensors["second_moment"][0, 1] += tensors["second_moment"].diagonal().max()
    stats_cache.write(path, tensors, about)


def relabel(path):
    tensors, about = stats_cache.read(path)
    about["identity"]["seed"] = 99
    stats_cache.write(path, tensors, about)


def strip_metadata(path):
    save_file(load_file(path), path)


@pytest.mark.parametrize(
    "damage", [truncate, poison, skew, relabel, strip_metadata, lambda path: path.write_bytes(b"")]
)
def test_a_damaged_file_is_computed_again_and_that_is_said(tmp_path, damage):
    good = store(tmp_path).second_moment(language_model("gpt2"), 1)
    damage(good.path)
    lm = language_model("gpt2")
    again = store(tmp_path).second_moment(lm, 1)
    assert torch.equal(again.matrix, good.matrix) and not again.cached
    assert "damaged" in lm.monitor.notes[0]
    assert store(tmp_path).second_moment(language_model("gpt2"), 1).cached


@pytest.mark.parametrize(
    ("matrix", "tokens", "complaint"),
    [
        (torch.eye(3), 5, "width 4"),
        (torch.eye(4), 0, "token count 0"),
        (torch.eye(4) / 0, 5, "finite"),
        (-torch.eye(4), 5, "negative"),
        (torch.eye(4) + torch.triu(torch.ones(4, 4)), 5, "symmetric"),
    ],
)
def test_what_cannot_be_a_second_moment(matrix, tokens, complaint):
    with pytest.raises(Damaged, match=complaint):
        check(matrix, tokens, 4)
    check(torch.eye(4), 5, 4)


def test_symmetry_is_checked_everywhere_in_a_large_matrix():
    matrix = torch.eye(2500)
    matrix[2400, 3] = 0.5
    with pytest.raises(Damaged, match="symmetric"):
        check(matrix, 5, 2500)


def test_writing_leaves_the_old_file_if_it_fails(tmp_path):
    path = tmp_path / "a.safetensors"
    stats_cache.write(path, {"x": torch.ones(2)}, {"n": 1})
    with pytest.raises(TypeError):
        stats_cache.write(path, {"x": torch.zeros(2)}, {"n": object()})
    assert stats_cache.read(path)[1]["n"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
