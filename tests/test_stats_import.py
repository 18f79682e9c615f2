"""Second moments from published `.npz` files."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from stats_helpers import language_model, store

from edit_cli.errors import MissingError, UsageError


def save_npz(path, width: int = 64, tokens: int = 500, seed: int = 0, **replaced):
    keys = np.random.default_rng(seed).normal(size=(tokens, width)).astype(np.float32)
    arrays: dict[str, Any] = {
        "mom2.constructor": "util.runningstats.SecondMoment()",
        "mom2.count": tokens,
        "mom2.mom2": keys.T @ keys,
        "sample_size": 100,
    } | {name.replace("_", "."): value for name, value in replaced.items()}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return keys.astype(np.float64).T @ keys.astype(np.float64) / tokens


def published(layer: int) -> str:
    return f"transformer.h.{layer}.mlp.c_proj_float32_mom2_100000.npz"


def test_a_folder_of_published_files(tmp_path):
    expected = {layer: save_npz(tmp_path / published(layer), seed=layer) for layer in (0, 1, 2)}
    lm = language_model("gpt2")
    lm.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    moments = store(tmp_path, import_npz=str(tmp_path)).collect(lm, [2, 0])
    for moment in moments:
        assert np.allclose(moment.matrix.numpy(), expected[moment.layer], rtol=1e-5, atol=1e-5)
        assert torch.equal(moment.matrix, moment.matrix.T)
        assert (moment.tokens, moment.cached, moment.documents, moment.position0_share) == (500, True, None, None)
    assert len(lm.monitor.notes) == 2 and "on trust" in lm.monitor.notes[0]


def test_a_path_with_the_layers_number(tmp_path):
    expected = save_npz(tmp_path / "layer 1.npz")
    mine = store(tmp_path, import_npz=str(tmp_path / "layer {layer}.npz"))
    assert np.allclose(mine.second_moment(language_model("gpt2"), 1).matrix.numpy(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(MissingError, match=r"layer 2\.npz does not exist"):
        mine.second_moment(language_model("gpt2"), 2)


def test_one_file_serves_one_layer(tmp_path):
    save_npz(tmp_path / "mine.npz")
    lm, mine = language_model("gpt2"), store(tmp_path, import_npz=str(tmp_path / "mine.npz"))
    mine.second_moment(lm, 1)
    with pytest.raises(UsageError, match=r"cannot serve layers 1 and 2: write \{layer\}"):
        mine.second_moment(lm, 2)
    with pytest.raises(UsageError, match="cannot serve layers 0 and 2"):
        store(tmp_path, import_npz=str(tmp_path / "mine.npz")).collect(lm, [0, 2])


def test_a_file_of_another_module_is_refused(tmp_path):
    save_npz(tmp_path / published(2))
    with pytest.raises(UsageError, match=r"belongs to transformer\.h\.2\.mlp\.c_proj, not to transformer\.h\.1"):
        store(tmp_path, import_npz=str(tmp_path / published(2))).second_moment(language_model("gpt2"), 1)


def test_a_folder_without_or_with_too_many_fitting_files(tmp_path):
    lm, mine = language_model("gpt2"), store(tmp_path, import_npz=str(tmp_path))
    with pytest.raises(MissingError, match=r"no file transformer\.h\.1\.mlp\.c_proj_\*_mom2_\*\.npz"):
        mine.second_moment(lm, 1)
    save_npz(tmp_path / published(1))
    save_npz(tmp_path / published(1).replace("100000", "1000"))
    with pytest.raises(UsageError, match="several files fit"):
        mine.second_moment(lm, 1)


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"width": 48}, "48×48, but the layer's keys have width 64"),
        ({"mom2_count": 0}, "token count 0"),
        ({"mom2_count": None}, "lacks the arrays mom2.mom2"),
        ({"mom2_mom2": np.full((64, 64), np.nan)}, "finite"),
        ({"mom2_mom2": np.triu(np.ones((64, 64)))}, "not symmetric"),
        ({"mom2_mom2": np.array([object()])}, "cannot be read"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, arrays, complaint):
    save_npz(tmp_path / published(1), **arrays)
    with pytest.raises(MissingError, match="stats.import_npz") as error:
        store(tmp_path, import_npz=str(tmp_path)).second_moment(language_model("gpt2"), 1)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_an_array_is_not_read_before_its_header_is_known_to_fit(tmp_path, monkeypatch):
    """A file of some bytes can ask for any amount of memory."""
    save_npz(tmp_path / published(1))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**40, 2**20)})
    with zipfile.ZipFile(tmp_path / published(1), "w") as archive:
        archive.writestr("mom2.mom2.npy", header.getvalue())
        archive.writestr("mom2.count.npy", header.getvalue())
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("the array was read"))
    with pytest.raises(MissingError, match="the layer's keys have width 64"):
        store(tmp_path, import_npz=str(tmp_path)).second_moment(language_model("gpt2"), 1)


def test_a_file_that_is_no_archive(tmp_path):
    (tmp_path / published(1)).write_bytes(b"<html>not found</html>")
    with pytest.raises(MissingError, match="cannot be read"):
        store(tmp_path, import_npz=str(tmp_path)).second_moment(language_model("gpt2"), 1)
