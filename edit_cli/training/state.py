"""Where a training stands, on disk: network, optimizer and the best network so far, as safetensors and JSON."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal, TypedDict

from torch import Tensor, nn

from edit_cli.editors.meta.base_model_cache import BaseModelCache
from edit_cli.editors.meta.checkpoints import refuse_others
from edit_cli.errors import MissingError
from edit_cli.files.disk import replacing
from edit_cli.files.json_files import read_json, write_json
from edit_cli.files.shapes import Count, checked
from edit_cli.files.tensors import read_tensors, write_tensors
from edit_cli.training.sharding import load_whole, spread_like, whole, whole_state

FORMAT = 1
FOLDER, ABOUT = "state", "state.json"
NETWORK, OPTIMIZER, BEST = "network.safetensors", "optimizer.safetensors", "best.safetensors"


class About(TypedDict):
    format: Literal[1]
    stamp: str
    step: Count
    optimizer: dict[str, float | bool | str | None]
    bad: Count
    best_step: Count
    best_line: dict[str, Any]
    scaler: dict[str, float | None] | None


class State:
    """What a training must know to go on. best: parameters with the lowest validation loss, in host memory."""

    def __init__(self, folder: Path, stamp: str, rank: int = 0) -> None:
        """rank: the number of this process; all write what they keep, the first one all else."""
        self.folder, self.stamp, self.rank, self.is_main = folder / FOLDER, stamp, rank, rank == 0
        self.best: dict[str, Tensor] | None = None
        self.best_line: dict[str, Any] = {}
        self.best_step, self.bad = 0, 0

    def latest(self) -> int:
        """The last step that was saved, 0 for none. States of another training in this folder are removed."""
        if not self.is_main:
            return 0
        steps = []
        for path in self.folder.glob("step-*"):
            if (path / ABOUT).exists() and self._read(path)["stamp"] == self.stamp:
                steps.append(_number(path))
            else:
                _remove(path)
        if not steps:
            for path in self.folder.glob("cache-*"):
                shutil.rmtree(path)
        return max(steps, default=0)

    def save_cache(self, step: int, cache: BaseModelCache | None) -> None:
        """Write what this process has kept since the last time. To be called before `save`."""
        if cache is not None:
            cache.write(self.folder / f"cache-{self.rank}-{step:08d}")

    def load_cache(self, step: int, cache: BaseModelCache | None) -> None:
        """Take up what this process had kept after `step` steps."""
        for path in sorted(self.folder.glob(f"cache-{self.rank}-*")):
            if _number(path) > step:
                shutil.rmtree(path)
            elif cache is not None:
                cache.read(path)

    def offer(self, step: int, line: dict[str, Any], net: nn.Module) -> None:
        """Keep these parameters, if their validation loss is the lowest so far."""
        if self.best is None or line["loss"] < self.best_line["loss"]:
            self.best_step, self.best_line = step, line
            self.best = {name: value.detach().to("cpu", copy=True) for name, value in whole_state(net).items()}

    def save(self, step: int, net: nn.Module, optimizer: Any, scaler: Any = None) -> None:
        """Write the state after `step` steps; the one before it is removed once this one is there.

        Raises:
            MissingError: the disk does not take it.
        """
        tensors, rest = _flat(optimizer.state_dict()["state"]) if optimizer is not None else ({}, {})
        tensors, network = {name: whole(value) for name, value in tensors.items()}, whole_state(net)
        if not self.is_main:
            return
        about = {
            "format": FORMAT,
            "stamp": self.stamp, "step": step, "optimizer": rest, "bad": self.bad, "best_step": self.best_step,
            "best_line": self.best_line, "scaler": scaler.state_dict() if scaler is not None else None,
        }  # fmt: skip
        path = self.folder / f"step-{step:08d}"
        with replacing(path) as temporary:
            write_tensors(temporary / NETWORK, network)
            write_tensors(temporary / OPTIMIZER, tensors)
            if self.best is not None:
                write_tensors(temporary / BEST, self.best)
            write_json(temporary / ABOUT, about)
        for other in self.folder.glob("step-*"):
            if other != path:
                _remove(other)

    def _read(self, path: Path) -> dict[str, Any]:
        return checked(read_json(path / ABOUT), About, path / ABOUT, _remedy(path))

    def load(self, step: int, net: nn.Module, optimizer: Any, scaler: Any = None) -> None:
        """Put network and optimizer where they were after `step` steps.

        Raises:
            MissingError: what was saved is damaged; says what to delete.
        """
        path = self.folder / f"step-{step:08d}"
        about = self._read(path)
        network, _ = read_tensors(path / NETWORK, _remedy(path))
        refuse_others(net, network, path)
        load_whole(net, network)
        self.bad, self.best_step, self.best_line = about["bad"], about["best_step"], about["best_line"]
        self.best = read_tensors(path / BEST, _remedy(path))[0] if (path / BEST).exists() else None
        if self.best is not None:
            refuse_others(net, self.best, path)
        if optimizer is not None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            tensors, _ = read_tensors(path / OPTIMIZER, _remedy(path))
            _refuse_unfit(tensors, about["optimizer"], parameters, path)
            state = _nested(tensors, about["optimizer"])
            for number, values in state.items():
                values |= {
                    name: spread_like(value, parameters[number])
                    for name, value in values.items()
                    if isinstance(value, Tensor)
                }
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        if scaler is not None and about["scaler"]:
            scaler.load_state_dict(about["scaler"])

    def clear(self) -> None:
        """Remove what was saved: the training is finished."""
        if self.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a state, first of all what makes it one: half of it counts for nothing."""
    (path / ABOUT).unlink(missing_ok=True)
    shutil.rmtree(path)


def _number(path: Path) -> int:
    """Of the step that a folder is named after.

    Raises:
        MissingError: it is named after none.
    """
    number = path.name.rpartition("-")[2]
    if not number.isdecimal():
        raise MissingError(f"{path} is nothing that a training left there: {_remedy(path)}")
    return int(number)


def _remedy(path: Path) -> str:
    return f"delete {path}, and the training starts over"


def _refuse_unfit(tensors: dict[str, Tensor], rest: dict[str, Any], parameters: list[Tensor], path: Path) -> None:
    """What an optimizer keeps has the size of its parameter, or is a single number.

    Raises:
        MissingError: it is something else.
    """
    for name in (*tensors, *rest):
        number = name.partition(".")[0]
        fits = number.isdecimal() and int(number) < len(parameters)
        if fits and name in tensors:
            fits = tensors[name].shape in ((), parameters[int(number)].shape) and tensors[name].is_floating_point()
        if not fits:
            raise MissingError(f"{path / OPTIMIZER} is damaged: {name} fits none of the network; {_remedy(path)}")


def _flat(state: dict[int, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """({"0.exp_avg": tensor}, {"0.other": value}) of an optimizer's state."""
    every = {f"{number}.{name}": value for number, values in state.items() for name, value in values.items()}
    tensors = {name: value for name, value in every.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in every.items() if name not in tensors}


def _nested(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **rest}.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    return state
