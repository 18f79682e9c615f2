"""LoRA (Hu et al., 2022) on the new facts: an adapter of peft is trained and taken apart again; what is left is a
low-rank change of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from edit_cli.editors.memory.base import module_of
from edit_cli.editors.old import Editor
from edit_cli.editors.passes import row_losses, rows_right
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.errors import UsageError
from edit_cli.lm.hooks import unwrapped
from edit_cli.lm.layout import attention_out
from edit_cli.lm.model import LM
from edit_cli.lm.weights.offload import carrier_of
from edit_cli.requests import EditRequest


@dataclass(kw_only=True)
class Lora(Editor):
    """Low-rank adaptation; a new adapter for every edit, on top of what is attached.

    layers: blocks that get adapters; null: all. modules: "mlp_in", "mlp_out", "attn_out", or names in the block such as
    "attn.c_attn". rank, alpha, dropout: of the adapters, whose product counts alpha / rank times (alpha / √rank with
    `rank_stabilised`). lr, steps: Adam over batches of `batch_size` facts. It stops before a pass in which every target
    token is already the likeliest, if `stop_when_right`.
    """

    mass_editor = True
    heads = ("causal", "seq2seq", "classifier")

    layers: list[int] | None = None
    modules: list[str]
    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    rank_stabilised: bool = False
    lr: float = 5.0e-3
    steps: int = 70
    batch_size: int = 64
    weight_decay: float = 0.0
    stop_when_right: bool = False
    seed: int = 0

    def require(self, model: str) -> None:
        _peft()

    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> WeightDelta:
        """Factors of rank `rank`, one pair a module.

        Raises:
            UsageError: peft is not installed, a module is not there, or its weight is kept off the device.
        """
        names = self._names(lm)
        _refuse_offloaded(lm, names)
        rows = lm.head.encode([(request.text, request.target_new) for request in requests])
        device = [lm.device] if lm.device.type == "cuda" else []
        with lm.monitor.phase("train"), torch.random.fork_rng(device), self._adapters(lm, names) as adapters:
            parameters = [
                part
                for layer in adapters.values()
                for part in (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            ]
            optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
            losses: list[float] = []
            with lm.monitor.task("adapters", self.steps) as advance:
                for _ in range(self.steps):
                    if self.stop_when_right and self._all_right(lm, rows, adapters):
                        break
                    for first in range(0, len(rows), self.batch_size):
                        batch = rows[first : first + self.batch_size]
                        loss = row_losses(lm.head.answers(batch, end=True), len(batch)).mean()
                        for part, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                            part.grad = gradient
                        optimizer.step()
                        losses.append(loss.item())
                    advance(1)
            return WeightDelta(
                {f"{name}.weight": self._factors(layer) for name, layer in adapters.items()}, {"losses": losses}
            )

    @torch.no_grad()
    def _all_right(self, lm: LM, rows: Sequence[Any], adapters: dict[str, Any]) -> bool:
        for layer in adapters.values():
            layer.eval()
        right = all(
            bool(
                rows_right(
                    lm.head.answers(rows[first : first + self.batch_size], end=True),
                    len(rows[first : first + self.batch_size]),
                ).all()
            )
            for first in range(0, len(rows), self.batch_size)
        )
        for layer in adapters.values():
            layer.train()
        return right

    @staticmethod
    def _factors(layer: Any) -> Factors:
        left, right = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()
        return Factors(layer.scaling["default"] * left.float(), right.float().clone())

    @contextmanager
    def _adapters(self, lm: LM, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """peft's layers in place of the modules; on leaving, the modules themselves are back."""
        peft = _peft()
        originals = {name: unwrapped(lm.module(name)) for name in names}
        places = {name: own for own, module in lm.model.named_modules() for name in names if module is originals[name]}
        options = peft.LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, use_rslora=self.rank_stabilised,
            target_modules=list(places.values()), fan_in_fan_out=False,
        )  # fmt: skip
        torch.manual_seed(self.seed)
        had = getattr(lm.model, "peft_config", None)
        try:
            import warnings

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

    def _names(self, lm: LM) -> list[str]:
        if not self.modules:
            raise UsageError(
                "method.modules is empty: give mlp_in, mlp_out, attn_out or names in a block, such as"
                " method.modules=[attn.c_attn]"
            )
        names = []
        for layer in range(lm.layout.depth) if self.layers is None else self.layers:
            for part in self.modules:
                names.append(_name(lm, layer, part))
        return names


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
