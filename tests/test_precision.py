"""How float32 is multiplied on CUDA devices: by TF32 in passes, in full in what is added to weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from embedded import embedded_lm
from torch.overrides import TorchFunctionMode

from edit_cli.config import catalog
from edit_cli.config.composed import composed
from edit_cli.edits.edit import Factors
from edit_cli.errors import UsageError
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.precision import exact_matmul, passes_in_tf32

FACT = ("edit.prompt={} plays the", "edit.subject=Ada Lund", "edit.target=violin")
BACKEND = torch.backends.cuda.matmul


class Products(TorchFunctionMode):
    """Notes the arithmetic that is set at every product of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            self.seen.append(BACKEND.fp32_precision)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("given", "expected"), [((), "tf32"), (("model.tf32=false",), "ieee")])
def test_a_command_sets_it_for_its_own_time(cli, monkeypatch, given, expected):
    before, seen = BACKEND.fp32_precision, []

    def run(*_: Any) -> None:
        seen.append(BACKEND.fp32_precision)
        raise UsageError("seen")

    monkeypatch.setattr("edit_cli.commands.evaluate.run", run)
    assert cli("evaluate", "method=ft", *given, quick=True).code == 2
    assert seen == [expected] and BACKEND.fp32_precision == before


def test_updates_of_weights_are_multiplied_in_full():
    update = Factors(torch.randn(4, 2), torch.randn(2, 3))
    with passes_in_tf32(True), Products() as products:
        update.left @ update.right
        dense = update.dense()
        update.left @ update.right
    assert products.seen == ["tf32", "ieee", "tf32"]
    assert torch.equal(dense, update.left @ update.right)


def test_blocks_lie_in_one_another():
    with passes_in_tf32(True):
        with exact_matmul():
            assert BACKEND.fp32_precision == "ieee"
        assert BACKEND.fp32_precision == "tf32"


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A folder with the embedded model in bfloat16."""
    folder = tmp_path_factory.mktemp("half") / "half"
    lm = embedded_lm()
    model: Any = copy.deepcopy(lm.model)
    model.to(torch.bfloat16).save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("cpu", "auto", "float32"),
        ("cuda", "auto", "bfloat16"),
        ("cuda", "float32", "float32"),
        ("cpu", "bfloat16", "bfloat16"),
    ],
)
def test_a_model_is_loaded_in_the_dtype_of_its_files_on_a_gpu(half, monkeypatch, device, given, expected):
    monkeypatch.setattr(ModelOptions, "target", property(lambda self: torch.device(device)))
    options = ModelOptions("half", half, dtype=given)
    assert options.settled().dtype == expected
    assert options.outline is not None and options.outline.dtype == getattr(torch, expected)


@pytest.mark.parametrize("name", [name for name in catalog.names("model") if name.startswith("tiny-")])
def test_embedded_models_compute_in_float32_whatever_their_files_are(name):
    assert composed("edit", {"model": name}, {}).part("model").dtype == "float32"


def test_a_run_says_what_it_was(cli):
    assert cli("edit", "method=ft", "method.steps=1", *FACT, "run_dir=run", quick=True).code == 0
    assert json.loads(Path("run/manifest.json").read_text())["config"]["model"]["dtype"] == "float32"
