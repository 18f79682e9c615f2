"""LoRA (Hu et al., 2022) on the new facts: an adapter of peft is trained and taken apart again; what is left is a
low-rank change of weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import Tensor

from edit_cli.config.schema import Count, Layers, Linked, Mark, NonNegative, Positive, Seed, Such
from edit_cli.editors.base import Context, Editor, EditorConfig
from edit_cli.editors.finetune.base import Batches
from edit_cli.editors.memory.base import module_of
from edit_cli.editors.passes import in_batches, row_losses, rows_right
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.errors import UsageError
from edit_cli.lm.hooks import unwrapped
from edit_cli.lm.layout import attention_out
from edit_cli.lm.model import LM
from edit_cli.lm.weights.offload import carrier_of
from edit_cli.requests import EditRequest


@dataclass(frozen=True, kw_only=True)
class LoraConfig(EditorConfig):
    """Settings of low-rank adaptation."""

    layers: Layers | None = None
    """Blocks that get adapters; null: all."""
    modules: Annotated[list[str], Mark.DISTINCT, Such(("mlp_in", "mlp_out", "attn_out"))]
    """What gets one in a block: mlp_in, mlp_out, attn_out, or names such as attn.c_attn."""
    rank: Count = 8
    """Rank r of an adapter B A."""
    alpha: float = 32.0
    """Scale: the product counts alpha / rank times."""
    dropout: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of an adapter's inputs that is dropped in training."""
    rank_stabilized: bool = False
    """Whether the product counts alpha / √rank times instead."""
    lr: Positive = 5e-3
    """Learning rate of Adam."""
    steps: Count = 70
    """Passes over the facts at most."""
    batch_size: Count = 64
    """Facts in a step."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay (AdamW)."""
    stop_when_right: bool = False
    """Whether training ends before a pass in which every target token is already the likeliest."""
    seed: Annotated[Seed, Linked("${seed}")] = 0
    """Of the adapters' first values and the dropout."""


class Lora(Editor[LoraConfig]):
    """A new adapter for every edit, on top of what is attached."""

    Config = LoraConfig
    mass_editor = True
    heads = ("causal", "seq2seq", "classifier")

    @classmethod
    def require(cls, config: LoraConfig, model: str, context: Context) -> None:
        _peft()

    def edit(self, requests: Sequence[EditRequest]) -> WeightDelta:
        """Factors of rank `rank`, one pair a module.

        Raises:
            UsageError: peft is not installed, a module is not there, or its weight is kept off the device.
        """
        lm, config, names = self.lm, self.config, self._names()
        _refuse_offloaded(lm, names)
        rows: list[Any] = lm.head.encode([(request.text, request.target_new) for request in requests])
        batches = [rows[part] for part in in_batches(rows, config.batch_size)]
        device = [lm.device] if lm.device.type == "cuda" else []
        with lm.monitor.phase("train"), torch.random.fork_rng(device), self._adapters(names) as adapters:
            parameters = [part for layer in adapters.values() for part in _matrices(layer)]
            optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
            losses: list[float] = []
            for _ in lm.monitor.counted("adapters", config.steps):
                if config.stop_when_right and self._all_right(batches, adapters):
                    break
                for batch in batches:
                    loss = row_losses(lm.head.answers(batch, end=True), len(batch)).mean()
                    for part, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                        part.grad = gradient
                    optimizer.step()
                    losses.append(loss.item())
            return WeightDelta(
                {f"{name}.weight": _factors(layer) for name, layer in adapters.items()}, {"losses": losses}
            )

    @torch.no_grad()
    def _all_right(self, batches: Batches, adapters: dict[str, Any]) -> bool:
        for layer in adapters.values():
            layer.eval()
        right = all(bool(rows_right(self.lm.head.answers(batch, end=True), len(batch)).all()) for batch in batches)
        for layer in adapters.values():
            layer.train()
        return right

    @contextmanager
    def _adapters(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """peft's layers in place of the modules; on leaving, the modules themselves are back."""
        lm, config, peft = self.lm, self.config, _peft()
        originals = {name: unwrapped(lm.module(name)) for name in names}
        places = {name: own for own, module in lm.model.named_modules() for name in names if module is originals[name]}
        options = peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, use_rslora=config.rank_stabilized,
            target_modules=list(places.values()), fan_in_fan_out=False,
        )  # fmt: skip
        torch.manual_seed(config.seed)
        had = getattr(lm.model, "peft_config", None)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it sets by itself what it warns about: the orientation of Conv1D
                peft.inject_adapter_in_model(options, lm.model)
            adapters = {name: lm.model.get_submodule(own) for name, own in places.items()}
            for layer in adapters.values():
                # whatever the model's digits: in 16 bits Adam loses small steps, and in float16 the squares of small
                # gradients are zero, by which it then divides
                layer.lora_A.float()
                layer.lora_B.float()
                layer.train()
            yield adapters
        finally:
            for name, own in places.items():
                parent, _, child = own.rpartition(".")
                setattr(lm.model.get_submodule(parent), child, originals[name])
            if had is None and hasattr(lm.model, "peft_config"):
                del lm.model.peft_config
            lm.model.requires_grad_(False)

    def _names(self) -> list[str]:
        layers = range(self.lm.layout.depth) if self.config.layers is None else self.config.layers
        if not self.config.modules:
            raise UsageError(
                "method.modules is empty: give mlp_in, mlp_out, attn_out or names in a block, such as"
                " method.modules=[attn.c_attn]"
            )
        return [_name(self.lm, layer, part) for layer in layers for part in self.config.modules]


def _matrices(layer: Any) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r) of an adapter."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _factors(layer: Any) -> Factors:
    right, left = (matrix.detach() for matrix in _matrices(layer))
    return Factors(layer.scaling["default"] * left.float(), right.float().clone())


def _refuse_offloaded(lm: LM, names: Sequence[str]) -> None:
    """peft makes adapters where it finds the weight, and that of an offloaded module is nowhere between two passes."""
    away = next((name for name in names if carrier_of(lm.model, f"{name}.weight") is not None), None)
    if away is not None:
        raise UsageError(
            f"method=lora cannot train beside {away}, which model.device_map keeps off the device: give method.layers"
            " that are on it, load the model without model.device_map (in fewer bits, if it is too large), or use"
            " method=ft"
        )


def _name(lm: LM, layer: int, part: str) -> str:
    if part == "attn_out":
        return attention_out(lm.model, lm.layout, layer)
    return module_of(lm, layer, part, "method.modules")


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UsageError("method=lora needs the package peft: pip install 'edit-cli[lora]'") from None
    return peft
