"""What methods with a memory share: a layer that grows with every edit, and edits that hold only what they add to it.

The memory belongs to the model, not to the editor: the next edit of a sequence finds it where the earlier ones were
attached. So nothing has to be recalled, a thousand attached edits are one layer, and taking one off puts its entries
back as they were.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from edit_cli.config.schema import Linked, Natural, Seed
from edit_cli.editors.base import Context, Editor, EditorConfig
from edit_cli.edits.edit import Edit
from edit_cli.errors import UsageError
from edit_cli.files.shapes import checked
from edit_cli.files.tensors import Size
from edit_cli.lm.hooks import Wrapper, unwrapped
from edit_cli.lm.layout import attention_out, is_projection, widths
from edit_cli.lm.model import LM
from edit_cli.lm.prompt_position import PromptPosition, PromptPositionTracker
from edit_cli.lm.weights.access import Undo

CLOSEST = 4  # candidates whose distances are computed without cancellation
SLACK = 1e-4  # relative: a prompt's state differs in its last digits with what else is in the batch
GAP = 1e-5  # kept between two balls that a split sets apart


class Entries:
    """Rows (n, width) that grow; appending costs what is appended, on average."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._space = torch.empty(16, width, device=device, dtype=dtype)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def all(self) -> Tensor:
        """(n, width), a view."""
        return self._space[: self._count]

    def append(self, rows: Tensor) -> Undo:
        before, after = self._count, self._count + len(rows)
        if after > len(self._space):
            wider = self._space.new_empty(max(after, 2 * len(self._space)), self._space.shape[1])
            wider[:before] = self.all
            self._space = wider
        self._space[before:after] = rows.to(self._space)
        self._count = after

        def undo() -> None:
            self._count = before

        return undo

    def put(self, index: Tensor, rows: Tensor) -> Undo:
        """Other values for some rows.

        Raises:
            UsageError: there are no such rows.
        """
        if index.numel() and int(index.max()) >= self._count:
            raise UsageError(f"this edit changes entry {int(index.max())} of a memory that holds {self._count}")
        before = self.all[index].clone()
        self.all[index] = rows.to(self._space)

        def undo() -> None:
            self.all[index] = before

        return undo


class MemoryLayer(Wrapper):
    """Stands in a projection's place, beside it what attached edits remember.

    digest: of all that was added, in order.
    """

    def __init__(self, original: nn.Module, lm: LM, module: str) -> None:
        super().__init__(original)
        self.digest = ""
        self.tracker = PromptPositionTracker(lm, module)
        self._kept: Tensor | None = None

    def close(self) -> None:
        """It has been taken out again."""
        self.tracker.close()

    @abstractmethod
    def add(self, edit: MemoryPatch) -> Undo:
        """Take in what an edit brings. A memory that has been taken apart again is bit for bit what it was."""

    @property
    def bytes(self) -> int:
        """Of the memory as one edit (`whole`); 0 where that is no smaller than the edits that made it."""
        return 0

    def whole(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, content) of an edit that brings all of it to an empty memory; asked for only where `bytes` says
        that it pays.
        """
        raise NotImplementedError

    @property
    def position(self) -> PromptPosition:
        """Of the pass that is going on."""
        return self.tracker.position

    def rows(self, states: Tensor) -> Tensor | None:
        """(rows, tokens, width), also from families that flatten it; None where a pass shows only some of the
        tokens.
        """
        position = self.tracker.position
        if position is None or states.shape[:-1].numel() != position.mask.numel():
            return None
        return states.reshape(*position.mask.shape, states.shape[-1])

    def decided(self, position: PromptPosition, decide: Callable[[], Tensor]) -> Tensor:
        """(rows, …) what `decide` says once a prompt is complete, (rows,) of −1 before.

        It holds for all that follows in cached passes.
        """
        at = position.ends - position.first
        here = at >= 0
        if bool(here.all()):
            self._kept = decide()
        elif self._kept is None or len(self._kept) != len(at):
            return torch.full_like(at, -1)
        elif bool(here.any()):
            new = decide()
            self._kept = torch.where(here.view(-1, *[1] * (new.dim() - 1)), new, self._kept)
        return self._kept


class SaidOfMemory(TypedDict):
    """What a saved edit says beside its tensors."""

    module: str
    before: str
    content: dict[str, Any]


@dataclass
class MemoryPatch(Edit):
    """What one edit adds to the memory beside `module`.

    before: digest of the memory that it was made on. tensors, content: what the method says; content is JSON-able.

    Attributes:
        layer: the class of the memory. settings: parts of `content` that an empty one is made with.
        holds: shape of `content` (see shapes).
        axes: {tensor: the dimension along which those of several edits follow each other}. counts: numbers in `content`
            that are summed when they do.
    """

    kind: ClassVar[str] = "module"
    said: ClassVar[Any] = SaidOfMemory
    layer: ClassVar[type[MemoryLayer]]
    settings: ClassVar[tuple[str, ...]] = ()
    holds: ClassVar[Any] = dict[str, Any]
    axes: ClassVar[Mapping[str, int]] = {}
    counts: ClassVar[tuple[str, ...]] = ()
    module: str
    before: str
    tensors: dict[str, Tensor]
    content: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of the memory with this edit in it."""
        digest = hashlib.sha256(self.before.encode())
        digest.update(json.dumps([self.module, self.content], sort_keys=True).encode())
        for name in sorted(self.tensors):
            value = self.tensors[name].detach().contiguous().cpu()
            digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
            digest.update(value.view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def attach(self, lm: LM) -> Undo:
        """Grow the memory that is there, or begin one.

        Raises:
            UsageError: it was made on top of other edits than those that are attached.
        """
        with ExitStack() as undo:
            layer = self.present(lm, self.module)
            if (layer.digest if layer else "") != self.before:
                raise UsageError(
                    f"this edit was made on {'other' if self.before and layer else 'earlier' if self.before else 'no'}"
                    " edits of its kind than are attached: attach those that it was made on, in their order, and no"
                    " others"
                )
            if layer is None:
                layer = self._install(lm, undo)
            undo.callback(setattr, layer, "digest", layer.digest)
            undo.callback(layer.add(self))
            layer.digest = self.content.get("stands_for") or self.digest
            return undo.pop_all().close

    def _install(self, lm: LM, undo: ExitStack) -> MemoryLayer:
        parent, _, child = self.module.rpartition(".")
        original = lm.module(self.module)
        layer = self.begin(original, lm)
        undo.callback(layer.close)
        setattr(lm.module(parent), child, layer)
        undo.callback(setattr, lm.module(parent), child, original)
        return layer

    def begin(self, original: nn.Module, lm: LM) -> MemoryLayer:
        """An empty memory beside `original`."""
        return self.layer(original, lm, self.module, **{name: self.content[name] for name in self.settings})

    @classmethod
    def concatenate(cls, patches: Sequence[Self], layer: Any) -> Self:
        """One edit in the place of several that were made on top of each other.

        Lists in their content follow each other, too; of what neither follows nor is summed, the last tensors and the
        first content count.

        layer: the memory with all of them in it.
        """
        first, content = patches[0], dict(patches[0].content)
        tensors = {name: tensor for patch in patches for name, tensor in patch.tensors.items()}
        for name, axis in cls.axes.items():
            tensors[name] = torch.cat([patch.tensors[name] for patch in patches], dim=axis)
        for name in content:
            values = [patch.content[name] for patch in patches]
            if name in cls.counts:
                content[name] = sum(values)
            elif isinstance(values[0], list):
                content[name] = [part for value in values for part in value]
        return cls(first.module, first.before, tensors, content)

    def whole(self, lm: LM) -> Self:
        """One edit in the place of this one, which is attached, and all that it was made on: the next edit does not
        tell the difference.
        """
        layer = self.present(lm, self.module)
        tensors, content = layer.whole()
        return type(self)(self.module, "", tensors, {**content, "stands_for": layer.digest})

    @classmethod
    def present(cls, lm: LM, module: str) -> Any:
        """The memory of this kind that stands in `module`'s place, if there is one."""
        found = lm.module(module)
        return found if isinstance(found, cls.layer) else None

    def touches(self, lm: LM) -> list[str]:
        return [f"{self.module}.{name}" for name, _ in unwrapped(lm.module(self.module)).named_parameters()]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.tensors, {"module": self.module, "before": self.before, "content": self.content}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> Self:
        return cls(rest["module"], rest["before"], tensors, rest["content"])

    @classmethod
    def sizes(cls, lm: LM, names: Collection[str], rest: dict[str, Any]) -> dict[str, Size]:
        if not is_projection(lm.module(rest["module"])):
            raise UsageError(f"{rest['module']} is no Linear or Conv1D layer")
        content = checked(rest["content"], cls.holds, "the edit's content")
        return cls.brings(lm, *widths(lm.module(rest["module"])), content)

    @classmethod
    @abstractmethod
    def brings(cls, lm: LM, d_out: int, d_in: int, content: dict[str, Any]) -> dict[str, Size]:
        """The tensors of an edit with that content, beside a projection of those widths; raises as `sizes`."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(EditorConfig):
    """Settings of a memory beside one projection."""

    layer: Natural
    """Layer that the memory stands in; late ones tell facts apart (see `edit-cli calibrate`)."""
    module: str = "mlp_in"
    """Projection that the memory stands beside: mlp_in, mlp_out or its name in the block, such as mlp.c_fc."""
    seed: Annotated[Seed, Linked("${seed}")] = 0
    """Seed of everything that is drawn."""

    @property
    def layers(self) -> list[int]:
        """All layers that the settings name."""
        return [self.layer]


C = TypeVar("C", bound=EditorConfig)
Part = TypeVar("Part")
P = TypeVar("P", bound=MemoryPatch)


class MemoryEditor(Editor[C]):
    """An editor whose memory stands beside one projection.

    Attributes:
        Patch: the class of its edits.
        layer, module: the number of the layer, and the projection's name.
    """

    heads: ClassVar[tuple[str, ...]] = ("causal", "seq2seq", "classifier")
    experts = True
    Patch: ClassVar[type[MemoryPatch]]

    def __init__(self, config: C, lm: LM, context: Context | None = None) -> None:
        super().__init__(config, lm, context)
        self.layer, self.module = self.location()

    def location(self) -> tuple[int, str]:
        """Layer and name of the projection. Raises UsageError if there is none of that name."""
        config: Any = self.config
        return config.layer, module_of(self.lm, config.layer, config.module)

    def memory(self, **settings: Any) -> Any:
        """The memory that is attached, or an empty one, as a first edit would begin it with these settings."""
        layer = self.Patch.present(self.lm, self.module)
        if layer is None:
            layer = self.Patch.layer(self.lm.module(self.module), self.lm, self.module, **settings)
            layer.close()
        return layer

    def in_turn(self, parts: Sequence[Part], make: Callable[[Part], P], label: str) -> P:
        """One edit of all parts, each made on top of those before it: a fact meets what earlier ones have left, whether
        they came in the same edit or in one before.

        label: what progress calls them.
        """
        made: list[P] = []
        with ExitStack() as stack, self.lm.monitor.phase("train"):
            with self.lm.monitor.task(label, len(parts)) as advance:
                for part in parts:
                    made.append(make(part))
                    stack.enter_context(self.lm.edited(made[-1]))
                    advance(1)
            return type(made[0]).concatenate(made, self.memory())


def nearest(queries: Tensor, keys: Tensor, alive: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(distance, index) of the nearest of `keys` (n, w) for each of `queries` (r, w): Euclidean, float32.

    alive: (n,) which count.

    One matrix product ranks them. Its differences of large squares lose the digits of small distances, so those of the
    closest are computed again.
    """
    keys, queries = keys.float(), queries.float()
    ranked = keys.square().sum(1) - 2 * queries @ keys.T
    if alive is not None:
        ranked = ranked.masked_fill(~alive, float("inf"))
    candidates = ranked.topk(min(CLOSEST, len(keys)), dim=1, largest=False).indices
    distances = (queries[:, None] - keys[candidates]).norm(dim=-1)
    if alive is not None:
        distances = distances.masked_fill(~alive[candidates], float("inf"))
    smallest, place = distances.min(1)
    return smallest, candidates.gather(1, place[:, None])[:, 0]


def mlp_in(lm: LM, layer: int) -> str:
    """The first projection of a layer's MLP; a gated one's gate, or up projection, whichever comes first."""
    return lm.layout.mlp_weights(layer)[0].removesuffix(".weight")


def module_of(lm: LM, layer: int, part: str, key: str = "method.module") -> str:
    """A projection of a layer: "mlp_in" and "mlp_out" in any family, else its name in the block.

    In a mixture of experts those are of the MLP that every token passes; where there is none, attention's output
    projection stands for both.

    key: the setting that names it.

    Raises:
        UsageError: there is none of that name.
    """
    if part in ("mlp_in", "mlp_out"):
        if lm.layout.stack(layer).mlp_of(layer) is None:
            return attention_out(lm.model, lm.layout, layer)
        return mlp_in(lm, layer) if part == "mlp_in" else lm.layout.mlp_out(layer)
    name = f"{lm.layout.block(layer)}.{part}"
    try:
        fits = is_projection(lm.module(name))
    except AttributeError:
        fits = False
    if not fits:
        raise UsageError(
            f"{key}: {part} names no Linear or Conv1D layer of block {layer} of {lm.name}: choose mlp_in, mlp_out or a"
            " name in the block"
        )
    return name
