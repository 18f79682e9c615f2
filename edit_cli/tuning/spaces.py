"""What `tune` searches, method by method: one line a setting. Imports nothing heavy.

Layers are shares of a model's depth (0 is its first block, 1 its last), so that a space fits any model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

DIGITS = 3  # significant digits of numbers that are tried: what is written down is what was tried


class Proposals(Protocol):
    """Who proposes values: a trial of Optuna, or one whose values are known."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Range(ABC):
    """Values that one setting may take. They are proposed by one or more numbers or words, the parameters."""

    @abstractmethod
    def propose(self, key: str, trial: Proposals, depth: int, chosen: Mapping[str, Any]) -> Any:
        """A value. depth: the model's number of blocks. chosen: settings that were proposed before."""

    def parameters(self, key: str, value: Any, depth: int) -> dict[str, Any]:
        """The parameters that propose `value`, to begin with; none where it is outside."""
        return {}

    @abstractmethod
    def placeholder(self) -> Any:
        """A value for any model, until one is proposed."""


@dataclass(frozen=True)
class Real(Range):
    """A number from low to high. log: every factor is as likely as any other."""

    low: float
    high: float
    log: bool = True

    def propose(self, key: str, trial: Proposals, depth: int, chosen: Mapping[str, Any]) -> float:
        return float(f"{trial.suggest_float(key, self.low, self.high, log=self.log):.{DIGITS}g}")

    def parameters(self, key: str, value: Any, depth: int) -> dict[str, Any]:
        fits = isinstance(value, int | float) and self.low <= value <= self.high
        return {key: float(value)} if fits else {}

    def placeholder(self) -> float:
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return float(f"{middle:.{DIGITS}g}")


@dataclass(frozen=True)
class Whole(Range):
    """A whole number from low to high."""

    low: int
    high: int
    log: bool = False

    def propose(self, key: str, trial: Proposals, depth: int, chosen: Mapping[str, Any]) -> int:
        return trial.suggest_int(key, self.low, self.high, log=self.log)

    def parameters(self, key: str, value: Any, depth: int) -> dict[str, Any]:
        return {key: value} if isinstance(value, int) and self.low <= value <= self.high else {}

    def placeholder(self) -> int:
        return (self.low + self.high) // 2


@dataclass(frozen=True)
class Choice(Range):
    """One of some lists of words, or true or false."""

    options: tuple[Any, ...]

    def propose(self, key: str, trial: Proposals, depth: int, chosen: Mapping[str, Any]) -> Any:
        found = self.options[trial.suggest_categorical(key, tuple(range(len(self.options))))]
        return list(found) if isinstance(found, tuple) else found

    def parameters(self, key: str, value: Any, depth: int) -> dict[str, Any]:
        value = tuple(value) if isinstance(value, list) else value
        return {key: self.options.index(value)} if value in self.options else {}

    def placeholder(self) -> Any:
        return list(self.options[0]) if isinstance(self.options[0], tuple) else self.options[0]


@dataclass(frozen=True)
class Layer(Range):
    """One layer, at a share of the depth from first to last. above: layers that must be left above it."""

    first: float
    last: float
    above: int = 0

    def bounds(self, depth: int) -> tuple[int, int]:
        """The lowest and the highest layer."""
        top = max(depth - 1 - self.above, 0)
        return min(round(self.first * (depth - 1)), top), min(round(self.last * (depth - 1)), top)

    def propose(self, key: str, trial: Proposals, depth: int, chosen: Mapping[str, Any]) -> Any:
        return trial.suggest_int(key, *self.bounds(depth))

    def parameters(self, key: str, value: Any, depth: int) -> dict[str, Any]:
        low, high = self.bounds(depth)
        return {key: value} if isinstance(value, int) and low <= value <= high else {}

    def placeholder(self) -> int:
        return 0


@dataclass(frozen=True)
class Window(Layer):
    """Layers side by side, at most `widest`, the last of them at a share of the depth from first to last."""

    widest: int = 1

    def propose(self, key: str, trial: Proposals, depth: int, chosen: Mapping[str, Any]) -> list[int]:
        last = trial.suggest_int(f"{key}.last", *self.bounds(depth))
        count = trial.suggest_int(f"{key}.count", 1, min(self.widest, depth)) if self.widest > 1 else 1
        return list(range(max(last - count + 1, 0), last + 1))

    def parameters(self, key: str, value: Any, depth: int) -> dict[str, Any]:
        low, high = self.bounds(depth)
        if not isinstance(value, list) or not value or value != list(range(value[0], value[0] + len(value))):
            return {}
        if not low <= value[-1] <= high or len(value) > min(self.widest, depth):
            return {}
        return {f"{key}.last": value[-1]} | ({f"{key}.count": len(value)} if self.widest > 1 else {})

    def placeholder(self) -> Any:
        return [0]

    def reachable(self, depth: int) -> range:
        """Every layer that may be proposed."""
        low, high = self.bounds(depth)
        return range(max(low - self.widest + 1, 0), high + 1)


@dataclass(frozen=True)
class Projections(Window):
    """Projections of layers side by side, as UltraEdit names them: mlp_out:4-5."""

    kinds: tuple[tuple[str, ...], ...] = (("mlp_out",), ("mlp_in",), ("mlp_in", "mlp_out"))

    def propose(self, key: str, trial: Proposals, depth: int, chosen: Mapping[str, Any]) -> Any:
        layers = super().propose(key, trial, depth, chosen)
        kinds = self.kinds[trial.suggest_categorical(f"{key}.of", tuple(range(len(self.kinds))))]
        return [f"{kind}:{layers[0]}-{layers[-1]}" for kind in kinds]

    def parameters(self, key: str, value: Any, depth: int) -> dict[str, Any]:
        return {}

    def placeholder(self) -> Any:
        return ["mlp_out:0"]


@dataclass(frozen=True)
class LayersAbove(Range):
    """Layers right above the one that another setting names, at most `widest`."""

    key: str
    widest: int

    def propose(self, key: str, trial: Proposals, depth: int, chosen: Mapping[str, Any]) -> Any:
        first = chosen[self.key] + 1
        count = trial.suggest_int(f"{key}.count", 1, self.widest)
        return list(range(first, min(first + count, depth)))

    def placeholder(self) -> Any:
        return [1]


Space = Mapping[str, Range]

VALUE: Space = {
    "value.clamp_norm_factor": Real(0.3, 10.0),
    "value.lr": Real(0.05, 1.0),
    "value.steps": Whole(10, 60),
}
ROME: Space = {"layers": Window(0.05, 0.7), **VALUE}
MEMIT: Space = {"layers": Window(0.05, 0.7, widest=6), "covariance_weight": Real(1.0, 1e5), **VALUE}
FT: Space = {"layers": Window(0.0, 1.0), "lr": Real(1e-5, 1e-2), "steps": Whole(5, 60)}

SPACES: Mapping[str, Space] = {
    "rome": ROME,
    "r-rome": ROME,
    "memit": MEMIT,
    "memit-merge": MEMIT,
    "blue": MEMIT,
    "pmet": MEMIT,
    "emmet": {"layers": Window(0.05, 0.7, widest=6), "covariance_weight": Real(0.1, 1e4), **VALUE},
    "alphaedit": {
        "layers": Window(0.05, 0.7, widest=6),
        "threshold": Real(1e-3, 10.0),
        "relative": Choice((True,)),  # a threshold in units of the mean eigenvalue fits any model
        "l2": Real(0.1, 100.0),
        **VALUE,
    },
    "ft": FT,
    "ft-m": FT,
    "ft-l": {**FT, "norm_constraint": Real(1e-5, 1e-1)},
    "lora": {
        "modules": Choice((("mlp_in", "mlp_out"), ("mlp_out",), ("mlp_in",))),
        "rank": Whole(1, 64, log=True),
        "lr": Real(1e-5, 1e-2),
        "steps": Whole(10, 100),
    },
    "grace": {
        "layer": Layer(0.3, 1.0),
        "radius": Real(0.1, 300.0),
        "lr": Real(0.1, 3.0),
        "steps": Whole(20, 150),
    },
    "wise": {
        "layer": Layer(0.2, 1.0),
        "act_ratio": Real(0.5, 1.0, log=False),
        "mask_ratio": Real(0.1, 1.0),
        "lr": Real(0.1, 3.0),
        "steps": Whole(20, 100),
    },
    "melo": {
        "layer": Layer(0.3, 0.95, above=1),
        "lora_layers": LayersAbove("layer", widest=2),
        "radius": Real(0.1, 300.0),
        "rank": Whole(1, 16, log=True),
        "lr": Real(1e-4, 1e-1),
    },
    "tpatcher": {
        "activation_weight": Real(0.1, 10.0),
        "memory_weight": Real(1.0, 100.0),
        "lr": Real(1e-3, 1e-1),
        "steps": Whole(100, 2000, log=True),
    },
    "ultraedit": {"modules": Projections(0.05, 1.0, widest=8), "lr": Real(1e-7, 1e-1)},
}


def proposed(space: Space, trial: Proposals, depth: int) -> dict[str, Any]:
    """{dotted key: value} of every setting of the space."""
    chosen: dict[str, Any] = {}
    for key, values in space.items():
        chosen[key] = values.propose(key, trial, depth, chosen)
    return chosen


def reachable_layers(space: Space, depth: int) -> list[int]:
    """Layers whose second moments may be needed: those that `layers` may become."""
    window = space.get("layers")
    return list(window.reachable(depth)) if isinstance(window, Window) else []
