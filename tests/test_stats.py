"""Second moments: equal to numpy's, the same however they are computed, of the unedited model, and found again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from stats_helpers import corpus_file, language_model, store, texts

from edit_cli.config.build import build
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.errors import MissingError, UsageError
from edit_cli.statistics.moments import MomentStore

FAMILIES = ["gpt2", "llama"]


def keys_one_by_one(lm, layer: int, documents: list[str], max_length: int = 64) -> list[np.ndarray]:
    """Keys (tokens, m) of each document, from one whole forward pass without padding."""
    found = []
    handle = lm.module(lm.layout.mlp_out(layer)).register_forward_pre_hook(
        lambda _, args: found.append(args[0][0].double().numpy())
    )
    for text in documents:
        ids = lm.tokenizer(text)["input_ids"][:max_length]
        with torch.no_grad():
            lm.model(input_ids=torch.tensor([ids]))
    handle.remove()
    return found


def mean_outer(keys: list[np.ndarray]) -> np.ndarray:
    stacked = np.concatenate(keys)
    return stacked.T @ stacked / len(stacked)


def distance(a, b) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_numpy(family, tmp_path):
    lm = language_model(family)
    for layer in range(3):
        keys = keys_one_by_one(lm, layer, texts())
        moment = store(tmp_path).second_moment(lm, layer)
        assert moment.matrix.dtype == torch.float64
        assert distance(moment.matrix, mean_outer(keys)) < 2e-6  # the model computes in float32
        assert moment.tokens == sum(map(len, keys)) and moment.documents == len(texts())
        first = sum(float((k[0] ** 2).sum()) for k in keys) / sum(float((k**2).sum()) for k in keys)
        assert moment.position0_share == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_numpy_to_the_last_digits_where_the_model_does(family, tmp_path):
    lm = language_model(family, dtype=torch.float64)
    assert distance(store(tmp_path).second_moment(lm, 1).matrix, mean_outer(keys_one_by_one(lm, 1, texts()))) < 1e-12


def test_matrix_is_exactly_symmetric_and_float32_files_are_a_rounding_of_it(tmp_path):
    lm = language_model("gpt2")
    exact, rounded = (store(tmp_path, dtype=dtype).second_moment(lm, 1).matrix for dtype in ("float64", "float32"))
    assert torch.equal(exact, exact.T)
    assert torch.equal(rounded, exact.float().double())


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_and_padding_do_not_matter(family, tmp_path):
    lm = language_model(family, dtype=torch.float64)
    together, alone = (
        store(tmp_path, batch_tokens=n, cache_dir=str(tmp_path / str(n))).second_moment(lm, 2) for n in (5000, 1)
    )
    assert distance(together.matrix, alone.matrix) < 1e-12
    assert together.tokens == alone.tokens and not alone.cached


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_in_one_pass(family, tmp_path):
    lm = language_model(family)
    together = store(tmp_path).collect(lm, [2, 0, 1])
    assert [moment.layer for moment in together] == [2, 0, 1]
    assert len(lm.monitor.tasks) == 1
    for moment in together:
        alone = store(tmp_path, cache_dir=str(tmp_path / "other")).second_moment(lm, moment.layer)
        assert not alone.cached and torch.equal(alone.matrix, moment.matrix)


def test_nothing_behind_the_deepest_layer_is_computed(tmp_path):
    lm = language_model("gpt2")
    reached = []
    for name in ("transformer.h.1", "transformer.h.2", "lm_head"):
        lm.module(name).register_forward_pre_hook(lambda *_, name=name: reached.append(name))
    store(tmp_path).collect(lm, [0, 1])
    assert set(reached) == {"transformer.h.1"}


def test_sums_of_a_bfloat16_model_are_wider_than_it(tmp_path):
    lm = language_model("llama", dtype=torch.bfloat16)
    matrix = store(tmp_path).second_moment(lm, 1).matrix
    keys = keys_one_by_one(lm, 1, texts())
    # the forward pass in bfloat16, batched or not, differs by that much
    assert distance(matrix, mean_outer(keys)) < 5e-3
    lone = store(tmp_path, corpus=corpus_file(tmp_path, texts()[:1])).second_moment(lm, 1).matrix
    assert distance(lone, mean_outer(keys[:1])) < 1e-6  # the same pass: only the sum differs


def test_float32_products_stay_float32(tmp_path):
    lm = language_model("gpt2")
    inside = []
    lm.module("transformer.h.0").register_forward_pre_hook(
        lambda *_: inside.append(torch.backends.cuda.matmul.fp32_precision)
    )
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "tf32"
        store(tmp_path).second_moment(lm, 1)
        assert set(inside) == {"ieee"} and backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


def test_an_attached_edit_changes_nothing_and_stays_attached(tmp_path):
    lm = language_model("gpt2")
    plain = store(tmp_path, cache_dir=str(tmp_path / "plain")).collect(lm, [0, 1, 2])
    update = Factors(torch.randn(16, 1), torch.randn(1, 64))
    lm.attach(WeightDelta({"transformer.h.0.mlp.c_proj.weight": update}))
    weight = lm.parameter("transformer.h.0.mlp.c_proj.weight").clone()
    edited = store(tmp_path).collect(lm, [0, 1, 2])
    assert not any(moment.cached for moment in edited)
    assert all(torch.equal(a.matrix, b.matrix) for a, b in zip(edited, plain, strict=True))
    assert len(lm.attached) == 1 and torch.equal(lm.parameter("transformer.h.0.mlp.c_proj.weight"), weight)
    # the edit does move these keys
    assert distance(mean_outer(keys_one_by_one(lm, 2, texts())), plain[2].matrix) > 1e-3
    lm.detach()
    assert store(tmp_path).second_moment(lm, 2).cached


def test_stops_after_documents(tmp_path):
    lm = language_model("gpt2")
    some = store(tmp_path, documents=7, seed=3)
    chosen = [text for text, _ in zip(some.corpus.documents(3), range(7), strict=False)]
    moment = some.second_moment(lm, 1)
    assert moment.documents == 7
    assert distance(moment.matrix, mean_outer(keys_one_by_one(lm, 1, chosen))) < 2e-6
    assert lm.monitor.tasks == [("second moments, layers 1 (documents)", 7)] and lm.monitor.advanced == 7


def test_stops_after_exactly_so_many_tokens_and_cuts_the_last_document(tmp_path):
    lm = language_model("gpt2")
    some = store(tmp_path, tokens=50)
    keys = np.concatenate(keys_one_by_one(lm, 1, list(some.corpus.documents(1))))[:50]
    moment = some.second_moment(lm, 1)
    assert moment.tokens == 50
    assert distance(moment.matrix, mean_outer([keys])) < 2e-6
    assert lm.monitor.advanced == 50


def test_auto_is_ten_tokens_a_dimension(tmp_path):
    lm = language_model("llama")
    moment = store(tmp_path, tokens="auto").second_moment(lm, 1)
    assert moment.tokens == 10 * 40
    assert store(tmp_path, tokens=400).second_moment(lm, 1).cached


def test_long_documents_are_cut(tmp_path):
    lm = language_model("gpt2")
    cut = store(tmp_path, max_length=6).second_moment(lm, 1)
    assert distance(cut.matrix, mean_outer(keys_one_by_one(lm, 1, texts(), max_length=6))) < 2e-6
    long = store(tmp_path, corpus=corpus_file(tmp_path, [" ".join(texts())]), max_length=1000)
    assert long.second_moment(lm, 1).tokens == 64  # what the model can read


def test_the_key_of_a_bos_token_can_be_left_out(tmp_path):
    lm = language_model("llama")
    keys = keys_one_by_one(lm, 1, texts())
    moment = store(tmp_path, include_bos=False).second_moment(lm, 1)
    assert moment.tokens == sum(len(k) - 1 for k in keys) and moment.position0_share == 0
    assert distance(moment.matrix, mean_outer([k[1:] for k in keys])) < 2e-6
    some = store(tmp_path, include_bos=False, tokens=33).second_moment(lm, 1)
    assert some.tokens == 33


def test_without_a_bos_token_every_key_counts(tmp_path):
    lm = language_model("gpt2")
    matrix = store(tmp_path, include_bos=False).second_moment(lm, 1).matrix
    assert torch.equal(matrix, store(tmp_path).second_moment(lm, 1).matrix)


def test_a_corpus_that_ends_before_the_limit_is_said(tmp_path):
    whole, part = language_model("gpt2"), language_model("gpt2")
    store(tmp_path, documents=1000, tokens=10**6).second_moment(whole, 1)
    store(tmp_path, documents=1000, tokens=100).second_moment(part, 1)
    assert any("corpus was read whole: 60 documents" in note for note in whole.monitor.notes)
    assert not any("read whole" in note for note in part.monitor.notes)


def test_fewer_tokens_than_dimensions_is_said(tmp_path):
    lm = language_model("gpt2")
    moment = store(tmp_path, tokens=20).second_moment(lm, 1)
    assert any("singular" in note for note in lm.monitor.notes)
    assert moment.condition() == float("inf") or moment.condition() > 1e12


def test_condition_is_close_and_never_too_large(tmp_path):
    moment = store(tmp_path).second_moment(language_model("llama", dtype=torch.float64), 1)
    exact = np.linalg.cond(moment.matrix.numpy())
    assert 0.9 * exact < moment.condition() <= exact * (1 + 1e-6)


def test_overflowing_keys_are_refused(tmp_path):
    lm = language_model("gpt2", dtype=torch.float16)
    lm.parameter("transformer.h.1.mlp.c_fc.weight").data.mul_(1e5)
    with pytest.raises(UsageError, match=r"layer 1 .* model\.dtype=float16"):
        store(tmp_path).second_moment(lm, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": "many"}, "stats.tokens=many"),
        ({"documents": 0}, "stats.documents=0"),
        ({"tokens": -1}, "stats.tokens=-1"),
        ({"batch_tokens": 0}, "stats.batch_tokens=0"),
        ({"dtype": "float16"}, "stats.dtype=float16"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, fields, message):
    with pytest.raises(UsageError, match=message):
        store(tmp_path, **fields)


def test_a_layer_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UsageError, match="layer 3 does not exist"):
        store(tmp_path).second_moment(language_model("gpt2"), 3)


def test_a_folder_that_cannot_be_written_to_is_named_before_the_model_runs(tmp_path):
    (tmp_path / "file").write_text("")
    lm = language_model("gpt2")
    lm.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(MissingError, match="stats.cache_dir="):
        store(tmp_path, cache_dir=str(tmp_path / "file")).second_moment(lm, 0)


def test_fields_are_what_a_config_can_hold():
    for tokens in (None, 1000, "auto"):
        assert build(OmegaConf.create({"tokens": tokens}), MomentStore).tokens == tokens
