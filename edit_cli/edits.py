"""The Edit is a value: an editor returns it, a model attaches and detaches it, a directory stores it. Three kinds are enough."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from edit_cli.errors import UsageError
from edit_cli.lm.hooks import exact
from edit_cli.lm.layout import is_transposed
from edit_cli.lm.places import Undo

if TYPE_CHECKING:
    from edit_cli.lm.model import LM
    from edit_cli.lm.routing import Answerer, Destination


class Edit(ABC):
    """What an editor made. `attach` returns its own exact undo."""

    kind: ClassVar[str]

    @abstractmethod
    def attach(self, lm: LM) -> Undo: ...

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON-able rest) from which `from_state` of the same class makes an equal edit."""

    @classmethod
    @abstractmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> Edit: ...

    def touches(self, lm: LM) -> list[str]:
        """Names of the parameters whose values this edit was made for; their hashes are checked when it is loaded."""
        return []


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


@dataclass
class WeightDelta(Edit):
    """Changes of weights: `updates[parameter]` is `Factors` in math orientation, or a dense tensor as the parameter is stored.

    `info` holds what the editor wants remembered (losses, norms, prefixes), JSON-able. `memory` holds tensors that an editor of
    sequences leaves for its next edit (`Editor.recall`); they are saved with the edit and added to nothing.
    """

    kind: ClassVar[str] = "weights"
    updates: dict[str, Factors | Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)

    def attach(self, lm: LM) -> Undo:
        """Add every update; the originals are kept, because adding and subtracting again is not exact."""
        with ExitStack() as undo:  # at once, should one of them not fit
            for name in self.updates:
                self._add(lm, name, undo)
            return undo.pop_all().close

    def _add(self, lm: LM, name: str, undo: ExitStack) -> None:
        place, master = lm.place(name), lm.masters.get(name)
        base = exact(place.value()) if master is None else master
        total = base + self.stored(lm, name).to(base)
        undo.callback(place.keep())
        place.assign(total)
        if place.rounds:
            undo.callback(_put_back, lm.masters, name, master)
            lm.masters[name] = total

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
                f"the update of {name} is {tuple(update.shape)}, the parameter {shape}: the edit was made for another model than {lm.name}"
            )
        return update

    def compact(self, lm: LM) -> WeightDelta:
        """The same edit, with factors kept only while they are smaller than the matrix."""
        updates = {
            name: update if isinstance(update, Tensor) or update.smaller_than_dense else self.stored(lm, name).contiguous()
            for name, update in self.updates.items()
        }
        return WeightDelta(updates, self.info, self.memory)

    def norms(self) -> dict[str, float]:
        """Frobenius norm of every update."""
        return {n: float((u if isinstance(u, Tensor) else u.dense()).norm()) for n, u in self.updates.items()}

    def touches(self, lm: LM) -> list[str]:
        return sorted(self.updates)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {f"{name}|memory": kept for name, kept in self.memory.items()}
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


def _put_back(masters: dict[str, Tensor], name: str, master: Tensor | None) -> None:
    if master is None:
        masters.pop(name, None)
    else:
        masters[name] = master


class ModulePatch(Edit):
    """A module is wrapped or widened. Subclasses say which (`module`) and build its replacement (`wrap`)."""

    kind: ClassVar[str] = "module"
    module: str

    @abstractmethod
    def wrap(self, original: nn.Module) -> nn.Module:
        """The module that takes the original's place: a `Wrapper`, which keeps names inside it good. It leaves the weights alone."""

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
