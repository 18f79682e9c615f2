"""The Edit is a value: an editor returns it, a model attaches and detaches it, a directory stores it.

Three kinds are enough.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

from torch import Tensor, nn

from edit_cli.errors import UsageError
from edit_cli.files.tensors import Size, size
from edit_cli.lm.hooks import exact
from edit_cli.lm.layout import is_transposed, widths
from edit_cli.lm.weights.access import Undo

if TYPE_CHECKING:
    from edit_cli.lm.model import LM
    from edit_cli.lm.routing import Answerer, Destination


MEMORY = "|memory"  # ends the names of saved tensors that are added to nothing


class Edit(ABC):
    """What an editor made. `attach` returns its own exact undo.

    said: the shape (see `shapes`) of what `state` says beside the tensors.
    """

    kind: ClassVar[str]
    said: ClassVar[Any] = dict[str, Any]

    @abstractmethod
    def attach(self, lm: LM) -> Undo: ...

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON-able rest) from which `from_state` of the same class makes an equal edit."""

    @classmethod
    @abstractmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> Edit: ...

    @classmethod
    def sizes(cls, lm: LM, names: Collection[str], rest: dict[str, Any]) -> dict[str, Size]:
        """The tensors that `from_state` must be given on this model, by name; unless a class says so, whatever there
        is.

        names: of the tensors that there are. rest: of the shape `said`.

        Raises:
            AttributeError, UsageError: the edit is about a part that this model has not.
        """
        return {name: Size(None, index=None) for name in names}

    def touches(self, lm: LM) -> list[str]:
        """Names of the parameters whose values this edit was made for; their hashes are checked when it is loaded."""
        return []

    @property
    def is_finite(self) -> bool:
        """Whether it holds no NaN and no infinite number."""
        return all(bool(tensor.isfinite().all()) for tensor in self.state()[0].values())


@dataclass
class Factors:
    """A low-rank update `left @ right`: (d_out, r) and (r, d_in), in math orientation (y = W x)."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    def dense(self) -> Tensor:
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
    """

    kind: ClassVar[str] = "weights"
    said: ClassVar[Any] = SaidOfWeights
    updates: dict[str, Factors | Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)

    def attach(self, lm: LM) -> Restore:
        """Add every update; the originals are kept, because adding and subtracting again is not exact."""
        restore = Restore()
        try:
            for name in self.updates:
                place, master = lm.place(name), lm.masters.get(name)
                base = exact(place.value()) if master is None else master
                restore.put(lm, name, base + self.stored(lm, name).to(base))
        except BaseException:  # one of them does not fit
            restore()
            raise
        return restore

    def stored(self, lm: LM, name: str) -> Tensor:
        """The dense update of one parameter, oriented as the parameter is stored.

        Raises:
            UsageError: it does not have the parameter's shape.
        """
        update = self.updates[name]
        if isinstance(update, Factors):
            transposed = is_transposed(lm.module(name.rpartition(".")[0]))
            update = update.dense().T if transposed else update.dense()
        shape = lm.place(name).shape
        if tuple(update.shape) != shape:
            raise UsageError(
                f"the update of {name} is {tuple(update.shape)}, the parameter {shape}: the edit was made for another"
                f" model than {lm.name}"
            )
        return update

    def compact(self, lm: LM) -> WeightDelta:
        """The same edit, with factors kept only while they are smaller than the matrix."""
        updates = {
            name: (
                update
                if isinstance(update, Tensor) or update.smaller_than_dense
                else self.stored(lm, name).contiguous()
            )
            for name, update in self.updates.items()
        }
        return WeightDelta(updates, self.info, self.memory)

    def norms(self) -> dict[str, float]:
        """Frobenius norm of every update."""
        return {n: float((u if isinstance(u, Tensor) else u.dense()).norm()) for n, u in self.updates.items()}

    def touches(self, lm: LM) -> list[str]:
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
    def sizes(cls, lm: LM, names: Collection[str], rest: dict[str, Any]) -> dict[str, Size]:
        wanted: dict[str, Size] = {}
        for key in names:
            name, _, part = key.rpartition("|")
            if part == "memory":  # for the editor to judge, who knows what it left there
                wanted[key] = Size(None, index=None)
            elif part == "dense":
                wanted[key] = size(*lm.place(name).shape)
            else:
                d_out, d_in = widths(lm.module(name.rpartition(".")[0]))
                wanted[f"{name}|left"], wanted[f"{name}|right"] = size(d_out, name), size(name, d_in)
        return wanted


class Restore:
    """The undo of changed weights: what puts every one of them back.

    `before` joins two that followed each other to one.
    """

    def __init__(self) -> None:
        self._originals: dict[str, Undo] = {}

    @property
    def names(self) -> list[str]:
        """Of the parameters."""
        return list(self._originals)

    def put(self, lm: LM, name: str, value: Tensor) -> None:
        """Let a parameter have `value`, in float32 beside it where it has fewer digits itself."""
        place, master = lm.place(name), lm.masters.get(name)
        original = place.keep()

        def undo() -> None:
            original()
            if master is None:
                lm.masters.pop(name, None)
            else:
                lm.masters[name] = master

        self._originals[name] = undo
        place.assign(value)
        if place.rounds:
            lm.masters[name] = value

    def before(self, later: Restore) -> Restore:
        """The undo of both: what was there at first is kept once a parameter, however many changes followed."""
        joined = Restore()
        joined._originals = {
            **self._originals,
            **{name: undo for name, undo in later._originals.items() if name not in self._originals},
        }
        return joined

    def __call__(self) -> None:
        for undo in reversed(self._originals.values()):  # off the device, what is put back is all that one hook holds
            undo()


@dataclass
class WeightState(Edit):
    """Weights as a sequence of edits has left them: attached to the unedited model it gives what those gave one
    after another, bit for bit.
    """

    kind: ClassVar[str] = "weights"
    values: dict[str, Tensor]

    @classmethod
    def present(cls, lm: LM, names: Sequence[str]) -> WeightState:
        """Those weights as they are, in float32 where they have fewer digits themselves."""
        return cls(
            {
                name: (lm.masters[name] if name in lm.masters else lm.place(name).value()).detach().clone()
                for name in names
            }
        )

    def attach(self, lm: LM) -> Restore:
        restore = Restore()
        for name, value in self.values.items():
            restore.put(lm, name, value)
        return restore

    def touches(self, lm: LM) -> list[str]:
        return sorted(self.values)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.values, {}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> WeightState:
        return cls(tensors)

    @classmethod
    def sizes(cls, lm: LM, names: Collection[str], rest: dict[str, Any]) -> dict[str, Size]:
        return {name: size(*lm.place(name).shape) for name in names}


class Joined(Edit):
    """Weight edits that come off together (`LM.settle`): a long sequence then keeps one original of each touched
    weight.

    When it is taken off it remembers what the weights were, so that it can be attached again, bit for bit, to the same
    model.
    """

    kind: ClassVar[str] = "weights"

    def __init__(self, restore: Restore) -> None:
        self.restore = restore
        self._held = WeightState({})

    def hold(self, lm: LM) -> None:
        """Remember the weights as they are."""
        self._held = WeightState.present(lm, self.restore.names)

    def attach(self, lm: LM) -> Restore:
        """Put back what `hold` remembers."""
        self.restore = self._held.attach(lm)
        self._held = WeightState({})
        return self.restore

    def touches(self, lm: LM) -> list[str]:
        return sorted(self.restore.names)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        raise UsageError("edits that were joined are saved one by one, before they are joined")

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> Joined:
        raise UsageError("edits that were joined are saved one by one, before they are joined")

    @classmethod
    def sizes(cls, lm: LM, names: Collection[str], rest: dict[str, Any]) -> dict[str, Size]:
        raise UsageError("edits that were joined are saved one by one, before they are joined")


class ModulePatch(Edit):
    """A module is wrapped or widened. Subclasses say which (`module`) and build its replacement (`wrap`)."""

    kind: ClassVar[str] = "module"
    module: str

    @abstractmethod
    def wrap(self, original: nn.Module) -> nn.Module:
        """The module that takes the original's place: a `Wrapper`, which keeps names inside it good.

        It leaves the weights alone.
        """

    def attach(self, lm: LM) -> Undo:
        parent_name, _, child = self.module.rpartition(".")
        parent = lm.module(parent_name) if parent_name else lm.model
        original = parent.get_submodule(child)
        setattr(parent, child, self.wrap(original))
        return lambda: setattr(parent, child, original)

    def touches(self, lm: LM) -> list[str]:
        return [f"{self.module}.{name}" for name, _ in lm.module(self.module).named_parameters()]


class Route(Edit):
    """Which answerer and which text answer a prompt. No weight changes; prompts that are not claimed pass through.

    covered: a later route answers for this one, too, so that it need not be asked.
    """

    kind: ClassVar[str] = "route"
    covered: bool = False

    def attach(self, lm: LM) -> Undo:
        return lambda: None

    @abstractmethod
    def destinations(self, below: Answerer, prompts: Sequence[str]) -> list[Destination | None]: ...
