"""Networks that make a better update of the factors of a gradient: what MEND and MALMEN share (section 3.2 of the
first).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from edit_cli.distributed import SINGLE, ProcessGroup
from edit_cli.editors.meta.factored_gradients import Gradient
from edit_cli.errors import UsageError

Part = Literal["both", "inputs", "outputs", "smaller"]  # of gradient factors [u; δ]
CHUNK = 4096  # rows that are looked at together in float64


class Normalizer(nn.Module):
    """Running mean and deviation of every feature, over all rows that went through it in training; saved with the
    network.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        # of the distances from the mean, summed
        self.register_buffer("squares", torch.zeros(width, dtype=torch.float64))

    @torch.no_grad()
    def take_in(self, rows: Tensor, process_group: ProcessGroup) -> None:
        """Rows (n, width) of every process (parallel form of Welford's sums)."""
        sums = sum((_sums(part.to(self.mean)) for part in rows.split(CHUNK)), torch.zeros_like(self.count))
        n, total, squared = process_group.sum(sums).split([1, rows.shape[1], rows.shape[1]])
        mean = total / n
        away, both = mean - self.mean, self.count + n
        self.squares += (squared - n * mean.square()).clamp_min(0) + away.square() * self.count * n / both
        self.mean += away * n / both
        self.count += n[0]

    def forward(self, rows: Tensor) -> Tensor:
        if self.count == 0:
            raise UsageError("this editor has seen no gradients yet: train it first")
        deviation = (self.squares / (self.count - 1).clamp_min(1)).sqrt()
        return (rows - self.mean.to(rows)) / (deviation.to(rows) + 1e-7)


def _sums(rows: Tensor) -> Tensor:
    return torch.cat([rows.new_full((1,), len(rows)), rows.sum(0), rows.square().sum(0)])


class LowRankLayer(nn.Module):
    """z + max(0, s ⊙ (U V z + b) + o), with a scale s and an offset o for each of `modules`; the identity at first (U =
    0).

    outside: s ⊙ max(0, U V z + b) + o instead, as in MALMEN. spread: standard deviation of V. xavier: no identity, for
    ablations.
    """

    def __init__(
        self, width: int, rank: int, modules: int, spread: float, outside: bool = False, xavier: bool = False
    ) -> None:
        super().__init__()
        rank = min(rank, width)
        self.down = nn.Parameter(torch.randn(rank, width) * spread)
        self.up = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(modules, width))
        self.offset = nn.Parameter(torch.zeros(modules, width))
        self.outside, self.residual = outside, not xavier
        if xavier:
            nn.init.xavier_uniform_(self.up, gain=nn.init.calculate_gain("relu"))
            nn.init.xavier_uniform_(self.down)

    def forward(self, z: Tensor, which: Tensor) -> Tensor:
        """z (n, width), which (n,) the module of each row."""
        inner = z @ self.down.T @ self.up.T + self.bias
        scale, offset = self.scale[which], self.offset[which]
        # clamp and not relu: at 0, where everything starts, its gradient is 1
        inner = scale * inner.clamp(min=0) + offset if self.outside else (scale * inner + offset).clamp(min=0)
        return inner + z if self.residual else inner


class Transform(nn.Module):
    """What becomes of gradient factors [u; δ] of one shape: normalized, then two low-rank layers on all of it or on
    a part.
    """

    def __init__(
        self, d_in: int, d_out: int, modules: int, rank: int, spread: float, part: Part, normalize: bool,
        outside: bool = False, xavier: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if part == "smaller":
            part = "inputs" if d_in <= d_out else "outputs"
        self.cut = {"both": slice(0, d_in + d_out), "inputs": slice(0, d_in), "outputs": slice(d_in, d_in + d_out)}[
            part
        ]
        width = self.cut.stop - self.cut.start
        self.normalizer = Normalizer(d_in + d_out) if normalize else None
        self.layers = nn.ModuleList(LowRankLayer(width, rank, modules, spread, outside, xavier) for _ in range(2))

    @property
    def device(self) -> torch.device:
        return next(self.layers.parameters()).device

    def take_in(self, rows: Tensor, process_group: ProcessGroup) -> None:
        if self.normalizer is not None:
            self.normalizer.take_in(rows, process_group)

    def forward(self, rows: Tensor, which: Tensor) -> Tensor:
        rows = rows if self.normalizer is None else self.normalizer(rows)
        z = rows[:, self.cut]
        for layer in self.layers:
            z = layer(z, which)
        return torch.cat([rows[:, : self.cut.start], z, rows[:, self.cut.stop :]], -1)


class Hypernetwork(nn.Module):
    """One `Transform` for all modules of a shape, or (shared false) for each.

    shapes: (d_in, d_out) of each module, in their order.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], rank: int, spread: float, shared: bool = True, part: Part = "both",
        normalize: bool = True,
        outside: bool = False, xavier: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.shapes = list(shapes)
        self.members: dict[str, list[int]] = {}
        for number, (d_in, d_out) in enumerate(shapes):
            self.members.setdefault(f"{d_in}x{d_out}" if shared else f"{number}_{d_in}x{d_out}", []).append(number)
        self.transforms = nn.ModuleDict(
            {
                key: Transform(*shapes[members[0]], len(members), rank, spread, part, normalize, outside, xavier)
                for key, members in self.members.items()
            }
        )

    def take_in(self, rows: Sequence[Tensor], process_group: ProcessGroup = SINGLE) -> None:
        """Train the statistics alone, on the factors [u; δ] (n, d_in + d_out) of each module."""
        for key, members in self.members.items():
            self.transform(key).take_in(torch.cat([rows[number] for number in members]), process_group)

    def transform(self, key: str) -> Transform:
        return cast(Transform, self.transforms[key])

    def improved(self, number: int, rows: Tensor) -> Tensor:
        """[ũ; δ̃] of factors [u; δ] (n, d_in + d_out) of one module."""
        key, members = next((key, members) for key, members in self.members.items() if number in members)
        return self.transform(key)(rows, torch.full((len(rows),), members.index(number), device=rows.device))

    def forward(
        self, gradients: Sequence[Gradient], process_group: ProcessGroup = SINGLE
    ) -> list[tuple[Tensor, Tensor]]:
        """(ũ, δ̃) of each module, as (rows, tokens, d_in) and (rows, tokens, d_out), zero where the gradient is.

        Trains its statistics.
        """
        better: list[tuple[Tensor, Tensor]] = [None] * len(gradients)  # type: ignore[list-item]
        for key, members in self.members.items():
            transform, d_in = self.transform(key), self.shapes[members[0]][0]
            kept = [gradients[number].kept for number in members]
            rows = [
                torch.cat([gradients[n].inputs[k], gradients[n].outputs[k]], -1)
                for n, k in zip(members, kept, strict=True)
            ]
            device = transform.device
            together = torch.cat([part.to(device) for part in rows])
            which = torch.repeat_interleave(
                torch.arange(len(members), device=device), torch.tensor([len(part) for part in rows], device=device)
            )
            if self.training:
                transform.take_in(together, process_group)
            parts = transform(together, which).split([len(part) for part in rows])
            for number, mask, part in zip(members, kept, parts, strict=True):
                whole = part.new_zeros(*mask.shape, part.shape[-1])
                whole[mask.to(device)] = part
                better[number] = whole[..., :d_in], whole[..., d_in:]
        return better
