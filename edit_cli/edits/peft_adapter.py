"""Adapter directories as PEFT, vLLM and others read them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edit_cli.edits.edit import Factors
from edit_cli.files.json_files import write_json
from edit_cli.files.tensors import write_tensors
from edit_cli.lm.layout import is_transposed
from edit_cli.lm.model import LM

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}  # of a classifier, peft would save and replace the head


def write(folder: Path, lm: LM, factors: Mapping[str, Factors], base: str, revision: str | None) -> None:
    """Write the adapter that adds `factors` to projections of the model.

    Args:
        folder: an empty directory.
        lm: the model, for the kind of its projections.
        factors: {projection: factors}; left is LoRA's B (d_out, r), right its A (r, d_in).
        base: the model, as `from_pretrained` takes it.
        revision: of its files.
    """
    ranks = {module: part.rank for module, part in factors.items()}
    largest = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != largest}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": TASKS.get(lm.head.kind),
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": largest,
        # α = r everywhere, so that factors are added as they are
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": any(is_transposed(lm.module(module)) for module in ranks),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    tensors = {}
    for module, part in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = part.right
        tensors[f"base_model.model.{module}.lora_B.weight"] = part.left
    write_json(folder / CONFIG, config)
    write_tensors(folder / TENSORS, tensors, {"format": "pt"})
