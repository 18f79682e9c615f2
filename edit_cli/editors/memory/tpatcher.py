"""T-Patcher (Huang et al., 2023): a few new neurons in the last feed-forward layer for every mistake; all else is
frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy

from edit_cli.editors.memory.activations import inputs_on_examples, inputs_on_text
from edit_cli.editors.memory.base import Entries, MemoryLayer, MemoryPatch, in_turn, mlp_in
from edit_cli.editors.memory.patch_training import Neurons, PatchTraining, begun
from edit_cli.editors.old import AUTO, CORPUS, EXAMPLES, Editor
from edit_cli.editors.passes import Passes, passes
from edit_cli.errors import UsageError
from edit_cli.files.shapes import Count
from edit_cli.files.tensors import Size, size
from edit_cli.lm.hooks import exact, on_input
from edit_cli.lm.layout import activation, widths
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import Row
from edit_cli.lm.weights.access import Undo
from edit_cli.requests import EditRequest
from edit_cli.statistics.corpora import Corpus

SHOWN = 200  # facts in the heat-map


class PatchedLayer(MemoryLayer):
    """The feed-forward layer's output projection with added neurons: out + Σ_p act(q·k_p + b_p) v_p, q being what
    enters the layer.

    keys (n, d), biases (n, 1), values (n, d): in the order of their making. made_for: of each neuron the number of its
    edit and the place in the target where it mends it. seen: inputs (·, d) at the tokens of edited facts, which later
    patches must leave alone.
    """

    def __init__(self, original: nn.Module, lm: LM, module: str, entrance: str) -> None:
        super().__init__(original, lm, module)
        width = widths(lm.module(entrance))[1]
        self.keys, self.biases, self.values, self.seen = (
            Entries(w, lm.device) for w in (width, 1, widths(original)[0], width)
        )
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


class NeuronContent(TypedDict):
    """What an edit says beside its tensors. entrance: the module whose input the neurons read."""

    entrance: str
    edits: Count
    made_for: list[tuple[Count, Count]]


class NeuronPatch(MemoryPatch):
    """Neurons for the mistakes of one edit or several."""

    layer: ClassVar[type[MemoryLayer]] = PatchedLayer
    holds = NeuronContent

    @classmethod
    def brings(cls, lm: LM, d_out: int, d_in: int, content: dict[str, Any]) -> dict[str, Size]:
        new, width = len(content["made_for"]), widths(lm.module(content["entrance"]))[1]
        return {
            "keys": size(new, width), "biases": size(new, 1), "values": size(new, d_out), "seen": size("seen", width),
        }  # fmt: skip

    def begin(self, original: nn.Module, lm: LM) -> PatchedLayer:
        return PatchedLayer(original, lm, self.module, self.content["entrance"])


@dataclass(kw_only=True)
class TPatcher(PatchTraining, Editor):
    """Transformer-Patcher, L = l_e + a · l_a + m (l_m1 + l_m2).

    layer: the patched feed-forward layer; null: the last one. patches: at most so many neurons a fact, one for each
    wrong token.
    activation_weight: a. memory_weight: m. beta, gamma: margins of the memory losses. top_activation, top_memory: how
    many of the largest terms a loss averages: of each neuron, or of all neurons of a fact together (`pooled`).
    smoothing: ε of l_e: of the labels of texts; of a classifier's it is the share of its entropy that is taken off.
    value_scale: a of v = w ⊙ a at the start.
    memory: whose feed-forward inputs a patch must not answer to: "examples" of the training split, "corpus", or "auto":
    examples where the data have such a split. `memory_size` tokens while training, and `validation_size` others
    (examples: of the validation split) by which it is told when to stop.
    """

    heads = ("causal", "seq2seq", "classifier")

    layer: int | None = None
    patches: int = 5
    smoothing: float = 0.0
    value_scale: float = 10.0
    memory: str = AUTO
    corpus: Corpus | None = None
    memory_size: int = 40_000
    validation_size: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.memory not in (AUTO, EXAMPLES, CORPUS):
            raise UsageError(f"method.memory={self.memory}: choose {AUTO}, {EXAMPLES} or {CORPUS}")
        if not 0 <= self.smoothing < 1:
            raise UsageError(f"method.smoothing={self.smoothing}: give a share from 0 up and below 1")

    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> NeuronPatch:
        """Neurons for the requests, one after another; a fact that the model gets right needs none."""
        name, entrance = self._names(lm)
        memories = self._memories(lm, entrance)
        rows = lm.head.encode([(request.text, request.target_new) for request in requests])
        with in_turn(lm, rows, lambda row: self._patch(lm, name, entrance, row, memories), "patches") as patches:
            return joined(patches)

    def _patch(self, lm: LM, name: str, entrance: str, row: Row, memories: tuple[Tensor, Tensor]) -> NeuronPatch:
        attached = NeuronPatch.present(lm, name)
        entering: list[Tensor] = []
        with ExitStack() as stack:
            with on_input(lm.module(entrance), lambda states: entering.append(exact(states.detach())), 1):
                run = stack.enter_context(passes(lm, [row], name, self._layer(lm), end=True))
            inputs, columns, base = entering[0][0], run.columns, run.base
            wrong = (base.logits.argmax(-1) != base.labels).nonzero()[: self.patches, 0]
            queries, first = inputs[columns], len(attached.keys) if attached else 0
            width = widths(lm.module(name))[0]
            neurons = begun(
                queries[wrong], width, self.value_scale, [self.seed * 1_000_003 + first + i for i in range(len(wrong))]
            )
            if len(wrong):
                seen = [attached.seen.all] if attached and len(attached.seen) else []
                stack.enter_context(run.replayed())
                self.train(
                    neurons,
                    queries[wrong],
                    *([memory, *seen] for memory in memories),
                    partial(edit_loss, run, inputs, self.smoothing),
                )
        tensors = {"keys": neurons.keys, "biases": neurons.biases, "values": neurons.values, "seen": queries}
        content = {"entrance": entrance, "edits": 1, "made_for": [[0, int(place)] for place in wrong]}
        own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return NeuronPatch(name, attached.digest if attached else "", own, content)

    def _memories(self, lm: LM, entrance: str) -> tuple[Tensor, Tensor]:
        """Of the unedited model, for training and for telling when to stop."""
        kept = self.scratch(lm)
        if entrance not in kept:
            with lm.monitor.phase("statistics"):
                kept[entrance] = self._of_examples(lm, entrance)
                if kept[entrance] is None:
                    kept[entrance] = self._of_corpus(lm, entrance)
        return kept[entrance]

    def require(self, model: str) -> None:
        if not self._examples("train"):
            self._text().require()

    def _examples(self, split: str) -> list[tuple[str, str]]:
        told = list(self.examples(split)) if self.examples and self.memory != CORPUS else []
        if split == "train" and not told and self.memory == EXAMPLES:
            raise UsageError(
                "method.memory=examples: the data have no training records beside those of this run"
                " (method.memory=corpus)"
            )
        return told

    def _text(self) -> Corpus:
        if self.corpus is None:
            raise UsageError(
                "method.corpus has no value: T-Patcher needs text that its patches must not answer to (corpus=NAME)"
            )
        return self.corpus

    def _of_examples(self, lm: LM, entrance: str) -> tuple[Tensor, Tensor] | None:
        train, validation = self._examples("train"), self._examples("validation")
        if not train:
            return None
        memory = inputs_on_examples(lm, entrance, train, self.memory_size)
        if not validation:
            return self._parted(memory)
        return memory, inputs_on_examples(lm, entrance, validation, self.validation_size)

    def _of_corpus(self, lm: LM, entrance: str) -> tuple[Tensor, Tensor]:
        return self._parted(
            inputs_on_text(lm, entrance, self._text(), self.memory_size + self.validation_size, self.seed)
        )

    def _parted(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        share = self.memory_size / (self.memory_size + self.validation_size)
        first = min(max(round(share * len(inputs)), 1), len(inputs) - 1)
        return inputs[:first], inputs[first:]

    def warm_up(self, lm: LM) -> None:
        self._memories(lm, self._names(lm)[1])

    def figures(self, lm: LM, requests: Sequence[EditRequest]) -> dict[str, dict[str, Any]]:
        """The activation heat-map (`patches`) of the first `SHOWN` facts: their neurons against the answers that they
        mend, and against
        inputs of the validation memory, which no neuron was trained on.
        """
        shown, (name, entrance) = requests[:SHOWN], self._names(lm)
        layer = NeuronPatch.present(lm, name)
        if layer is None or not shown:
            return {}
        found = patch_activations(lm, [(request.text, request.target_new) for request in shown])
        own = [index for index, (number, _) in enumerate(found.neurons) if number < len(shown)]
        mended = [index for index, row in enumerate(found.rows) if row in set(found.neurons)]
        if not own or not mended:
            return {}
        others = layer.activations(self._memories(lm, entrance)[1][:SHOWN]).T[own].cpu()
        matrix = found.matrix[own][:, mended].cpu()
        about = {"neurons": [found.neurons[n] for n in own], "rows": [found.rows[r] for r in mended]}
        return {"patches": {"matrix": matrix, "others": others, **about}}

    def _layer(self, lm: LM) -> int:
        return lm.layout.depth - 1 if self.layer is None else self.layer

    def _names(self, lm: LM) -> tuple[str, str]:
        return lm.layout.mlp_out(self._layer(lm)), mlp_in(lm, self._layer(lm))


def edit_loss(run: Passes, inputs: Tensor, smoothing: float, neurons: Neurons) -> tuple[Tensor, Callable[[], bool]]:
    """Mean negative log-likelihood of the target's tokens, smoothed, and a question whether all are the likeliest."""
    added = activation(run.lm.model)(neurons.activations(inputs)) @ neurons.values
    found = run.answers(lambda output: output + added.to(output))
    if run.lm.head.kind == "classifier":
        entropy = Categorical(logits=found.logits).entropy().mean() if smoothing else 0.0
        loss = cross_entropy(found.logits, found.labels) - smoothing * entropy
    else:
        classes = found.logits.shape[-1]  # the label keeps 1 − ε, the others share ε
        loss = cross_entropy(found.logits, found.labels, label_smoothing=smoothing * classes / (classes - 1))
    return loss, lambda: bool((found.logits.argmax(-1) == found.labels).all())


def joined(patches: Sequence[NeuronPatch]) -> NeuronPatch:
    """One patch for edits that were made on top of each other."""
    tensors = {name: torch.cat([patch.tensors[name] for patch in patches]) for name in patches[0].tensors}
    made_for = [[number, place] for number, patch in enumerate(patches) for _, place in patch.content["made_for"]]
    return NeuronPatch(
        patches[0].module,
        patches[0].before,
        tensors,
        {**patches[0].content, "edits": len(patches), "made_for": made_for},
    )


@dataclass(frozen=True)
class PatchActivations:
    """What patches say of some facts.

    matrix: (neurons, rows), neurons in the order of their making, rows the target tokens of the facts.

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
