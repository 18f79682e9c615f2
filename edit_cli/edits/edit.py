"""The three kinds of edits: changed weights, a changed module, a route in front of the model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

from torch import Tensor, nn

from edit_cli.errors import UsageError
from edit_cli.files.tensors import Size, size
from edit_cli.lm.edit import Added, Edit, Restore, Weights, present
from edit_cli.lm.hooks import Wrapper, exact
from edit_cli.lm.layout import is_projection, is_transposed, widths
from edit_cli.lm.matrices import matrix_of
from edit_cli.lm.precision import exact_matmul
from edit_cli.lm.routing import Answerer, Destination
from edit_cli.lm.weights.access import Undo

if TYPE_CHECKING:
    from edit_cli.lm.model import LM

MEMORY = "|memory"  # ends the names of saved tensors that are added to nothing


@dataclass
class Factors:
    """A low-rank update `left @ right`: (d_out, r) and (r, d_in), in math orientation (y = W x)."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    def dense(self) -> Tensor:
        """The product, in full float32 whatever passes are multiplied in."""
        with exact_matmul():
            return self.left @ self.right

    @property
    def smaller_than_dense(self) -> bool:
        rows, columns = self.left.shape[0], self.right.shape[1]
        return self.rank * (rows + columns) < rows * columns


class Info(TypedDict, total=False):
    """What editors of sequences read again of what they have remembered (`WeightDelta.info`)."""

    facts: list[tuple[str, str]]  # prompts and targets


class SaidOfWeights(TypedDict, total=False):
    info: Info


@dataclass
class WeightDelta(Edit):
    """Changes of weights: `updates[parameter]` is `Factors` in math orientation, or a dense tensor as the parameter is
    stored.

    `info` holds what the editor wants remembered (losses, norms, prefixes), JSON-able. `memory` holds tensors that an
    editor of sequences leaves for its next edit (`Editor.recall`); they are saved with the edit and added to nothing.
    `by_fact` holds what the editor made it of, fact by fact (`Editor.without`): it is saved beside the edit, which is
    whole without it.
    """

    kind: ClassVar[str] = "weights"
    said: ClassVar[Any] = SaidOfWeights
    updates: dict[str, Factors | Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    by_fact: dict[str, Tensor] = field(default_factory=dict)

    def attach(self, lm: Weights) -> Restore:
        """Add every update; the originals are kept, because adding and subtracting again is not exact."""
        restore = Restore()
        try:
            for name in self.updates:
                access, master = lm.access(name), lm.masters.get(name)
                base = exact(access.value()) if master is None else master
                restore.put(lm, name, base + self.stored(lm, name).to(base))
        except BaseException:  # one of them does not fit
            restore()
            raise
        return restore

    def stored(self, lm: Weights, name: str) -> Tensor:
        """The dense update of one parameter, oriented as the parameter is stored.

        Raises:
            UsageError: it does not have the parameter's shape.
        """
        update = self.updates[name]
        if isinstance(update, Factors):
            update = matrix_of(lm.module(name.rpartition(".")[0])).stored(update.dense())
        shape = lm.access(name).shape
        if tuple(update.shape) != shape:
            raise UsageError(
                f"the update of {name} is {tuple(update.shape)}, the parameter {shape}: the edit was made for another"
                f" model than {lm.name}"
            )
        return update

    def added(self, lm: LM) -> dict[str, Added] | None:
        """Of projections in blocks with the digits of float32: other weights round what is attached to them."""
        found: dict[str, Added] = {}
        for name, update in self.updates.items():
            owner, _, leaf = name.rpartition(".")
            inside = any(owner.startswith(f"{stack.blocks}.") for stack in lm.layout.stacks)
            if leaf != "weight" or not inside or lm.access(name).rounds:
                return None
            if not is_projection(lm.module(owner)) or isinstance(lm.module(owner), Wrapper):
                return None
            if isinstance(update, Factors):
                found[owner] = Added(update.left, update.right)
            else:
                found[owner] = Added(None, update.T if is_transposed(lm.module(owner)) else update)
            left, right = found[owner].left, found[owner].right
            if (len(right) if left is None else len(left), right.shape[1]) != widths(lm.module(owner)):
                return None  # made for another model, as attaching it says
        return found

    def compact(self, lm: Weights) -> WeightDelta:
        """The same edit, with factors kept only while they are smaller than the matrix."""
        updates = {
            name: (
                update
                if isinstance(update, Tensor) or update.smaller_than_dense
                else self.stored(lm, name).contiguous()
            )
            for name, update in self.updates.items()
        }
        return WeightDelta(updates, self.info, self.memory, self.by_fact)

    def diagnosis(self, lm: Weights) -> dict[str, Any]:
        """What the editor left in `info`, and the largest update in norms of its weight."""
        sizes = [
            float(exact(self.stored(lm, name)).norm() / exact(lm.access(name).value()).norm().clamp_min(1e-30))
            for name in self.updates
        ]
        return {**self.info.get("diagnosis", {}), **({"size": max(sizes)} if sizes else {})}

    def norms(self) -> dict[str, float]:
        """Frobenius norm of every update."""
        return {n: float((u if isinstance(u, Tensor) else u.dense()).norm()) for n, u in self.updates.items()}

    def touches(self, lm: Weights) -> list[str]:
        return sorted(self.updates)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {f"{name}{MEMORY}": kept for name, kept in self.memory.items()}
        for name, update in self.updates.items():
            if isinstance(update, Tensor):
                tensors[f"{name}|dense"] = update
            else:
                tensors[f"{name}|left"], tensors[f"{name}|right"] = update.left, update.right
        return tensors, {"info": self.info}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> WeightDelta:
        updates: dict[str, Factors | Tensor] = {}
        memory: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("|")
            if part == "memory":
                memory[name] = tensor
            elif part == "dense":
                updates[name] = tensor
            elif part == "left":
                updates[name] = Factors(tensor, tensors[f"{name}|right"])
        return cls(updates, rest.get("info", {}), memory)

    @classmethod
    def sizes(cls, lm: Weights, names: Collection[str], rest: dict[str, Any]) -> dict[str, Size]:
        wanted: dict[str, Size] = {}
        for key in names:
            name, _, part = key.rpartition("|")
            if part == "memory":  # for the editor to judge, who knows what it left there
                wanted[key] = Size(None, index=None)
            elif part == "dense":
                wanted[key] = size(*lm.access(name).shape)
            else:
                d_out, d_in = widths(lm.module(name.rpartition(".")[0]))
                wanted[f"{name}|left"], wanted[f"{name}|right"] = size(d_out, name), size(name, d_in)
        return wanted


@dataclass
class WeightState(Edit):
    """Weights as a sequence of edits has left them: attached to the unedited model it gives what those gave one
    after another, bit for bit.
    """

    kind: ClassVar[str] = "weights"
    values: dict[str, Tensor]

    @classmethod
    def present(cls, lm: Weights, names: Sequence[str]) -> WeightState:
        """Those weights as they are, in float32 where they have fewer digits themselves."""
        return cls(present(lm, names))

    def attach(self, lm: Weights) -> Restore:
        return Restore.putting(lm, self.values)

    def touches(self, lm: Weights) -> list[str]:
        return sorted(self.values)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.values, {}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> WeightState:
        return cls(tensors)

    @classmethod
    def sizes(cls, lm: Weights, names: Collection[str], rest: dict[str, Any]) -> dict[str, Size]:
        return {name: size(*lm.access(name).shape) for name in names}


class ModulePatch(Edit):
    """A module is wrapped or widened. Subclasses say which (`module`) and build its replacement (`wrap`)."""

    kind: ClassVar[str] = "module"
    module: str

    @abstractmethod
    def wrap(self, original: nn.Module) -> nn.Module:
        """The module that takes the original's place: a `Wrapper`, which keeps names inside it good.

        It leaves the weights alone.
        """

    def attach(self, lm: Weights) -> Undo:
        parent_name, _, child = self.module.rpartition(".")
        parent = lm.module(parent_name) if parent_name else lm.model
        original = parent.get_submodule(child)
        setattr(parent, child, self.wrap(original))
        return lambda: setattr(parent, child, original)

    def touches(self, lm: Weights) -> list[str]:
        return [f"{self.module}.{name}" for name, _ in lm.module(self.module).named_parameters()]


class Route(Edit):
    """Which answerer and which text answer a prompt. No weight changes; prompts that are not claimed pass through.

    covered: a later route answers for this one, too, so that it need not be asked.
    """

    kind: ClassVar[str] = "route"
    covered: bool = False

    def attach(self, lm: Any) -> Undo:
        return lambda: None

    @abstractmethod
    def destinations(self, below: Answerer, prompts: Sequence[str]) -> list[Destination | None]: ...
