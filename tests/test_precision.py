"""How float32 is multiplied on CUDA devices: by TF32 in passes, in full in what is added to weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from edit_cli.edits.edit import Factors
from edit_cli.errors import UsageError
from edit_cli.lm.precision import exact_matmul, passes_in_tf32

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
