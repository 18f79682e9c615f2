"""Knowledge neurons (Dai et al., 2022): the memories that integrated gradients hold responsible for an answer; their
values are moved from the old answer's embedding to the new one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from annotated_types import Len
from torch import Tensor
from torch.nn.functional import linear

from edit_cli.config.schema import Count, Layers, NonNegative, Share
from edit_cli.editors.base import Editor, EditorConfig
from edit_cli.editors.locate.context_prefixes import ContextConfig, sample_contexts
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.lm.fast.suffix_pass import SuffixForward, SuffixRow
from edit_cli.lm.hooks import exact
from edit_cli.lm.model import LM
from edit_cli.lm.reading import HookPoint, read
from edit_cli.lm.tokenization import Row
from edit_cli.requests import EditRequest

ROUNDS, STEP = 6, 0.05  # how often, and by how much, the share of prompts is moved towards the wanted number


@dataclass(frozen=True, kw_only=True)
class KNConfig(EditorConfig):
    """Defaults are those of the paper and its released code."""

    layers: Annotated[Layers, Len(1)] | None = None
    """Layers in which neurons are looked for; null: all."""
    steps: Count = 20
    """Points on the way from no activation to the whole, at which gradients are taken."""
    threshold: Share = 0.2
    """Share of a prompt's largest attribution from which on a neuron counts."""
    agreement: Share = 0.7
    """Share of a fact's prompts in which a neuron has to count; moved by 0.05 until there are `fewest` to `most`."""
    fewest: Count = 2
    """Neurons of a fact that are wanted at least."""
    most: Count = 5
    """Neurons of a fact that are wanted at most."""
    subtract: NonNegative = 1.0
    """Times the old answer's embedding (λ1): what the model says at the prompt, before the edit."""
    add: NonNegative = 8.0
    """Times the new answer's embedding (λ2)."""
    scaled: bool = True
    """Bring embeddings to the norm of the value that they are added to, as the released code does."""
    context: ContextConfig = field(default_factory=lambda: ContextConfig(per_start=2))
    """Texts put before the prompt, which stand in for other wordings of the fact."""


class KN(Editor[KNConfig]):
    """Facts are written one after another; of an answer of several tokens the first is attributed and written."""

    Config = KNConfig

    def edit(self, requests: Sequence[EditRequest]) -> WeightDelta:
        """Values of a few neurons, as factors. `info` names the neurons of each fact as (layer, number)."""
        parts: dict[str, list[Factors]] = {}
        chosen: list[list[tuple[int, int]]] = []
        with ExitStack() as attached:
            for request in requests:
                neurons, step = self._one(request)
                chosen.append(neurons)
                attached.enter_context(self.lm.edited(step))
                for name, factors in step.updates.items():
                    assert isinstance(factors, Factors)
                    parts.setdefault(name, []).append(factors)
        updates: dict[str, Factors | Tensor] = {
            name: Factors(torch.cat([f.left for f in found], 1), torch.cat([f.right for f in found]))
            for name, found in parts.items()
        }
        return WeightDelta(updates, {"neurons": chosen})

    def _one(self, request: EditRequest) -> tuple[list[tuple[int, int]], WeightDelta]:
        lm, config = self.lm, self.config
        contexts = self.context.once("contexts", lambda: sample_contexts(lm, config.context)).texts
        wanted = lm.head.encode([(request.in_context(prefix), request.target_new) for prefix in contexts])
        rows = [row.until(row.start - 1) for row in wanted]
        with lm.monitor.phase("attribution"):
            says = _answers(lm, rows[0])
            true = request.target_true
            answer = says if true is None else lm.head.encode([(request.text, true)])[0].target[0]
            layers = list(range(lm.layout.depth)) if config.layers is None else sorted(config.layers)
            scores = torch.stack([attributions(lm, rows, answer, layer, config.steps) for layer in layers], dim=1)
        neurons = [(layers[i // scores.shape[2]], i % scores.shape[2]) for i in self._refined(scores.flatten(1))]
        model: Any = lm.model
        embeddings = model.get_output_embeddings().weight
        old, new = (exact(embeddings[token]) for token in (says, wanted[0].target[0]))
        updates: dict[str, Factors | Tensor] = {}
        for layer in sorted({layer for layer, _ in neurons}):
            name, own = lm.layout.mlp_out(layer), [number for one, number in neurons if one == layer]
            values = exact(lm.weight(name)[:, own]).to(new)  # (d, neurons)
            sizes = values.norm(dim=0) if config.scaled else torch.ones_like(values[0])
            units = (part / part.norm() if config.scaled else part for part in (old, new))
            before, after = (torch.outer(unit, sizes) for unit in units)
            (keys,) = read(lm, rows[:1], [len(rows[0].ids) - 1], [HookPoint(name, "input")])
            picked = torch.zeros(len(own), lm.key_width(layer)).to(new)
            # what a neuron writes that is negative at the prompt, as in gated MLPs, is turned over
            picked[range(len(own)), own] = torch.where(keys[0, own] < 0, -1.0, 1.0).to(new)
            updates[f"{name}.weight"] = Factors(config.add * after - config.subtract * before, picked)
        return neurons, WeightDelta(updates)

    def _refined(self, scores: Tensor) -> list[int]:
        """Of (prompts, neurons) the neurons that count in enough prompts; where there are none, those that count in
        most.
        """
        config, best = self.config, scores.amax(dim=1, keepdim=True)
        shares = ((scores > 0) & (scores >= config.threshold * best)).double().mean(0)
        needed = config.agreement
        for _ in range(ROUNDS):
            count = int((shares >= needed).sum())
            if config.fewest <= count <= config.most:
                break
            needed += STEP if count > config.most else -STEP
        kept = (shares >= max(needed, STEP)).nonzero()[:, 0]
        if not len(kept):
            strength = shares + scores.double().mean(0) / best.double().mean().clamp_min(
                1e-30
            )  # of equal shares the stronger
            kept = strength.topk(config.fewest).indices.sort().values
        return kept.tolist()


@torch.no_grad()
def _answers(lm: LM, row: Row) -> int:
    """The token that the model goes on with."""
    last = len(row.ids) - 1
    return int(SuffixForward(lm, [SuffixRow(row.ids, last, (last,))], -1, False).base[0].argmax())


def attributions(lm: LM, rows: Sequence[Row], answer: int, layer: int, steps: int) -> Tensor:
    """(rows, d_m): of each memory of a layer w̄_j/m Σ_k ∂P(answer)/∂w_j at k/m · w̄, k = 1 … m, where w̄ is what enters
    the MLP's output projection at the last token. Over a layer they add up to the probability that its activations
    there are responsible for, but for an error of 1/m.
    """
    name, last = lm.layout.mlp_out(layer), [len(row.ids) - 1 for row in rows]
    (whole,) = read(lm, rows, last, [HookPoint(name, "input")])
    suffixes = [SuffixRow(row.ids, end, (end,)) for row, end in zip(rows, last, strict=True)]
    passes = SuffixForward(lm, suffixes, layer - 1)
    if not passes.agrees(passes.logits(lambda states, rows, columns: states, name)):
        passes = SuffixForward(lm, suffixes, layer - 1, reuse_prefix=False)
    together = _repeated(passes, steps)  # the rows with 1/m of their activations, with 2/m, …
    shares = torch.arange(1, steps + 1, device=whole.device).repeat_interleave(len(rows)) / steps
    scaled = (shares[:, None] * whole.repeat(steps, 1)).requires_grad_()
    weight, bias = lm.weight(name).to(lm.device), getattr(lm.module(name), "bias", None)

    def change(states: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        states = states.clone()
        states[rows, columns] = linear(scaled.to(weight), weight, bias).to(states)
        return states

    with torch.enable_grad():
        probability = together.logits(change, name).softmax(-1)[:, answer]
        (gradient,) = torch.autograd.grad(probability.sum(), scaled)
    return whole * gradient.view(steps, len(rows), -1).mean(0)


def _repeated(passes: SuffixForward, times: int) -> SuffixForward:
    """The same rows so many times over."""
    if times == 1:
        return passes
    half = _repeated(passes, times // 2)
    whole = half.join(half)
    return whole.join(passes) if times % 2 else whole
