"""4- and 8-bit models, by bitsandbytes.

Their matrices cannot take in an edit: `places.Quantized` puts it beside them.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from logging import ERROR, getLogger
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edit_cli.errors import MissingError, UsageError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig

READABLE = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")


def how_to_load(model_id: str, quantize: str | None, dtype: torch.dtype, config: PretrainedConfig) -> dict[str, Any]:
    """What `from_pretrained` is told to get matrices of 4 bits (NF4) or 8 (LLM.int8()); nothing for a model that is not
    quantized.

    Raises:
        UsageError: files that another quantizer wrote. MissingError: bitsandbytes is not
            installed.
    """
    written = _quantizer(config)
    if written not in (None, *READABLE):
        remedy = "take its 16-bit original, and model.quantize=4bit"
        raise UsageError(
            f"model.id={model_id}: its weights are quantized by {written}, which cannot be edited: {remedy}"
        )
    if quantize is None and written is None:
        return {}
    if dtype == torch.float64:
        raise UsageError("model.dtype=float64 does not go with quantized weights: choose bfloat16, float16 or float32")
    if quantize is not None and written is not None:
        raise UsageError(f"model.quantize={quantize}: its weights are quantized already; leave it null")
    if find_spec("bitsandbytes") is None:
        wanted = (
            f"model.quantize={quantize}" if written is None else f"model.id={model_id}, whose weights are quantized,"
        )
        raise MissingError(f"{wanted} needs bitsandbytes: pip install 'edit-cli[quantized]'")
    getLogger("bitsandbytes").setLevel(ERROR)  # it tells at every pass how it computes
    return {"quantization_config": _settings(quantize, dtype)} if quantize else {}


def _quantizer(config: PretrainedConfig) -> str | None:
    """The quantizer that wrote the model's files."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method))


def written_in(config: PretrainedConfig) -> str | None:
    """`4bit` or `8bit` of files that bitsandbytes wrote, else None."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    told = settings.get if isinstance(settings, dict) else partial(getattr, settings)
    return "4bit" if told("load_in_4bit", False) else "8bit" if told("load_in_8bit", False) else None


def _settings(quantize: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    from transformers import BitsAndBytesConfig

    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def keep_as_loaded(model: nn.Module) -> None:
    """Keep quantized matrices as they were loaded.

    With some processors a 4-bit matrix is packed anew at its first forward pass, in a form that has no gradient and
    rounds its scales.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
