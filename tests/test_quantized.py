"""4- and 8-bit models: an edit stands beside the quantized matrix, in full digits, and comes off bit for bit."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from embedded import METHODS, answers, embedded_lm, packaged_editor, requests
from families import tiny
from torch import nn

from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.errors import MissingError, UsageError
from edit_cli.lm.hooks import unwrapped
from edit_cli.lm.layout import is_transposed
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.lm.model_files import packaged
from edit_cli.lm.weights import quantized as quantized

pytestmark = pytest.mark.thin(4)

KINDS = [("4bit", "float32"), ("4bit", "bfloat16"), ("8bit", "float32"), ("8bit", "bfloat16")]
kinds = pytest.mark.parametrize("bits, dtype", KINDS)
FILES = packaged("embedded:tiny-gpt2")
FEW = ("ft", "lookup", "ultraedit")  # one of each way in which a model is edited, beside `memit`


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


@cache
def model(bits: Any, dtype: Any) -> LM:
    return ModelOptions("tiny-gpt2", "embedded:tiny-gpt2", quantize=bits, dtype=dtype, device="cpu").load()


def whole(lm: LM) -> str:
    """A hash of every bit that the model computes with."""
    return lm.fingerprint([name for name, _ in lm.model.named_parameters()])


def dequantized_twin(lm: LM) -> LM:
    """The embedded model in float32 with the matrices that the quantized one multiplies by."""
    twin = embedded_lm()
    for name, module in lm.model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            value = lm.weight(name).float()
            twin.parameter(f"{name}.weight").data.copy_(value.T if is_transposed(twin.module(name)) else value)
    return twin


# --- without bitsandbytes
# -------------------------------------------------------------------------------------------------


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(MissingError) as caught:
        ModelOptions("m", "embedded:tiny-gpt2", quantize="4bit").load()
    assert str(caught.value) == "model.quantize=4bit needs bitsandbytes: pip install 'edit-cli[quantized]'"


def test_the_command_says_so_in_one_line(monkeypatch, cli):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    ended = cli("evaluate", "method=rome", "limit=1", "model.quantize=8bit", quick=True)
    assert ended.code == 3
    assert "error: model.quantize=8bit needs bitsandbytes: pip install 'edit-cli[quantized]'" in ended.err
    assert "Traceback" not in ended.err


def files_quantized_by(method: str, folder: Path) -> Path:
    shutil.copytree(FILES, folder)
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_files_of_other_quantizers_are_refused(method, tmp_path):
    folder = files_quantized_by(method, tmp_path / "model")
    with pytest.raises(
        UsageError, match=rf"^model.id={folder}: .* quantized by {method}, which cannot be edited: take"
    ):
        ModelOptions("m", str(folder)).load()


def test_files_that_are_quantized_already_need_the_library_too(monkeypatch, tmp_path):
    folder = files_quantized_by("bitsandbytes", tmp_path / "model")
    with pytest.raises(UsageError, match="are quantized already; leave it null"):
        ModelOptions("m", str(folder), quantize="4bit").load()
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"needs bitsandbytes: pip install 'edit-cli\[quantized\]'"):
        ModelOptions("m", str(folder)).load()


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"quantize": "3bit"}, "model.quantize=3bit: choose 4bit, 8bit or null"),
        ({"quantize": "4bit", "dtype": "float64"}, "model.dtype=float64 does not go with quantized weights"),
    ],
)
def test_settings_that_cannot_work(fields, told):
    with pytest.raises(UsageError, match=told):
        ModelOptions("m", "embedded:tiny-gpt2", **fields).load()


# --- with it
# ----------------------------------------------------------------------------------------------------------------


@kinds
def test_what_a_quantized_model_is(bits, dtype, bitsandbytes):
    lm, plain = model(bits, dtype), embedded_lm()
    assert lm.is_quantized
    assert not plain.is_quantized
    assert lm.dtype == getattr(torch, dtype)
    assert lm.layout == plain.layout
    for layer in range(6):
        name = lm.layout.mlp_out(layer)
        assert lm.key_width(layer) == 512
        assert lm.writes_are_additive(layer)
        kept, original = lm.weight(name), plain.weight(name)
        assert kept.dtype == torch.float32
        assert 1e-3 < (kept - original).norm() / original.norm() < (0.15 if bits == "4bit" else 0.02)
    assert answers(lm, requests(8))[0] == pytest.approx(
        answers(dequantized_twin(lm), requests(8))[0], rel=0.05, abs=0.05
    )


@kinds
def test_a_forward_pass_changes_no_bit(bits, dtype, bitsandbytes):
    """Some processors would pack the weights anew at the first one; a model loaded again has the same bits too."""
    lm = ModelOptions("m", "embedded:tiny-gpt2", quantize=bits, dtype=dtype, device="cpu").load()
    before, weight = whole(lm), lm.weight(lm.layout.mlp_out(1))
    answers(lm, requests(2))
    assert whole(lm) == before == whole(model(bits, dtype))
    assert torch.equal(lm.weight(lm.layout.mlp_out(1)), weight)
    assert lm.fingerprint() != embedded_lm().fingerprint()


@kinds
def test_an_update_is_added_beside_the_matrix(bits, dtype, bitsandbytes):
    lm = model(bits, dtype)
    name, draw = lm.layout.mlp_out(2), torch.Generator().manual_seed(0)
    untouched, plain = whole(lm), lm.weight(name)
    x = torch.randn(3, 7, 512, generator=draw).to(lm.dtype)
    update = Factors(torch.randn(128, 2, generator=draw) * 0.1, torch.randn(2, 512, generator=draw))
    module, without = unwrapped(lm.module(name)), lm.module(name)(x)
    hooks = len(module._forward_hooks)
    lm.attach(WeightDelta({f"{name}.weight": update}))
    torch.testing.assert_close(lm.weight(name), plain + update.dense(), rtol=1e-2, atol=2e-3)
    expected = without.float() + x.float() @ update.dense().T
    torch.testing.assert_close(
        lm.module(name)(x).float(), expected, rtol=2e-2, atol=0.1 if dtype == "bfloat16" else 1e-4
    )
    assert whole(lm) != untouched
    lm.attach(WeightDelta({f"{name}.weight": update}))
    torch.testing.assert_close(lm.weight(name), plain + 2 * update.dense(), rtol=1e-2, atol=4e-3)
    assert len(module._forward_hooks) == hooks + 1
    lm.detach()
    lm.detach()
    assert whole(lm) == untouched
    assert lm.masters == {}
    assert len(module._forward_hooks) == hooks
    assert torch.equal(lm.module(name)(x), without)


@kinds
def test_small_updates_add_up(bits, dtype, bitsandbytes):
    """A hundredth of a step between two 4-bit values, a hundred times."""
    lm = model(bits, dtype)
    name = lm.layout.mlp_out(1)
    before, step = lm.weight(name), Factors(torch.full((128, 1), 2.0**-8), torch.full((1, 512), 2.0**-8))
    for _ in range(100):
        lm.attach(WeightDelta({f"{name}.weight": step}))
    moved = lm.weight(name) - before
    torch.testing.assert_close(moved, torch.full_like(moved, 100 * 2.0**-16), rtol=5e-3, atol=0.0)
    for _ in range(100):
        lm.detach()
    assert torch.equal(lm.weight(name), before)


@pytest.mark.parametrize(
    "name, bits, dtype",
    [
        pytest.param(
            name,
            *kind,
            marks=() if name == "memit" or (kind == KINDS[1] and name in FEW) else pytest.mark.slow,
        )
        for kind in KINDS
        for name in METHODS
    ],
)
def test_every_method_edits_it(name, bits, dtype, statistics, tmp_path, bitsandbytes):
    lm, wanted = model(bits, dtype), requests(2)
    before, untouched = answers(lm, wanted), whole(lm)
    edit = packaged_editor(statistics, name).edit(lm, wanted)
    assert whole(lm) == untouched
    edit_store.save(edit, tmp_path / "edit", lm, wanted, {"name": name})
    with lm.edited(edit):
        after = answers(lm, wanted)
    assert all(new < old for new, old in zip(after[0], before[0], strict=True))
    edit_store.attach(tmp_path / "edit", lm)
    assert answers(lm, wanted) == after
    lm.detach()
    assert (answers(lm, wanted), whole(lm)) == (before, untouched)
    with pytest.raises(MissingError, match="differs in this model"):
        edit_store.load(tmp_path / "edit", embedded_lm())


@pytest.mark.parametrize("name, more", [("memit", ()), ("rome", ()), ("ft", ()), ("ft", ("method.part=block",))])
def test_an_edit_is_that_of_the_model_with_the_same_matrices(name, more, statistics, bitsandbytes):
    """Gradients reach what stands beside the matrix as they would reach the matrix; vectors are edited where they
    lie.
    """
    lm, wanted = model("4bit", "float32"), requests(2)
    twin = dequantized_twin(lm)
    found, expected = (packaged_editor(statistics / str(x is lm), name, *more).edit(x, wanted) for x in (lm, twin))
    assert found.updates.keys() == expected.updates.keys()
    for parameter in found.updates:
        mine, its = found.stored(lm, parameter), expected.stored(twin, parameter)
        if its.dim() == 2 and is_transposed(twin.module(parameter.rpartition(".")[0])):
            its = its.T  # a quantized Conv1D is a Linear
        assert (mine - its).norm() <= (0.1 if more else 0.02) * its.norm()  # Adam makes much of the smallest gradients
    with lm.edited(found), twin.edited(expected):
        assert answers(lm, wanted)[0] == pytest.approx(answers(twin, wanted)[0], abs=0.01)


def test_a_family_with_linear_layers(tmp_path, bitsandbytes, statistics):
    raw, words = tiny("llama")
    raw.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    lm = ModelOptions("m", str(tmp_path), quantize="4bit", device="cpu").load()
    untouched, name = whole(lm), lm.layout.mlp_out(1)
    expected = lm.weight(name) + 0.01
    lm.attach(WeightDelta({f"{name}.weight": torch.full((32, 88), 0.01)}))
    torch.testing.assert_close(lm.weight(name), expected)
    lm.detach()
    assert whole(lm) == untouched


def test_files_that_bitsandbytes_wrote(tmp_path, bitsandbytes):
    lm = model("4bit", "bfloat16")
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    again = ModelOptions("m", str(tmp_path), dtype="bfloat16", device="cpu").load()
    assert again.is_quantized
    assert answers(again, requests(2)) == answers(lm, requests(2))
    assert torch.equal(again.weight(lm.layout.mlp_out(0)), lm.weight(lm.layout.mlp_out(0)))


def test_weights_on_disk_do_not_go_with_it(bitsandbytes):
    with pytest.raises(UsageError, match="^model.quantize with weights that do not fit on the device does not work"):
        ModelOptions("m", "embedded:tiny-gpt2", quantize="8bit", device_map={"": "disk"}).load()


def test_loading_and_asking_print_nothing(capfd, bitsandbytes):
    answers(
        ModelOptions("m", "embedded:tiny-gpt2", quantize="8bit", dtype="bfloat16", device="cpu").load(), requests(1)
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_commands(cli, bitsandbytes):
    ended = cli("evaluate", "method=memit", "limit=2", "model.quantize=4bit", "run_dir=first", quick=True)
    assert ended.code == 0, ended.err
    metrics = json.loads(Path("first/summary.json").read_text())["metrics"]
    assert metrics["efficacy_success"]["after"]["mean"] == 100.0
    fact = ("edit.prompt={} is", "edit.subject=Rome", "edit.target=old")
    ended = cli("edit", "method=rome", *fact, "model.quantize=8bit", "run_dir=edited", quick=True)
    assert ended.code == 0, ended.err
    ended = cli("ask", "edited", "Rome is", "--json")  # of the model as it was loaded
    assert ended.code == 0 and '"old' in ended.out.replace(" old", "old"), ended.err
    ended = cli("apply", "edited", "--out", "baked")
    assert ended.code == 2
    assert "tiny-gpt2 is quantized, so the edit stands beside its matrices" in ended.err
    assert not Path("baked").exists()
    ended = cli("evaluate", "method=rome", "limit=1", "model.quantize=2bit", quick=True)
    assert (ended.code, ended.err.strip().splitlines()[-1]) == (
        2,
        "error: model.quantize=2bit: choose 4bit, 8bit or null",
    )
