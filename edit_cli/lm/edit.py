"""The Edit is a value: an editor returns it, a model attaches and detaches it, a directory stores it. How changed
weights are put back, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from edit_cli.errors import UsageError
from edit_cli.files.tensors import Size
from edit_cli.lm.weights.access import Undo, WeightAccess
from edit_cli.requests import EditRequest


class Weights(Protocol):
    """What an edit of weights or modules knows of a model (`LM`).

    masters: float32 copies of edited weights that have fewer digits themselves.
    """

    name: str
    masters: dict[str, Tensor]

    @property
    def model(self) -> nn.Module: ...

    def module(self, name: str) -> nn.Module: ...

    def access(self, parameter: str) -> WeightAccess: ...


@dataclass(frozen=True)
class Added:
    """What a change of a projection's weight adds to what leaves it: left (right x). left: (d_out, r), None for the
    identity; right: (r, d_in).
    """

    left: Tensor | None
    right: Tensor

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self.left, self.right) if part is not None)


@dataclass(frozen=True)
class Provenance:
    """What an edit was made of: facts, and its method (name, settings, chat) as a saved edit says it, as plain data."""

    requests: Sequence[EditRequest]
    method: Mapping[str, Any]


class Edit(ABC):
    """What an editor made. `attach` returns its own exact undo.

    Each kind takes of the model (`lm`) what it needs; edits of weights and modules need no more than `Weights`.

    said: the shape (see `shapes`) of what `state` says beside the tensors. provenance: where the edit came from
    `edit_cli.edit`, for whoever saves it.
    """

    kind: ClassVar[str]
    said: ClassVar[Any] = dict[str, Any]
    provenance: Provenance | None = None

    @abstractmethod
    def attach(self, lm: Any) -> Undo: ...

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON-able rest) from which `from_state` of the same class makes an equal edit."""

    @classmethod
    @abstractmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> Edit: ...

    @classmethod
    def sizes(cls, lm: Any, names: Collection[str], rest: dict[str, Any]) -> dict[str, Size]:
        """The tensors that `from_state` must be given on this model, by name; unless a class says so, whatever there
        is.

        names: of the tensors that there are. rest: of the shape `said`.

        Raises:
            AttributeError, UsageError: the edit is about a part that this model has not.
        """
        return {name: Size(None, index=None) for name in names}

    def touches(self, lm: Any) -> list[str]:
        """Names of the parameters whose values this edit was made for; their hashes are checked when it is loaded."""
        return []

    def added(self, lm: Any) -> dict[str, Added] | None:
        """{module: what it adds to what leaves it}, if the edit is no more than that, to the last bits; None where it
        has to be attached.
        """
        return None

    def diagnosis(self, lm: Any) -> dict[str, Any]:
        """What its editor knows of how it went (`edits.diagnosis`), on the model without it; most say nothing."""
        return {}

    @property
    def is_finite(self) -> bool:
        """Whether it holds no NaN and no infinite number."""
        return all(bool(tensor.isfinite().all()) for tensor in self.state()[0].values())


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

    @classmethod
    def putting(cls, lm: Weights, values: Mapping[str, Tensor]) -> Restore:
        """Let parameters have these values."""
        restore = cls()
        for name, value in values.items():
            restore.put(lm, name, value)
        return restore

    def put(self, lm: Weights, name: str, value: Tensor) -> None:
        """Let a parameter have `value`, in float32 beside it where it has fewer digits itself."""
        access, master = lm.access(name), lm.masters.get(name)
        original = access.snapshot()

        def undo() -> None:
            original()
            if master is None:
                lm.masters.pop(name, None)
            else:
                lm.masters[name] = master

        self._originals[name] = undo
        access.assign(value)
        if access.rounds:
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


def present(lm: Weights, names: Sequence[str]) -> dict[str, Tensor]:
    """Those weights as they are, in float32 where they have fewer digits themselves."""
    return {
        name: (lm.masters[name] if name in lm.masters else lm.access(name).value()).detach().clone() for name in names
    }


class MergedEdit(Edit):
    """Weight edits that come off together (`LM.merge_top_edits`): a long sequence then keeps one original of each
    touched weight.

    When it is taken off it remembers what the weights were, so that it can be attached again, bit for bit, to the same
    model.
    """

    kind: ClassVar[str] = "weights"

    def __init__(self, restore: Restore) -> None:
        self.restore = restore
        self._held: dict[str, Tensor] = {}

    def hold(self, lm: Weights) -> None:
        """Remember the weights as they are."""
        self._held = present(lm, self.restore.names)

    def attach(self, lm: Weights) -> Restore:
        """Put back what `hold` remembers."""
        self.restore, self._held = Restore.putting(lm, self._held), {}
        return self.restore

    def touches(self, lm: Weights) -> list[str]:
        return sorted(self.restore.names)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        raise UsageError("edits that were joined are saved one by one, before they are joined")

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> MergedEdit:
        raise UsageError("edits that were joined are saved one by one, before they are joined")

    @classmethod
    def sizes(cls, lm: Weights, names: Collection[str], rest: dict[str, Any]) -> dict[str, Size]:
        raise UsageError("edits that were joined are saved one by one, before they are joined")
