"""T-Patcher (Huang et al., 2023): a few new neurons in the last feed-forward layer for every mistake; all else is frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from edit_cli.corpora import Corpus
from edit_cli.editors.base import Editor
from edit_cli.editors.memory import Entries, MemoryLayer, MemoryPatch, mlp_in
from edit_cli.editors.passes import Passes, passes
from edit_cli.editors.queries import inputs_on_text
from edit_cli.errors import UsageError
from edit_cli.lm.hooks import exact
from edit_cli.lm.layout import activation, widths
from edit_cli.lm.model import LM
from edit_cli.lm.places import Undo
from edit_cli.lm.tokens import Row
from edit_cli.requests import EditRequest

HIGHEST = 30.0  # exponents are clamped here: a large learning rate would overflow them
FIRST_CHECK, CHECK = 100, 25  # steps
SHOWN = 200  # facts in the heat-map


class PatchedLayer(MemoryLayer):
    """The feed-forward layer's output projection with added neurons: out + Σ_p act(q·k_p + b_p) v_p, q being what enters the layer.

    keys (n, d), biases (n, 1), values (n, d): in the order of their making. made_for: of each neuron the number of its edit and the
    place in the target where it mends it. seen: inputs (·, d) at the tokens of edited facts, which later patches must leave alone.
    """

    def __init__(self, original: nn.Module, lm: LM, module: str, entrance: str) -> None:
        super().__init__(original, lm, module)
        width = widths(lm.module(entrance))[1]
        self.keys, self.biases, self.values, self.seen = (Entries(w, lm.device) for w in (width, 1, widths(original)[0], width))
        self.made_for: list[tuple[int, int]] = []
        self.edits, self.entrance = 0, entrance
        self.act = activation(lm.model)
        self.inputs: Tensor | None = None
        self._listening = lm.module(entrance).register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.inputs = args[0]

    def close(self) -> None:
        super().close()
        self._listening.remove()

    def add(self, edit: MemoryPatch) -> Undo:
        undo = [getattr(self, name).append(edit.tensors[name]) for name in ("keys", "biases", "values", "seen")]
        neurons, edits = len(self.made_for), self.edits
        self.made_for += [(edits + number, place) for number, place in edit.content["made_for"]]
        self.edits += edit.content["edits"]

        def take_back() -> None:
            for step in reversed(undo):
                step()
            del self.made_for[neurons:]
            self.edits = edits

        return take_back

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = self.original(states, *args, **kwargs)
        if not len(self.keys):
            return output
        return output + self.act(self.activations(exact(self.inputs))).matmul(self.values.all).to(output)

    def activations(self, queries: Tensor) -> Tensor:
        """(…, n): q·k_p + b_p of what enters the layer, (…, d)."""
        return queries.to(self.keys.all) @ self.keys.all.T + self.biases.all[:, 0]


class NeuronPatch(MemoryPatch):
    """Neurons for the mistakes of one edit or several."""

    layer: ClassVar[type[MemoryLayer]] = PatchedLayer

    def begin(self, original: nn.Module, lm: LM) -> PatchedLayer:
        return PatchedLayer(original, lm, self.module, self.content["entrance"])


@dataclass(kw_only=True)
class TPatcher(Editor):
    """Transformer-Patcher, L = l_e + a · l_a + m (l_m1 + l_m2).

    layer: the patched feed-forward layer; null: the last one. patches: at most so many neurons a fact, one for each wrong token.
    activation_weight: a. memory_weight: m. beta, gamma: margins of the memory losses. top_activation, top_memory: how many of the
    largest terms a loss averages. value_scale: a of v = w ⊙ a at the start.
    corpus: text whose feed-forward inputs a patch must not answer to: `memory_size` tokens while training, and `validation_size`
    others by which it is told when to stop.
    """

    heads = ("causal", "seq2seq", "classifier")

    layer: int | None = None
    patches: int = 5
    activation_weight: float = 1.0
    memory_weight: float = 10.0
    beta: float = -3.0
    gamma: float = 3.0
    top_activation: int = 5
    top_memory: int = 1000
    value_scale: float = 10.0
    lr: float = 1.0e-2
    weight_decay: float = 1.0e-2
    clip: float = 5.0
    steps: int = 2000
    corpus: Corpus | None = None
    memory_size: int = 40_000
    validation_size: int = 10_000
    seed: int = 0

    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> NeuronPatch:
        """Neurons for the requests, one after another; a fact that the model gets right needs none."""
        name, entrance = self._names(lm)
        memory, validation = self._memory(lm, entrance)
        patches: list[NeuronPatch] = []
        with ExitStack() as stack, lm.monitor.phase("train"), lm.monitor.task("patches", len(requests)) as advance:
            for row in lm.head.encode([(request.text, request.target_new) for request in requests]):
                patches.append(self._patch(lm, name, entrance, row, memory, validation))
                stack.enter_context(lm.edited(patches[-1]))
                advance(1)
        return joined(patches)

    def _patch(self, lm: LM, name: str, entrance: str, row: Row, memory: Tensor, validation: Tensor) -> NeuronPatch:
        attached = NeuronPatch.present(lm, name)
        if attached and len(attached.seen):
            memory, validation = torch.cat([memory, attached.seen.all]), torch.cat([validation, attached.seen.all])
        with ExitStack() as stack:
            at_entrance = stack.enter_context(passes(lm, [row], entrance, self._layer(lm), end=True))
            inputs, columns, base = at_entrance.inputs, at_entrance.columns, at_entrance.base
        wrong = (base.logits.argmax(-1) != base.labels).nonzero()[: self.patches, 0]
        queries = inputs[0, columns]
        neurons = self._start(queries[wrong], len(attached.keys) if attached else 0)
        if len(wrong):
            with passes(lm, [row], name, self._layer(lm), end=True) as run:
                self._train(neurons, queries[wrong], memory, validation, lambda: self._fit(run, inputs, neurons))
        tensors = {"keys": neurons.keys, "biases": neurons.biases[:, None], "values": neurons.values, "seen": queries}
        content = {"entrance": entrance, "edits": 1, "made_for": [[0, int(place)] for place in wrong]}
        return NeuronPatch(name, attached.digest if attached else "", {n: t.detach() for n, t in tensors.items()}, content)

    def _fit(self, run: Passes, inputs: Tensor, neurons: Neurons) -> tuple[Tensor, bool]:
        """Mean negative log-likelihood of the target's tokens, and whether all are the likeliest."""
        added = activation(run.lm.model)(neurons.activations(inputs)) @ neurons.values
        found = run.answers(lambda output: output + added.to(output))
        return cross_entropy(found.logits, found.labels), bool((found.logits.argmax(-1) == found.labels).all())

    def _start(self, queries: Tensor, first: int) -> Neurons:
        """k = q / ‖q‖², so that the pre-activation is 1."""
        draws = [torch.Generator().manual_seed(self.seed * 1_000_003 + first + number) for number in range(len(queries))]
        width = queries.shape[1]
        weights = torch.stack([torch.randn(width, generator=draw) for draw in draws]).to(queries) if draws else queries.new_zeros(0, width)
        keys = queries / queries.square().sum(1, keepdim=True)
        return Neurons(keys, queries.new_zeros(len(queries)), weights, torch.full_like(weights, self.value_scale))

    def _train(self, neurons: Neurons, queries: Tensor, memory: Tensor, validation: Tensor, fit: Callable[[], tuple[Tensor, bool]]) -> None:
        """Stops once the fact is right and the loss on the validation memory has stopped falling."""
        parameters = neurons.parameters()
        optimizer = torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, threshold=0.05)
        best: float | None = None
        for step in range(self.steps):
            edit_loss, right = fit()
            if step >= FIRST_CHECK and step % CHECK == 0 and right:
                with torch.no_grad():
                    present = float(self._memory_losses(neurons, queries, validation))
                if best is not None and present > best - 1e-3:
                    break
                best = present if best is None else min(best, present)
            if step and step % CHECK == 0:
                schedule.step(edit_loss.detach())
            loss = edit_loss + self.activation_weight * self._activation_loss(neurons, queries)
            loss = loss + self.memory_weight * self._memory_losses(neurons, queries, memory)
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(parameters, self.clip)
            optimizer.step()

    def _activation_loss(self, neurons: Neurons, queries: Tensor) -> Tensor:
        """l_a: each neuron answers to its own mistake."""
        return top_exp(-neurons.own(queries)[:, None], self.top_activation)

    def _memory_losses(self, neurons: Neurons, queries: Tensor, memory: Tensor) -> Tensor:
        """l_m1 + l_m2: on everything else it stays below β, and by γ below what it says of its mistake."""
        elsewhere = neurons.activations(memory)
        below = top_exp(elsewhere - self.beta, self.top_memory)
        return below + top_exp(elsewhere - neurons.own(queries) + self.gamma, self.top_memory)

    def _memory(self, lm: LM, entrance: str) -> tuple[Tensor, Tensor]:
        if self.corpus is None:
            raise UsageError("method.corpus has no value: T-Patcher needs text that its patches must not answer to (corpus=NAME)")
        kept = self.scratch(lm)
        if entrance not in kept:
            with lm.monitor.phase("statistics"):
                both = inputs_on_text(lm, entrance, self.corpus, self.memory_size + self.validation_size, self.seed)
            share = self.memory_size / (self.memory_size + self.validation_size)
            first = min(max(round(share * len(both)), 1), len(both) - 1)
            kept[entrance] = both[:first], both[first:]
        return kept[entrance]

    def warm_up(self, lm: LM) -> None:
        self._memory(lm, self._names(lm)[1])

    def figures(self, lm: LM, requests: Sequence[EditRequest]) -> dict[str, dict[str, Any]]:
        """The activation heat-map (`patches`) of the first `SHOWN` facts: their neurons against the answers that they mend."""
        shown = requests[:SHOWN]
        if NeuronPatch.present(lm, self._names(lm)[0]) is None or not shown:
            return {}
        found = patch_activations(lm, [(request.text, request.target_new) for request in shown])
        own = [index for index, (number, _) in enumerate(found.neurons) if number < len(shown)]
        mended = [index for index, row in enumerate(found.rows) if row in set(found.neurons)]
        if not own or not mended:
            return {}
        matrix = found.matrix[own][:, mended].cpu()
        return {"patches": {"matrix": matrix, "neurons": [found.neurons[n] for n in own], "rows": [found.rows[r] for r in mended]}}

    def _layer(self, lm: LM) -> int:
        return lm.layout.depth - 1 if self.layer is None else self.layer

    def _names(self, lm: LM) -> tuple[str, str]:
        return lm.layout.mlp_out(self._layer(lm)), mlp_in(lm, self._layer(lm))


@dataclass
class Neurons:
    """New neurons while they are trained: keys (n, d), biases (n,), and values w ⊙ a, (n, d) each."""

    keys: Tensor
    biases: Tensor
    weights: Tensor
    scales: Tensor

    def parameters(self) -> list[Tensor]:
        return [part.requires_grad_() for part in (self.keys, self.biases, self.weights, self.scales)]

    @property
    def values(self) -> Tensor:
        return self.weights * self.scales

    def activations(self, queries: Tensor) -> Tensor:
        """(r, n), before the activation function."""
        return queries @ self.keys.T + self.biases

    def own(self, queries: Tensor) -> Tensor:
        """(n,): of each neuron on its own mistake."""
        return (queries * self.keys).sum(1) + self.biases


def top_exp(values: Tensor, count: int) -> Tensor:
    """S(v; κ): mean of the κ largest of exp(v) in each column."""
    return values.clamp(max=HIGHEST).topk(min(count, len(values)), dim=0).values.exp().mean()


def joined(patches: Sequence[NeuronPatch]) -> NeuronPatch:
    """One patch for edits that were made on top of each other."""
    tensors = {name: torch.cat([patch.tensors[name] for patch in patches]) for name in patches[0].tensors}
    made_for = [[number, place] for number, patch in enumerate(patches) for _, place in patch.content["made_for"]]
    return NeuronPatch(patches[0].module, patches[0].before, tensors, {**patches[0].content, "edits": len(patches), "made_for": made_for})


@dataclass(frozen=True)
class PatchActivations:
    """What patches say of some facts. matrix: (neurons, rows), neurons in the order of their making, rows the target tokens of the facts.

    neurons, rows: (number of the fact, place in its target) that each was made for, or is.
    """

    matrix: Tensor
    neurons: list[tuple[int, int]]
    rows: list[tuple[int, int]]


@torch.no_grad()
def patch_activations(lm: LM, pairs: Sequence[tuple[str, str]], stage: str = "pre") -> PatchActivations:
    """Of all attached patches, on (prompt, target) pairs; stage: "pre" or "post" the activation function.

    Raises:
        UsageError: no patch is attached.
    """
    layer = next((module for module in lm.model.modules() if isinstance(module, PatchedLayer)), None)
    if layer is None or stage not in ("pre", "post"):
        raise UsageError("no patch neurons are attached" if layer is None else f"stage={stage}: choose pre or post")
    queries, where = [], []
    for number, row in enumerate(lm.head.encode(list(pairs))):
        with passes(lm, [row], layer.entrance, 0, end=True) as run:
            queries.append(run.inputs[0, run.columns])
        where += [(number, place) for place in range(len(queries[-1]))]
    found = layer.activations(torch.cat(queries)).T
    return PatchActivations(layer.act(found) if stage == "post" else found, list(layer.made_for), where)
