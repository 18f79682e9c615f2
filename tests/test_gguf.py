"""Adapters for llama.cpp, read back by the library that its own tools read them with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from embedded import embedded_lm
from families import tiny_lm
from test_export import IN, OUT, delta, saved

from edit_cli.edits import gguf_adapter
from edit_cli.edits.edit import Factors
from edit_cli.errors import UsageError


def read(file: Path):
    """({tensor: values}, {key: value}) of a file."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(file)
    tensors = {part.name: torch.tensor(part.data.copy()) for part in reader.tensors}
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def test_the_product_of_its_matrices_is_the_edit(cli, tmp_path):
    pytest.importorskip("gguf")
    lm = embedded_lm()
    first, second = delta(lm, **{OUT.format(1): 1, IN.format(4): 2}), delta(lm, **{OUT.format(1): 3})
    path = saved(lm, tmp_path / "edits", first, second)
    ended = cli("export", str(path), "--to", "gguf-lora", "--out", "adapter")
    assert (ended.code, ended.last) == (0, "adapter"), ended.err
    tensors, about = read(Path("adapter/adapter.gguf"))
    assert (about["general.type"], about["general.architecture"]) == ("adapter", "gpt2")
    assert (about["adapter.type"], about["adapter.lora.alpha"]) == ("lora", 0.0)
    names = {"blk.1.ffn_down": OUT.format(1), "blk.4.ffn_up": IN.format(4)}
    assert sorted(tensors) == sorted(f"{name}.weight.lora_{half}" for name in names for half in "ab")
    for name, module in names.items():
        a, b = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
        parts = [edit.updates[f"{module}.weight"] for edit in (first, second) if f"{module}.weight" in edit.updates]
        wanted = torch.stack([part.dense() for part in parts if isinstance(part, Factors)]).sum(dim=0)
        torch.testing.assert_close(b @ a, wanted, atol=1e-6, rtol=1e-5)
    card = Path("adapter/README.md").read_text()
    assert "--lora adapter.gguf" in card and "without scaling" in card
    assert str(tmp_path).encode() not in Path("adapter/adapter.gguf").read_bytes()


def test_matrices_that_are_stored_otherwise_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    lm = tiny_lm("llama")
    layer, width = lm.layout.block(1), lm.layout.width
    part = Factors(torch.ones(width, 1), torch.ones(1, width))
    gguf_adapter.write(tmp_path, lm, {f"{layer}.self_attn.o_proj": part})
    tensors, about = read(tmp_path / "adapter.gguf")
    assert sorted(tensors) == [f"blk.1.attn_output.weight.lora_{half}" for half in "ab"]
    assert about["general.architecture"] == "llama"
    with pytest.raises(UsageError, match=r"self_attn\.q_proj, which llama\.cpp stores in another order"):
        gguf_adapter.write(tmp_path, lm, {f"{layer}.self_attn.q_proj": part})
    monkeypatch.setattr(lm.model.config, "model_type", "unheard-of")
    parts = {f"{layer}.self_attn.o_proj": part}
    with pytest.raises(UsageError, match=r"of the kind unheard-of; there is no architecture unheard-of .*--arch NAME"):
        gguf_adapter.write(tmp_path, lm, parts)
    with pytest.raises(UsageError, match="--arch nonsense: there is no architecture nonsense"):
        gguf_adapter.write(tmp_path, lm, parts, "nonsense")
    gguf_adapter.write(tmp_path, lm, parts, "llama")
    assert read(tmp_path / "adapter.gguf")[1]["general.architecture"] == "llama"


def test_without_the_library_it_says_what_to_install(cli, tmp_path, monkeypatch):
    lm = embedded_lm()
    path = saved(lm, tmp_path / "edits", delta(lm, **{OUT.format(1): 1}))
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("edit_cli.experiment.saved_edits.load_model", lambda *_: pytest.fail("it was loaded"))
    ended = cli("export", str(path), "--to", "gguf-lora", "--out", "adapter")
    assert ended.code == 3 and "needs the package gguf" in ended.error and "edit-cli[gguf]" in ended.error
    assert not Path("adapter").exists()
