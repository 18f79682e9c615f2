"""A second device for a machine that has none: tensors that lie on `twin:0`, compute on the processor, and refuse to be
mixed with others.

Run as a script, since a device can be made up only once a process: it puts the embedded model on the processor and the
twin in several ways, edits it by the methods that the command line has for each, and prints what came of it as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from embedded import embedded_lm, packaged_editor, world
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from edit_cli.lm.model import LM
from edit_cli.lm.weights.offload import fetch_again_for_backward, offloading_hook

TWIN = "twin:0"
INDEXING = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}


def raw(value):
    return value.raw if isinstance(value, OnTwin) else value


class OnTwin(Tensor):
    """A tensor of the twin; `raw` holds its values on the processor."""

    raw: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, requires_grad: bool | None = None) -> Any:
        if requires_grad is not None:  # accelerate makes a parameter of the class that the one before had
            return nn.Parameter(values, requires_grad)
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(TWIN),
        )
        made.raw = values
        return made

    def tolist(self):
        return self.raw.tolist()

    def untyped_storage(self):
        return self.raw.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[override]  # torch names no arguments
        kwargs, name = dict(kwargs or {}), function._schema.name
        if name == "aten::copy_":
            return copy_from(args[1], args[0])
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name != "aten::_to_copy":
            refuse_a_mixture(
                name, args[0], [tensor for tensor in tensors if not isinstance(tensor, OnTwin) and tensor.dim()]
            )
        there = any(isinstance(tensor, OnTwin) for tensor in tensors)
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == "twin"
            kwargs["device"] = torch.device("cpu") if there else kwargs["device"]
        result = function(*pytree.tree_map(raw, args), **pytree.tree_map(raw, kwargs))
        known = {id(tensor.raw): tensor for tensor in tensors if isinstance(tensor, OnTwin)}

        def back(value):
            if not (isinstance(value, Tensor) and there):
                return value
            return known[id(value)] if id(value) in known else OnTwin(value)

        return pytree.tree_map(back, result)


def refuse_a_mixture(name: str, first: object, others: list[Tensor]) -> None:
    """As torch does: only indices may come from the processor."""
    indices = (
        name in INDEXING
        and isinstance(first, OnTwin)
        and all(other.dtype in (torch.int64, torch.bool) for other in others)
    )
    if others and not indices:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    raw(target).copy_(raw(source))
    return target


def make_up_the_device() -> torch.library.Library:
    """The library must be kept as long as the device is used."""
    _setup_privateuseone_for_python_backend("twin")
    library = torch.library.Library("aten", "IMPL")

    def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        return OnTwin(torch.empty(size, dtype=dtype))

    def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
        return OnTwin(torch.empty_strided(size, stride, dtype=dtype))

    def eye(size, dtype=None, layout=None, device=None, pin_memory=None):
        return OnTwin(torch.eye(size, dtype=dtype))

    for name, made in (
        ("empty.memory_format", empty),
        ("empty_strided", empty_strided),
        ("eye", eye),
        ("_copy_from", copy_from),
    ):
        library.impl(name, made, "PrivateUse1")
    return library


PARTS = [
    "transformer.wte",
    "transformer.wpe",
    *(f"transformer.h.{layer}" for layer in range(6)),
    "transformer.ln_f",
    "lm_head",
]
EVEN, ODD = ({f"transformer.h.{layer}" for layer in range(6) if layer % 2 == rest} for rest in (0, 1))
PLACES = {
    # on the twin; where the others compute
    "two devices, even blocks on the second": (EVEN, "cpu"),
    "two devices, odd blocks and the head's norm on the second": (ODD | {"transformer.ln_f"}, "cpu"),
    "two devices, embeddings and even blocks on the second": (set(PARTS) - ODD, "cpu"),
    "two devices, embeddings and odd blocks on the second": (set(PARTS) - EVEN, "cpu"),
    "one device, half of the blocks brought from the host": (set(PARTS) - EVEN, TWIN),
    "one device, even the embeddings brought from the host": (ODD, TWIN),
}


def placed(there: set[str], main: str) -> LM:
    lm = embedded_lm()
    dispatch_model(lm.model, {part: TWIN if part in there else "cpu" for part in PARTS}, main_device=main)
    fetch_again_for_backward(lm.model)
    return LM(lm.model, lm.tokenizer, lm.name, model_id=lm.id)


def outcome(lm: LM, method: str, folder: Path) -> dict:
    """Answers before, with the edit and after it is off, and the norms of its updates."""
    wanted = [case.requests[0] for case in world("tune")[:2]]

    def answers() -> tuple[list[float], list[str]]:
        scores = lm.loglikelihood([(request.text, request.target_new) for request in wanted])
        return [score.nll for score in scores], lm.generate([request.text for request in wanted], 2)

    name, *more = method.split()
    before, weights = answers(), lm.fingerprint()
    edit = packaged_editor(folder, name, *more).edit(lm, wanted)
    with lm.edited(edit):
        after = answers()
    lm.__dict__.pop("_base_fingerprint")  # so that it is computed anew
    return {
        "before": before,
        "after": after,
        "undone": answers() == before and lm.fingerprint() == weights,
        "weights": weights,
        "norms": edit.norms() if hasattr(edit, "norms") else {},
    }


def report(pairs: list[list[str]], folder: Path) -> dict:
    library = make_up_the_device()
    # statistics are computed on the processor, and once more in the first of the places
    found: dict = {
        "plain": {method: outcome(embedded_lm(), method, folder / "plain") for method in sorted({m for _, m in pairs})},
        "placed": {},
    }
    for number, (title, (there, main)) in enumerate(PLACES.items()):
        lm = placed(there, main)
        hooks = [hook for hook in map(offloading_hook, lm.model.modules()) if hook]
        away = [hook.execution_device for hook in hooks]
        devices = {str(parameter.device) for parameter in lm.model.parameters()} | set(map(str, away))
        found["placed"][title] = {
            "devices": sorted(devices - {"meta"}),
            "input": str(lm.device),
            "methods": {
                method: outcome(lm, method, folder / ("first" if number == 0 else "plain"))
                for place, method in pairs
                if place == title
            },
        }
    del library
    return found


if __name__ == "__main__":
    print(json.dumps(report(json.loads(sys.argv[2]), Path(sys.argv[1]))))
