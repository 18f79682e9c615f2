"""MELO (Yu et al., 2024): clusters of remembered prompts, each prompt with its own block of LoRA factors in the
layers above.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypedDict

import torch
from annotated_types import Len
from torch import Tensor, nn

from edit_cli.config.schema import Count, Mark, Modules, Natural, NonNegative, Positive
from edit_cli.editors.base import Context
from edit_cli.editors.memory.base import (
    GAP,
    SLACK,
    MemoryConfig,
    MemoryEditor,
    MemoryLayer,
    MemoryPatch,
    module_of,
    nearest,
)
from edit_cli.editors.passes import at_prompt_end, passes, row_losses
from edit_cli.errors import UsageError
from edit_cli.files import shapes
from edit_cli.files.shapes import Rule
from edit_cli.files.tensors import Size, size
from edit_cli.lm.hooks import Wrapper, on_input, on_output
from edit_cli.lm.layout import widths
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import Row
from edit_cli.lm.weights.access import Undo
from edit_cli.requests import EditRequest


@dataclass
class Cluster:
    """Prompts of one answer that lie together. points: {number of the point: its key (d,)}."""

    answer: tuple[int, ...]
    center: Tensor
    radius: float
    points: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Database:
    """The vector database: clusters by number, and the LoRA block of each point.

    A later state shares what did not change.
    """

    clusters: dict[int, Cluster] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)
    forgotten: int = 0
    _stacked: tuple[dict[int, Cluster], Tensor, Tensor] | None = None

    def place(self, key: Tensor, answer: tuple[int, ...], block: int, initial: float) -> set[int]:
        """Take in a point; the numbers of the clusters that changed (MELO, 3.3)."""
        number = len(self.blocks)
        self.blocks.append(block)
        found = self.nearest(key[None])
        if found is not None:
            (distance,), (index,) = (part.tolist() for part in found)
            near = list(self.clusters)[index]
            cluster = self.clusters[near]
            if distance <= cluster.radius + initial and cluster.answer == answer:
                points = {**cluster.points, number: key}
                center = torch.stack(list(points.values())).mean(0)
                radius = max(max(float((point - center).norm()) for point in points.values()), initial)
                self.clusters = {**self.clusters, near: Cluster(answer, center, radius, points)}
                return {near}
            if distance <= cluster.radius + initial:
                held = min(distance / 2 - GAP, cluster.radius)
                points = {n: p for n, p in cluster.points.items() if float((p - cluster.center).norm()) <= held}
                self.forgotten += len(cluster.points) - len(points)
                changed = {near: Cluster(cluster.answer, cluster.center, held, points)}
                same = distance <= SLACK * float(key.norm())  # two answers to one prompt are a correction
                new = Cluster(answer, key, initial if same else distance / 2, {number: key})
                self.clusters = {**self.clusters, **changed, max(self.clusters) + 1: new}
                return {near, max(self.clusters)}
        own = max(self.clusters, default=-1) + 1
        self.clusters = {**self.clusters, own: Cluster(answer, key, initial, {number: key})}
        return {own}

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor] | None:
        """Distances and places of the nearest centers, among clusters that have not lost all their points."""
        if not self.clusters:
            return None
        if self._stacked is None or self._stacked[0] is not self.clusters:
            centers = torch.stack([cluster.center for cluster in self.clusters.values()])
            alive = torch.tensor([bool(cluster.points) for cluster in self.clusters.values()], device=centers.device)
            self._stacked = self.clusters, centers, alive
        return nearest(queries, *self._stacked[1:])


class MeloLayer(MemoryLayer):
    """The index: its output at the prompt's last token finds a cluster, and in it the nearest point's block.

    chosen: (rows,), −1 for none.
    """

    def __init__(self, original: nn.Module, lm: LM, module: str, rank: int) -> None:
        super().__init__(original, lm, module)
        self.data, self.device, self.rank = Database(), lm.device, rank
        self.factors: list[dict[str, tuple[Tensor, Tensor]]] = []
        self.chosen: Tensor | None = None
        self.silent = False

    def add(self, edit: MemoryPatch) -> Undo:
        before, blocks = self.data, len(self.factors)
        there = len(before.blocks) + len(edit.content["blocks"])
        named = [point for about in edit.content["clusters"].values() for point in about["points"]]
        if any(block != blocks for block in edit.content["blocks"]) or any(point >= there for point in named):
            raise UsageError("this edit speaks of blocks or points that are not there: make the edit again")
        clusters, owned = dict(before.clusters), edit.content["clusters"]
        for number, about in owned.items():
            points = dict(zip(about["points"], edit.tensors[f"points.{number}"].to(self.device), strict=True))
            clusters[int(number)] = Cluster(
                tuple(about["answer"]), edit.tensors[f"center.{number}"].to(self.device), about["radius"], points
            )
        self.data = Database(clusters, [*before.blocks, *edit.content["blocks"]], edit.content["forgotten"])
        names = edit.content["modules"]
        pairs = {
            name: (edit.tensors[f"right.{name}"].to(self.device), edit.tensors[f"left.{name}"].to(self.device))
            for name in names
        }
        self.factors.append(pairs)

        def undo() -> None:
            self.data = before
            del self.factors[blocks:]

        return undo

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = self.original(states, *args, **kwargs)
        outside = self.rows(output)
        self.chosen = (
            None
            if outside is None or self.silent
            else self.decided(self.position, lambda: self.lookup(at_prompt_end(outside, self.position)))
        )
        return output

    def lookup(self, queries: Tensor) -> Tensor:
        """(rows,): the block of the nearest point of the nearest cluster, where the query lies within its radius."""
        found = self.data.nearest(queries.to(self.device))
        if found is None:
            return torch.full((len(queries),), -1, device=self.device)
        clusters, blocks = list(self.data.clusters.values()), []
        for query, distance, index in zip(queries.to(self.device), *(part.tolist() for part in found), strict=True):
            cluster = clusters[index]
            if distance > cluster.radius * (1 + SLACK) or not cluster.points:
                blocks.append(-1)
                continue
            point = int((torch.stack(list(cluster.points.values())) - query).norm(dim=1).argmin())
            blocks.append(self.data.blocks[list(cluster.points)[point]])
        return torch.tensor(blocks, device=self.device)

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Inside the block no row has a block of factors."""
        self.silent = True
        try:
            yield
        finally:
            self.silent = False


class Beside(Wrapper):
    """A projection with the LoRA block that the index chose for each row: out + (x A_b) B_b."""

    def __init__(self, original: nn.Module, index: MeloLayer, name: str) -> None:
        super().__init__(original)
        object.__setattr__(self, "index", index)  # no part of this module
        self.name = name

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = self.original(states, *args, **kwargs)
        chosen = self.index.chosen
        if chosen is None or states.shape[:-1].numel() % len(chosen):
            return output
        # row by row, whatever their tokens: a decoder's are not those of the encoder in which they were looked up
        inside, changed = (part.reshape(len(chosen), -1, part.shape[-1]) for part in (states, output))
        for block in chosen[chosen >= 0].unique().tolist():
            right, left = self.index.factors[block][self.name]
            mine = (chosen == block).to(states.device)
            changed = changed.clone()
            changed[mine] += (inside[mine].to(right) @ right.T @ left.T).to(output)
        return changed.view_as(output)


class MeloCluster(TypedDict):
    answer: list[int]
    radius: float
    points: list[shapes.Count]


class MeloContent(TypedDict):
    """What an edit says beside its tensors. blocks: of each new point, the number of its LoRA block."""

    modules: list[str]
    rank: shapes.Count
    clusters: Annotated[
        dict[str, MeloCluster], Rule(lambda some: all(map(str.isdecimal, some)), "clusters by their numbers")
    ]
    blocks: list[shapes.Count]
    forgotten: shapes.Count


class MeloPatch(MemoryPatch):
    """One LoRA block, and the clusters that its prompts began or changed."""

    layer: ClassVar[type[MemoryLayer]] = MeloLayer
    settings = ("rank",)
    holds = MeloContent

    @classmethod
    def brings(cls, lm: LM, d_out: int, d_in: int, content: dict[str, Any]) -> dict[str, Size]:
        wanted: dict[str, Size] = {}
        for number, cluster in content["clusters"].items():
            wanted |= {f"center.{number}": size(d_out), f"points.{number}": size(len(cluster["points"]), d_out)}
        for name in content["modules"]:
            out, into = widths(lm.module(name))
            wanted |= {f"right.{name}": size(content["rank"], into), f"left.{name}": size(out, content["rank"])}
        return wanted

    def _install(self, lm: LM, undo: ExitStack) -> MemoryLayer:
        index = super()._install(lm, undo)
        assert isinstance(index, MeloLayer)  # `layer`
        for name in self.content["modules"]:
            parent, _, child = name.rpartition(".")
            original = lm.module(name)
            setattr(lm.module(parent), child, Beside(original, index, name))
            undo.callback(setattr, lm.module(parent), child, original)
        return index


@dataclass(frozen=True, kw_only=True)
class MELOConfig(MemoryConfig):
    """Layer and module are those of the index, whose output at the prompt's last token is the key."""

    module: str = "mlp_out"
    """Projection that is the index: mlp_in, mlp_out or its name in the block."""
    lora_layers: Annotated[list[Natural], Len(1), Mark.DISTINCT]
    """Layers in which LoRA blocks stand, above the index."""
    lora_modules: Annotated[Modules, Len(1)] = field(default_factory=lambda: ["mlp_in", "mlp_out"])
    """Projections that LoRA blocks stand beside, named as the index is."""
    rank: Count = 2
    """Rank of a block."""
    scale: Positive = 1.0
    """Factor of a block's product."""
    radius: Positive = 1.0
    """ε of a new cluster; it fits one layer of one model only (see `edit-cli calibrate`)."""
    lr: Positive = 1.0e-2
    """Learning rate of Adam."""
    steps: Count = 50
    """Most training steps."""
    decay_every: Count = 20
    """Steps after which the learning rate is halved, again and again."""
    stop_loss: NonNegative = 0.02
    """Loss below which training stops, once every fact's is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.lora_layers) <= self.layer:
            raise UsageError(
                f"method.lora_layers={self.lora_layers}: blocks stand above the index, which is in layer {self.layer}"
                " (method.layer)"
            )

    @property
    def layers(self) -> list[int]:
        return [self.layer, *self.lora_layers]


class MELO(MemoryEditor[MELOConfig]):
    """Neuron-indexed dynamic LoRA. The facts of one edit share a block."""

    Config = MELOConfig
    Patch = MeloPatch
    mass_editor = True

    def __init__(self, config: MELOConfig, lm: LM, context: Context | None = None) -> None:
        super().__init__(config, lm, context)
        found = [module_of(lm, layer, part) for layer in sorted(config.lora_layers) for part in config.lora_modules]
        self.lora = list(dict.fromkeys(found))  # of a mixture of experts, two names may mean one projection

    def edit(self, requests: Sequence[EditRequest]) -> MeloPatch:
        """A block for the requests, and their prompts in the database."""
        lm, index = self.lm, self.memory(rank=self.config.rank)
        if index.factors and list(index.factors[0]) != self.lora:
            raise UsageError(
                "method.lora_layers, method.lora_modules: the attached edits have their blocks in"
                f" {', '.join(index.factors[0])}"
            )
        block, earlier = len(index.factors), index.data
        data = Database(earlier.clusters, list(earlier.blocks), earlier.forgotten)
        rows = lm.head.encode([(request.text, request.target_new) for request in requests])
        changed: set[int] = set()
        for key, row in zip(self._keys(rows), rows, strict=True):
            changed |= data.place(key, row.target, block, self.config.radius)
        with lm.monitor.phase("train"):
            tensors = self._train(rows, block, index)
        clusters = {number: cluster for number, cluster in data.clusters.items() if number in changed}
        for number, cluster in clusters.items():
            points = [cluster.center.new_zeros(0, len(cluster.center)), *(key[None] for key in cluster.points.values())]
            tensors |= {f"center.{number}": cluster.center, f"points.{number}": torch.cat(points)}
        content = {
            "modules": self.lora,
            "rank": self.config.rank,
            "clusters": {
                str(number): {"answer": list(c.answer), "radius": c.radius, "points": list(c.points)}
                for number, c in clusters.items()
            },
            "blocks": data.blocks[len(earlier.blocks) :],
            "forgotten": data.forgotten,
        }
        return MeloPatch(self.module, index.digest, tensors, content)

    def _keys(self, rows: Sequence[Row]) -> Tensor:
        """(rows, d_out) float32: the index's outputs at the prompts' last tokens."""
        keys: list[Tensor] = []

        def keep(output: Tensor) -> None:
            keys.append(at_prompt_end(output, run.position))

        with passes(self.lm, rows, self.module, self.layer) as run, torch.no_grad():
            run.answers(keep)
        return keys[0].to(self.lm.device).float()

    def _train(self, rows: Sequence[Row], block: int, index: MeloLayer) -> dict[str, Tensor]:
        """The block's factors, {right.NAME: (r, d_in), left.NAME: (d_out, r)}; B starts at zero, so that nothing
        changes at first.
        """
        lm, config = self.lm, self.config
        draw = torch.Generator().manual_seed(config.seed * 1_000_003 + block)
        factors: dict[str, Tensor] = {}
        for name in self.lora:
            d_out, d_in = widths(lm.module(name))
            right = torch.randn(config.rank, d_in, generator=draw) * d_in**-0.5
            factors[f"right.{name}"] = right.to(lm.device).requires_grad_()
            factors[f"left.{name}"] = torch.zeros(d_out, config.rank, device=lm.device, requires_grad=True)
        parameters = list(factors.values())
        optimizer = torch.optim.Adam(parameters, lr=config.lr)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, config.decay_every, 0.5)
        with ExitStack() as stack:
            stack.enter_context(index.silenced())
            run = stack.enter_context(passes(lm, rows, self.lora[0], min(config.lora_layers), end=True))
            for name in self.lora:
                pair = factors[f"right.{name}"], factors[f"left.{name}"]
                stack.enter_context(beside(lm, name, *pair, config.scale, len(rows)))
            for _ in lm.monitor.counted("blocks", config.steps):
                losses = row_losses(run.answers(lambda output: None), len(rows))
                if losses.max().item() < config.stop_loss:
                    break
                for part, gradient in zip(parameters, torch.autograd.grad(losses.mean(), parameters), strict=True):
                    part.grad = gradient
                optimizer.step()
                schedule.step()
        scales = {"right": 1.0, "left": config.scale}
        return {name: part.detach() * scales[name.partition(".")[0]] for name, part in factors.items()}


@contextmanager
def beside(lm: LM, name: str, right: Tensor, left: Tensor, scale: float, rows: int) -> Iterator[None]:
    """The module with `scale` · (x A) B beside it, in every row."""
    seen: list[Tensor] = []

    def keep(states: Tensor) -> None:
        seen[:] = [states]

    def change(output: Tensor) -> Tensor:
        return output + (seen[0].to(right) @ right.T @ left.T).to(output) * scale

    with on_input(lm.module(name), keep, rows), on_output(lm.module(name), change, rows):
        yield
