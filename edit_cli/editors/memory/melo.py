"""MELO (Yu et al., 2024): clusters of remembered prompts, each prompt with its own block of LoRA factors in the
layers above.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn

from edit_cli.editors.memory.base import MemoryLayer, MemoryPatch, module_of, nearest
from edit_cli.editors.old import Editor
from edit_cli.editors.passes import at_prompt_end, passes, row_losses
from edit_cli.errors import UsageError
from edit_cli.files.shapes import Count, Rule
from edit_cli.files.tensors import Size, size
from edit_cli.lm.hooks import Wrapper, on_input, on_output
from edit_cli.lm.layout import widths
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import Row
from edit_cli.lm.weights.access import Undo
from edit_cli.requests import EditRequest

SLACK, GAP = 1e-4, 1e-5  # relative rounding of a distance; space between two clusters that were split


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
        outside, focus = self.rows(output), self.watch.focus
        self.chosen = (
            None
            if outside is None or self.silent
            else self.decided(focus, lambda: self.lookup(at_prompt_end(outside, focus)))
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
    points: list[Count]


class MeloContent(TypedDict):
    """What an edit says beside its tensors. blocks: of each new point, the number of its LoRA block."""

    modules: list[str]
    rank: Count
    clusters: Annotated[
        dict[str, MeloCluster], Rule(lambda some: all(map(str.isdecimal, some)), "clusters by their numbers")
    ]
    blocks: list[Count]
    forgotten: Count


class MeloPatch(MemoryPatch):
    """One LoRA block, and the clusters that its prompts began or changed."""

    layer: ClassVar[type[MemoryLayer]] = MeloLayer
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

    def begin(self, original: nn.Module, lm: LM) -> MeloLayer:
        return MeloLayer(original, lm, self.module, self.content["rank"])

    def _install(self, lm: LM, undo: ExitStack) -> MemoryLayer:
        index = super()._install(lm, undo)
        for name in self.content["modules"]:
            parent, _, child = name.rpartition(".")
            original = lm.module(name)
            setattr(lm.module(parent), child, Beside(original, index, name))
            undo.callback(setattr, lm.module(parent), child, original)
        return index


@dataclass(kw_only=True)
class Melo(Editor):
    """Neuron-indexed dynamic LoRA. The facts of one edit share a block.

    layer, module: the index, whose output at the prompt's last token is the key. lora_layers (above the index),
    lora_modules ("mlp_in", "mlp_out" or names in the block): where blocks stand. rank: r_b of a block. scale: of its
    product. radius: ε of a new cluster. lr, steps, decay_every: Adam, the learning rate halved every so many steps. It
    stops once every loss is below `stop_loss`.
    """

    mass_editor = True
    heads = ("causal", "seq2seq", "classifier")

    layer: int
    module: str = "mlp_out"
    lora_layers: list[int]
    lora_modules: list[str] = field(default_factory=lambda: ["mlp_in", "mlp_out"])
    rank: int = 2
    scale: float = 1.0
    radius: int | float = 1.0
    lr: float = 1.0e-2
    steps: int = 50
    decay_every: int = 20
    stop_loss: float = 0.02
    seed: int = 0

    @property
    def layers(self) -> list[int]:
        return [self.layer, *self.lora_layers]

    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> MeloPatch:
        """A block for the requests, and their prompts in the database."""
        name = module_of(lm, self.layer, self.module)
        modules = self._modules(lm)
        attached = MeloPatch.present(lm, name)
        if attached and list(attached.factors[0]) != modules:
            raise UsageError(
                "method.lora_layers, method.lora_modules: the attached edits have their blocks in"
                f" {', '.join(attached.factors[0])}"
            )
        block = len(attached.factors) if attached else 0
        earlier = attached.data if attached else Database()
        data = Database(earlier.clusters, list(earlier.blocks), earlier.forgotten)
        rows = lm.head.encode([(request.text, request.target_new) for request in requests])
        changed: set[int] = set()
        with passes(lm, rows, name, self.layer) as run:
            keys: list[Tensor] = []
            with torch.no_grad():
                run.answers(lambda output: keys.append(at_prompt_end(output, run.focus)))
        for key, row in zip(keys[0].to(lm.device), rows, strict=True):
            changed |= data.place(key.float(), row.target, block, float(self.radius))
        with lm.monitor.phase("train"):
            tensors = self._train(lm, rows, modules, block, attached)
        clusters = {
            n: {"answer": list(c.answer), "radius": c.radius, "points": list(c.points)}
            for n, c in data.clusters.items()
            if n in changed
        }
        for number in clusters:
            cluster = data.clusters[number]
            tensors[f"center.{number}"] = cluster.center
            tensors[f"points.{number}"] = (
                torch.stack(list(cluster.points.values()))
                if cluster.points
                else cluster.center.new_zeros(0, len(cluster.center))
            )
        content = {
            "modules": modules,
            "rank": self.rank,
            "clusters": {str(number): about for number, about in clusters.items()},
            "blocks": data.blocks[len(earlier.blocks) :],
            "forgotten": data.forgotten,
        }
        return MeloPatch(name, attached.digest if attached else "", tensors, content)

    def _train(
        self, lm: LM, rows: Sequence[Row], modules: Sequence[str], block: int, attached: MeloLayer | None
    ) -> dict[str, Tensor]:
        """The block's factors, {right.NAME: (r, d_in), left.NAME: (d_out, r)}; B starts at zero, so that nothing
        changes at first.
        """
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + block)
        factors: dict[str, Tensor] = {}
        for name in modules:
            d_out, d_in = widths(lm.module(name))
            factors[f"right.{name}"] = (
                (torch.randn(self.rank, d_in, generator=draw) * d_in**-0.5).to(lm.device).requires_grad_()
            )
            factors[f"left.{name}"] = torch.zeros(d_out, self.rank, device=lm.device, requires_grad=True)
        optimizer = torch.optim.Adam(list(factors.values()), lr=self.lr)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, self.decay_every, 0.5)
        with ExitStack() as stack:
            if attached:
                stack.enter_context(attached.silenced())
            run = stack.enter_context(passes(lm, rows, modules[0], min(self.lora_layers), end=True))
            for name in modules:
                stack.enter_context(
                    beside(lm, name, factors[f"right.{name}"], factors[f"left.{name}"], self.scale, len(rows))
                )
            for _ in lm.monitor.counted("blocks", self.steps):
                losses = row_losses(run.answers(lambda output: None), len(rows))
                if losses.max().item() < self.stop_loss:
                    break
                for part, gradient in zip(
                    factors.values(), torch.autograd.grad(losses.mean(), list(factors.values())), strict=True
                ):
                    part.grad = gradient
                optimizer.step()
                schedule.step()
        return {key: part.detach() * (self.scale if key.startswith("left.") else 1.0) for key, part in factors.items()}

    def _modules(self, lm: LM) -> list[str]:
        if not self.lora_layers or not self.lora_modules:
            raise UsageError(
                "method.lora_layers and method.lora_modules name where LoRA blocks stand: give at least one of each"
            )
        if min(self.lora_layers) <= self.layer:
            raise UsageError(
                f"method.lora_layers={self.lora_layers}: blocks stand above the index, which is in layer {self.layer}"
                " (method.layer)"
            )
        return [module_of(lm, layer, part) for layer in sorted(self.lora_layers) for part in self.lora_modules]


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
