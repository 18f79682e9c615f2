"""How a layer's output is composed of its memories, and how residuals refine what the model says, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edit_cli.inspection.prefixes import Prefix
from edit_cli.inspection.vocabulary import Tops, Vocabulary
from edit_cli.lm.hooks import on_output
from edit_cli.lm.reading import HookPoint, LayerwiseReader
from edit_cli.lm.tokenization import Row

if TYPE_CHECKING:
    from edit_cli.lm.model import LM

CARRIED = 0.9  # of Σ |m_i| ‖v_i‖, by the active memories of activations without zeros


@dataclass(frozen=True)
class Measured:
    """Of one layer, over the prefixes. composition, refinement: shares. residual: (n,) the residual's top token before
    the layer.
    """

    composition: dict[str, float]
    refinement: dict[str, float]
    residual: Tensor


def values_of(lm: LM, layer: int) -> Tensor:
    """(d_m, d): the values of a layer's memories, float32."""
    return lm.weight(lm.layout.mlp_out(layer)).T.float().to(lm.device)


def active(coefficients: Tensor, norms: Tensor) -> Tensor:
    """(n, d_m) which memories count: those with m > 0 where activations are zero or above, else the fewest that carry
    90 % of Σ |m_i| ‖v_i‖.
    """
    if not (coefficients < 0).any():
        return coefficients > 0
    strength = coefficients.abs() * norms
    ordered, order = strength.sort(dim=1, descending=True)
    before = ordered.cumsum(1) - ordered
    return torch.zeros_like(strength, dtype=torch.bool).scatter(1, order, before < CARRIED * strength.sum(1, True))


def composition(coefficients: Tensor, norms: Tensor, tops: Tops, layer_top: Tensor) -> dict[str, float]:
    """active: mean share of the memories that count. alone: how often the layer's top token is also that of one of
    them; of a memory with a negative coefficient, what its negative promotes counts.
    """
    counts = active(coefficients, norms)
    promoted = torch.where(coefficients > 0, tops.up, tops.down)
    alone = ((promoted == layer_top[:, None]) & counts).any(1)
    return {"active": counts.float().mean().item(), "alone": alone.float().mean().item()}


def refinement(residual: Tensor, layer: Tensor, output: Tensor) -> dict[str, float]:
    """Of top tokens (n,): whose the output's is."""
    by_residual, by_layer = output == residual, output == layer
    kinds = {
        "agreement": by_residual & by_layer,
        "residual": by_residual & ~by_layer,
        "layer": by_layer & ~by_residual,
        "composition": ~by_residual & ~by_layer,
    }
    return {name: which.float().mean().item() for name, which in kinds.items()}


@torch.no_grad()
def measured(
    lm: LM, layers: Sequence[int], prefixes: Sequence[Prefix], tops: Mapping[int, Tops], vocabulary: Vocabulary
) -> Iterator[Measured]:
    """Layer by layer, upwards. What a layer adds is measured as the difference that its MLP makes to what leaves the
    block, so norms behind the MLP and blocks whose parts run side by side need no case of their own.
    """
    reader = _reader(lm, prefixes)
    for layer in layers:
        block, projection = HookPoint(lm.layout.block(layer), "output"), lm.layout.mlp_out(layer)
        reader.start_at(layer)
        coefficients, output = reader.read([HookPoint(projection, "input"), block])
        with on_output(lm.module(projection), torch.zeros_like):
            (residual,) = reader.read([block])
        found = [vocabulary.best(states) for states in (residual, output - residual, output)]
        norms = values_of(lm, layer).norm(dim=1)
        yield Measured(composition(coefficients, norms, tops[layer], found[1]), refinement(*found), found[0])


@torch.no_grad()
def answers(lm: LM, prefixes: Sequence[Prefix]) -> Tensor:
    """(n,) the token that the model itself goes on with."""
    (states,) = _reader(lm, prefixes).read([HookPoint(lm.layout.final_norm, "output")])
    return Vocabulary(lm).best(states)


def settled(residuals: Sequence[Tensor], final: Tensor) -> list[dict[str, Any]]:
    """By layer: how often the residual's top token is the model's answer, and how often it is so from there on."""
    hits = torch.stack([residual == final for residual in residuals]).float()
    from_here = hits.flip(0).cumprod(0).flip(0)
    return [
        {"final": now.item(), "settled": later.item()}
        for now, later in zip(hits.mean(1), from_here.mean(1), strict=True)
    ]


def _reader(lm: LM, prefixes: Sequence[Prefix]) -> LayerwiseReader:
    rows = [Row(prefix.whole, len(prefix.whole), ()) for prefix in prefixes]
    return LayerwiseReader(lm, rows, [len(row.ids) - 1 for row in rows])
