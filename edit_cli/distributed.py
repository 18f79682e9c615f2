"""One run on several processes: who does which part, and how the parts come together. Alone, all of it is the identity.

Every process takes the same steps in the same order, so that each finds the others where parts are exchanged. The first
one (the main process) is the only one that writes results.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from edit_cli.errors import EditCliError

if TYPE_CHECKING:
    from torch import Tensor

Part = TypeVar("Part")
PATIENCE = timedelta(days=7)  # the processes are watched from outside: one that works long is not taken for a dead one


class PeerLost(EditCliError):
    """Another process of the run has ended; what it died of is told by itself, or by whoever started it."""

    exit_code = 1


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one run. rank: the number of this one. size: how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes, prints and decides."""
        return self.rank == 0

    def share(self, items: Sequence[Part]) -> list[Part]:
        """This process's part: every `size`-th item."""
        return list(items[self.rank :: self.size])

    def gather(self, mine: Sequence[Part]) -> list[Part]:
        """The parts of all processes, each the result of `share`, as the whole in its order.

        Tensors in it must be in host memory.
        """
        if self.size == 1:
            return list(mine)
        from accelerate.utils import gather_object

        parts = _together(lambda: gather_object([[_alone(part) for part in mine]]))
        return [parts[index % self.size][index // self.size] for index in range(sum(map(len, parts)))]

    def merge(self, mine: Iterator[Part], total: int) -> Iterator[Part]:
        """What all processes make of their shares of `total` items, one item of each at a time, in the order of the
        whole.
        """
        for _ in range(0, total, self.size):
            yield from self.gather(list(islice(mine, 1)))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, on the device of this one's."""
        if self.size == 1:
            return tensor
        from accelerate import PartialState
        from accelerate.utils import reduce

        return _together(lambda: reduce(tensor.to(PartialState().device), reduction="sum")).to(tensor.device)

    def collect(self, rows: Tensor) -> Tensor:
        """The rows of all processes, of the first one first, on the device of this one's; each may have another
        number of them.
        """
        if self.size == 1:
            return rows
        import torch
        from accelerate import PartialState
        from accelerate.utils import gather

        counts = self.gather([len(rows)])
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        every = _together(lambda: gather(padded.to(PartialState().device))).to(rows.device)
        parts = every.unflatten(0, (self.size, max(counts)))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def broadcast(self, value: Part) -> Part:
        """What the main process has for `value`."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return _together(lambda: broadcast_object_list([value]))[0]


SINGLE = ProcessGroup()


def join() -> ProcessGroup:
    """The process group for which this process was started (by `processes=N`, torchrun or accelerate launch),
    connected; else SINGLE.
    """
    if alone():
        return SINGLE
    import torch
    from accelerate import PartialState
    from accelerate.utils import patch_environment

    with patch_environment(accelerate_use_deepspeed="false"):  # it joins those that are connected already
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    return ProcessGroup(state.process_index, state.num_processes)


def alone() -> bool:
    """Whether this process was started as the only one of its run."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def follows() -> bool:
    """Whether this process is one of several and not the main one: then it prints nothing that the main one prints
    too.
    """
    return int(os.environ.get("RANK", "0")) > 0


def _alone(part: Any) -> Any:
    """The part with tensors of their own memory: a row would be sent with the whole matrix that it is a row of."""
    from torch import Tensor

    if isinstance(part, Tensor):
        return part.clone()
    return tuple(map(_alone, part)) if type(part) is tuple else part


def _together(exchange: Callable[[], Any]) -> Any:
    try:
        return exchange()
    except RuntimeError as error:  # what torch.distributed raises when a connection breaks
        raise PeerLost(f"another process of this run has ended ({str(error).splitlines()[0][:100]})") from error
