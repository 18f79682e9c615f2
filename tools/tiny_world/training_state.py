"""Where a training stands, on disk: one that was killed goes on to the same bits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from edit_cli.errors import MissingError
from edit_cli.files.described import Damaged, read_described, write_described

FORMAT = 1
REMEDY = "the training begins anew"
EVERY = 250  # steps


class TrainingState:
    """A file with the model, its optimizers and the random numbers after some step.

    identity: of all that the training hangs on; what another one has left is not taken up.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity

    def save(
        self, step: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], rng: torch.Generator
    ) -> None:
        """Write it after `step` steps; a kill leaves the whole file or the one before.

        Raises:
            MissingError: the disk does not take it.
        """
        tensors: dict[str, Tensor] = {f"model.{name}": weight for name, weight in model.named_parameters()}
        for number, optimizer in enumerate(optimizers):
            tensors |= _named(optimizer, number)
        tensors["random"] = rng.get_state()
        write_described(self.path, tensors, {"identity": self.identity, "step": step}, FORMAT, self.path)

    @torch.no_grad()
    def resume(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], rng: torch.Generator) -> int:
        """Put all as it was; how many steps are done: 0 where there is nothing of this training."""
        try:
            tensors, about = read_described(self.path, FORMAT, REMEDY)
        except FileNotFoundError:
            return 0
        except (Damaged, MissingError) as error:
            said = str(error) if isinstance(error, MissingError) else f"{self.path}: {error}; {REMEDY}"
            print(said, file=sys.stderr)
            return 0
        if about.get("identity") != self.identity:
            return 0
        for name, weight in model.named_parameters():
            weight.copy_(tensors[f"model.{name}"])
        for number, optimizer in enumerate(optimizers):
            for index, parameter in enumerate(_parameters(optimizer)):
                start = f"optimizer.{number}.{index}."
                optimizer.state[parameter] = {
                    name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)
                }
        rng.set_state(tensors["random"])
        return int(about["step"])

    def remove(self) -> None:
        """There is no more to go on with."""
        self.path.unlink(missing_ok=True)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _named(optimizer: torch.optim.Optimizer, number: int) -> dict[str, Tensor]:
    """What an optimizer remembers of each parameter."""
    return {
        f"optimizer.{number}.{index}.{name}": tensor
        for index, parameter in enumerate(_parameters(optimizer))
        for name, tensor in optimizer.state[parameter].items()
    }
