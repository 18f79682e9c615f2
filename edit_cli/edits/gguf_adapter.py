"""Adapters as llama.cpp reads them beside a model in GGUF: pairs of matrices under the names of its tensors there.

Names and metadata are those of the `gguf` package, an extra. What llama.cpp stores in another order than transformers
(queries and keys, whose rows it may permute) is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edit_cli.edits.edit import Factors
from edit_cli.errors import MissingError, UsageError
from edit_cli.files.disk import telling
from edit_cli.lm.model import LM

FILE = "adapter.gguf"
REMEDY = "pip install 'edit-cli[gguf]'"
KEPT = ("FFN_DOWN", "FFN_UP", "FFN_GATE", "ATTN_OUT")  # matrices that llama.cpp stores as they are


def library() -> Any:
    """The `gguf` package. Raises MissingError: it is not installed."""
    try:
        import gguf
    except ImportError:
        raise MissingError(f"--to gguf-lora needs the package gguf, which is not installed: {REMEDY}") from None
    return gguf


def write(folder: Path, lm: LM, factors: Mapping[str, Factors], architecture: str | None = None) -> None:
    """Write the adapter that adds `factors` to projections of the model.

    Args:
        folder: an empty directory.
        lm: the model, for its kind and size.
        factors: {projection: factors}; left is LoRA's B (d_out, r), right its A (r, d_in).
        architecture: what GGUF calls the kind of model, where that is not what transformers does.

    Raises:
        UsageError: there is no such architecture, or llama.cpp stores one of the matrices in another order.
        MissingError: the package is not installed, or the file cannot be written.
    """
    gguf = library()
    kind = _architecture(gguf, lm, architecture)
    names = gguf.get_tensor_name_map(kind, lm.layout.depth)
    tensors = {}
    for module, part in factors.items():
        name = _name(gguf, names, module)
        tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"] = part.right, part.left
    with telling(folder / FILE):
        writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[kind])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # no scaling by α / r: factors are added as they are
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.detach().float().cpu().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _architecture(gguf: Any, lm: LM, given: str | None) -> Any:
    """That of the name that is given, or that the library has for what transformers calls this kind of model."""
    config: Any = lm.model.config
    name = given or str(config.model_type).removesuffix("_text").replace("_", "")
    known = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    if name not in known:
        said = f"--arch {given}: there is" if given else f"{lm.name} is of the kind {config.model_type}; there is"
        raise UsageError(
            f"{said} no architecture {name} in GGUF: give the one that general.architecture of your file of the base"
            " model says (--arch NAME), or export it --to peft"
        )
    return known[name]


def _name(gguf: Any, names: Any, module: str) -> str:
    found = names.get_type_and_name(module)
    if found is None or found[0].name not in KEPT:
        raise UsageError(
            f"the edit changes {module}, which llama.cpp stores in another order or not at all: --to gguf-lora takes"
            " matrices of MLPs and the output of attention; export it --to peft"
        )
    return str(found[1])
