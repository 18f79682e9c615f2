"""T-Patcher (Huang et al., 2023): a few new neurons in the last feed-forward layer for every mistake; all else is
frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self, TypedDict

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy

from edit_cli.config.schema import Count, Limit, Linked, Natural, NonNegative, Positive, Seed
from edit_cli.editors.base import Context, EditorConfig
from edit_cli.editors.memory.activations import examples_of, inputs_on_examples, inputs_on_text, text_of
from edit_cli.editors.memory.base import Entries, MemoryEditor, MemoryLayer, MemoryPatch, mlp_in
from edit_cli.editors.passes import Passes, passes
from edit_cli.errors import UsageError
from edit_cli.files import shapes
from edit_cli.files.tensors import Size, size
from edit_cli.lm.hooks import exact, on_input
from edit_cli.lm.layout import activation, widths
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import Row
from edit_cli.lm.weights.access import Undo
from edit_cli.requests import EditRequest
from edit_cli.statistics.corpora import Corpus

HIGHEST = 30.0  # exponents are clamped here: a large learning rate would overflow them
FIRST_CHECK, CHECK = 100, 25  # steps
ENOUGH = 1.0e-3  # by so much the memory losses on validation text must fall from check to check
SHOWN = 200  # facts in the heat-map

Fit = Callable[["Neurons"], tuple[Tensor, Callable[[], bool]]]


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
        if not len(self.keys) or self.inputs is None:
            return output
        return output + self.act(self.activations(exact(self.inputs))).matmul(self.values.all).to(output)

    def activations(self, queries: Tensor) -> Tensor:
        """(…, n): q·k_p + b_p of what enters the layer, (…, d)."""
        return queries.to(self.keys.all) @ self.keys.all.T + self.biases.all[:, 0]


class NeuronContent(TypedDict):
    """What an edit says beside its tensors. entrance: the module whose input the neurons read."""

    entrance: str
    edits: shapes.Count
    made_for: list[tuple[shapes.Count, shapes.Count]]


class NeuronPatch(MemoryPatch):
    """Neurons for the mistakes of one edit or several."""

    layer: ClassVar[type[MemoryLayer]] = PatchedLayer
    settings = ("entrance",)
    holds = NeuronContent
    axes: ClassVar = {"keys": 0, "biases": 0, "values": 0, "seen": 0}
    counts = ("edits",)

    @classmethod
    def brings(cls, lm: LM, d_out: int, d_in: int, content: dict[str, Any]) -> dict[str, Size]:
        new, width = len(content["made_for"]), widths(lm.module(content["entrance"]))[1]
        return {
            "keys": size(new, width), "biases": size(new, 1), "values": size(new, d_out), "seen": size("seen", width),
        }  # fmt: skip

    @classmethod
    def concatenate(cls, patches: Sequence[Self], layer: PatchedLayer) -> Self:
        """As any edit's; neurons are made for the facts in their order."""
        joined = super().concatenate(patches, layer)
        made_for = [[number, place] for number, patch in enumerate(patches) for _, place in patch.content["made_for"]]
        joined.content["made_for"] = made_for
        return joined


@dataclass
class Neurons:
    """New neurons while they are trained: keys (n, d_in), biases (n, 1), and values w ⊙ a, (n, d_out) each."""

    keys: Tensor
    biases: Tensor
    weights: Tensor
    scales: Tensor

    def joined(self) -> Tensor:
        """(n, …) of all parameters."""
        return torch.cat([self.keys, self.biases, self.weights, self.scales], dim=1).detach()

    def take(self, flat: Tensor) -> list[Tensor]:
        """Be views of `flat`, which is `joined`, from now on; the parameters, for gradients."""
        shares = flat.detach().split(
            [part.shape[1] for part in (self.keys, self.biases, self.weights, self.scales)], dim=1
        )
        self.keys, self.biases, self.weights, self.scales = parts = [share.requires_grad_() for share in shares]
        return parts

    @property
    def values(self) -> Tensor:
        return self.weights * self.scales

    def activations(self, queries: Tensor) -> Tensor:
        """(…, n), before the activation function, of queries (…, d_in)."""
        return queries @ self.keys.T + self.biases[:, 0]

    def own(self, queries: Tensor) -> Tensor:
        """(n,): of each neuron on its own mistake, queries (n, d_in)."""
        return (queries * self.keys).sum(1) + self.biases[:, 0]


def begun(queries: Tensor, width: int, scale: float, seeds: list[int]) -> Neurons:
    """k = q / ‖q‖², so that the pre-activation is 1; v = w ⊙ a, w ~ N(0, 1) drawn from a seed a neuron, a = `scale`.

    queries (n, d_in).
    """
    draws = [torch.randn(width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    weights = torch.stack(draws).to(queries) if draws else queries.new_zeros(0, width)
    keys = queries / queries.square().sum(1, keepdim=True)
    return Neurons(keys, queries.new_zeros(len(queries), 1), weights, torch.full_like(weights, scale))


def top_exp(values: Tensor, count: int) -> Tensor:
    """(n,): S(v; κ), the mean of the κ largest of exp(v) in each row of `values` (n, m)."""
    return values.topk(min(count, values.shape[1]), dim=1, sorted=False).values.clamp(max=HIGHEST).exp().mean(1)


@dataclass(frozen=True, kw_only=True)
class TPatcherConfig(EditorConfig):
    """Of L = l_e + a · l_a + m (l_m1 + l_m2), and of how it is minimized."""

    layer: Natural | None = None
    """The patched feed-forward layer; null for the last one."""
    patches: Count = 5
    """Neurons a fact at most, one for each wrong token."""
    activation_weight: NonNegative = 1.0
    """a: weight of the activation loss."""
    memory_weight: NonNegative = 10.0
    """m: weight of the memory losses."""
    beta: float = -3.0
    """β: margin below which a neuron's pre-activation stays on negatives."""
    gamma: float = 3.0
    """γ: by how much it stays below the pre-activation on its own mistake."""
    top_activation: Count = 5
    """How many of its largest terms l_a averages."""
    top_memory: Count = 1000
    """How many of their largest terms l_m1 and l_m2 average."""
    pooled: bool = False
    """Whether the largest terms are those of all neurons of a fact together, as released, or of each neuron."""
    smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    """ε by which the labels of l_e are smoothed; a classifier's is the share of its entropy that is taken off
    (released: 0.1)."""
    value_scale: Positive = 10.0
    """a of v = w ⊙ a before training."""
    lr: Positive = 1.0e-2
    """Learning rate of Adam."""
    weight_decay: NonNegative = 1.0e-2
    """Weight decay of Adam."""
    clip: Limit = 5.0
    """Largest norm of the gradient."""
    steps: Count = 2000
    """Most training steps; it stops once the fact is right and the memory losses on validation text no longer fall."""
    negatives: Literal["auto", "examples", "corpus"] = "auto"
    """What patches must not answer to: examples of the training split, a corpus, or examples where the data have such a
    split (auto)."""
    corpus: Annotated[Corpus | None, Linked("${stats.corpus}")] = None
    """Text that negatives=corpus takes."""
    memory_size: Count = 40_000
    """Negatives while training: so many tokens, or examples of a classifier."""
    validation_size: Count = 10_000
    """Further negatives that tell when to stop, from the validation split where there is one."""
    seed: Annotated[Seed, Linked("${seed}")] = 0
    """Seed of everything that is drawn."""

    @property
    def layers(self) -> list[int]:
        """The layer, where one is named."""
        return [] if self.layer is None else [self.layer]


class TPatcher(MemoryEditor[TPatcherConfig]):
    """Transformer-Patcher."""

    Config = TPatcherConfig
    Patch = NeuronPatch

    def location(self) -> tuple[int, str]:
        layer = self.lm.layout.depth - 1 if self.config.layer is None else self.config.layer
        return layer, self.lm.layout.mlp_out(layer)

    @property
    def entrance(self) -> str:
        """The module whose input the neurons read."""
        return mlp_in(self.lm, self.layer)

    def edit(self, requests: Sequence[EditRequest]) -> NeuronPatch:
        """Neurons for the requests, one after another; a fact that the model gets right needs none."""
        _ = self.negatives  # read on the unedited model
        rows = self.lm.head.encode([(request.text, request.target_new) for request in requests])
        return self.in_turn(rows, self._patch, "patches")

    def _patch(self, row: Row) -> NeuronPatch:
        """Neurons for the tokens of one fact that are wrong."""
        lm, config, layer = self.lm, self.config, self.memory(entrance=self.entrance)
        entering: list[Tensor] = []
        with ExitStack() as stack:
            with on_input(lm.module(self.entrance), lambda states: entering.append(exact(states.detach())), 1):
                run = stack.enter_context(passes(lm, [row], self.module, self.layer, end=True))
            inputs, columns, base = entering[0][0], run.columns, run.base
            wrong = (base.logits.argmax(-1) != base.labels).nonzero()[: config.patches, 0]
            queries, first = inputs[columns], config.seed * 1_000_003 + len(layer.keys)
            seeds = [first + number for number in range(len(wrong))]
            neurons = begun(queries[wrong], widths(lm.module(self.module))[0], config.value_scale, seeds)
            if len(wrong):
                seen = [layer.seen.all] if len(layer.seen) else []
                negatives, validation = ([part, *seen] for part in self.negatives)
                stack.enter_context(run.from_cache())
                fit = partial(edit_loss, run, inputs, config.smoothing)
                self._train(neurons, queries[wrong], negatives, validation, fit)
        tensors = {"keys": neurons.keys, "biases": neurons.biases, "values": neurons.values, "seen": queries}
        content = {"entrance": self.entrance, "edits": 1, "made_for": [[0, int(place)] for place in wrong]}
        own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return NeuronPatch(self.module, layer.digest, own, content)

    def _train(
        self, neurons: Neurons, queries: Tensor, negatives: list[Tensor], validation: list[Tensor], fit: Fit
    ) -> None:
        """Minimize L. Stops once the fact is right and the losses on validation text have stopped falling.

        fit: l_e of the neurons, and a question whether the fact is right with them.
        """
        config = self.config
        flat = torch.nn.Parameter(neurons.joined())
        optimizer = torch.optim.Adam([flat], lr=config.lr, weight_decay=config.weight_decay, fused=True)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, threshold=0.05)
        best: float | None = None
        parts = neurons.take(flat)
        for step in range(config.steps):
            loss, right = fit(neurons)
            if step >= FIRST_CHECK and step % CHECK == 0 and right():
                with torch.no_grad():
                    present = float(memory_losses(neurons, queries, validation, config))
                if best is not None and present > best - ENOUGH:
                    break
                best = present if best is None else min(best, present)
            if step and step % CHECK == 0:
                schedule.step(loss.detach())
            loss = loss + config.activation_weight * activation_loss(neurons, queries, config)
            loss = loss + config.memory_weight * memory_losses(neurons, queries, negatives, config)
            flat.grad = torch.cat(torch.autograd.grad(loss, parts), dim=1)
            flat.grad.mul_((config.clip / (flat.grad.norm() + 1e-6)).clamp(max=1.0))
            optimizer.step()

    # --- negatives --------------------------------------------------------------------------------------------------

    @classmethod
    def require(cls, config: TPatcherConfig, model: str, context: Context) -> None:
        if not examples_of(context, config.negatives, "method.negatives"):
            text_of(config.corpus, "T-Patcher").require()

    @classmethod
    def beforehand(cls, config: TPatcherConfig) -> str:
        return (
            f"first fills a memory of up to {config.memory_size:,} states, and one of {config.validation_size:,} that"
            " tells when to stop (method.memory_size, method.validation_size)"
        )

    def warm_up(self) -> None:
        _ = self.negatives

    @property
    def negatives(self) -> tuple[Tensor, Tensor]:
        """(·, d_in) each, of the unedited model: for training, and for telling when to stop."""
        return self.context.once(("negatives", self.entrance), self._negatives)

    def _negatives(self) -> tuple[Tensor, Tensor]:
        config = self.config
        self.lm.monitor.note(f"T-Patcher {self.beforehand(config)}")
        train, validation = (
            examples_of(self.context, config.negatives, "method.negatives", split) for split in ("train", "validation")
        )
        with self.lm.monitor.phase("statistics"):
            if not train:
                count = config.memory_size + config.validation_size
                text = text_of(config.corpus, "T-Patcher")
                return self._parted(inputs_on_text(self.lm, self.entrance, text, count, config.seed))
            inputs = inputs_on_examples(self.lm, self.entrance, train, config.memory_size)
            if not validation:
                return self._parted(inputs)
            return inputs, inputs_on_examples(self.lm, self.entrance, validation, config.validation_size)

    def _parted(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        share = self.config.memory_size / (self.config.memory_size + self.config.validation_size)
        first = min(max(round(share * len(inputs)), 1), len(inputs) - 1)
        return inputs[:first], inputs[first:]

    # --- the heat-map -----------------------------------------------------------------------------------------------

    def figures(self, requests: Sequence[EditRequest]) -> dict[str, dict[str, Any]]:
        """The activation heat-map (`patches`) of the first `SHOWN` facts: their neurons against the answers that they
        mend, and against negatives for validation, which no neuron was trained on.
        """
        shown, layer = requests[:SHOWN], NeuronPatch.present(self.lm, self.module)
        if layer is None or not shown:
            return {}
        found = patch_activations(self.lm, [(request.text, request.target_new) for request in shown])
        own = [index for index, (number, _) in enumerate(found.neurons) if number < len(shown)]
        mended = [index for index, row in enumerate(found.rows) if row in set(found.neurons)]
        if not own or not mended:
            return {}
        others = layer.activations(self.negatives[1][:SHOWN]).T[own].cpu()
        matrix = found.matrix[own][:, mended].cpu()
        about = {"neurons": [found.neurons[n] for n in own], "rows": [found.rows[r] for r in mended]}
        return {"patches": {"matrix": matrix, "others": others, **about}}


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


def activation_loss(neurons: Neurons, queries: Tensor, config: TPatcherConfig) -> Tensor:
    """l_a: each neuron answers to its own mistake."""
    return top_exp(-neurons.own(queries)[None], config.top_activation).mean()


def memory_losses(neurons: Neurons, queries: Tensor, negatives: Sequence[Tensor], config: TPatcherConfig) -> Tensor:
    """l_m1 + l_m2: on all else a neuron stays below β, and by γ below what it says of its mistake.

    Of one neuron both average the same terms, the largest exp(M k + b), but for a factor: exp(−β), and exp(γ − own).

    negatives: parts (·, d_in).
    """
    said = torch.cat([neurons.keys @ part.T for part in negatives], dim=1)
    if config.pooled:
        said = said + neurons.biases
        margins = said - config.beta, said - neurons.own(queries)[:, None] + config.gamma
        return torch.cat([top_exp(terms.reshape(1, -1), config.top_memory) for terms in margins]).sum()
    loudest = top_exp(said + neurons.biases, config.top_memory)
    below = torch.exp(loudest.new_tensor(-config.beta))
    return (loudest * (below + (config.gamma - neurons.own(queries)).clamp(max=HIGHEST).exp())).mean()


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
