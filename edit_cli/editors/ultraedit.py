"""UltraEdit (Gu et al., 2025): one backward pass, a running normalisation and a ridge regression; no subject, no
statistics.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edit_cli.editors.base import Editor
from edit_cli.editors.solver import ScaledIdentity, solve
from edit_cli.edits import Edit, WeightDelta
from edit_cli.errors import UsageError
from edit_cli.lm.hooks import exact, on_input, on_output
from edit_cli.lm.layout import is_projection, widths
from edit_cli.lm.model import LM
from edit_cli.lm.tokens import Row, pad_right
from edit_cli.requests import EditRequest
from edit_cli.tensorfiles import Size, fitted, size


@dataclass
class RunningMoments:
    """Mean and standard deviation of everything seen in all turns: `count`, `mean` (w,), summed squares `squares`
    (w,), float64.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def nothing(cls, width: int, device: torch.device) -> RunningMoments:
        zeros = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(0, zeros, zeros.clone())

    def update(self, rows: Tensor) -> None:
        """Take in rows (c, w). As released, a chunk counts with c times its sample variance."""
        new = len(rows)
        total, gap = self.count + new, rows.mean(0) - self.mean
        spread = rows.var(0) if new > 1 else torch.zeros_like(gap)
        self.mean = self.mean + new / total * gap
        self.squares = self.squares + new * spread + self.count * new / total * gap**2
        self.count = total

    def normalised(self, rows: Tensor) -> Tensor:
        deviation = (self.squares / (self.count - 1)).sqrt()
        return (rows - self.mean) / (deviation + torch.finfo(torch.float32).eps)


@dataclass(kw_only=True)
class UltraEdit(Editor):
    """ΔWᵀ = (XᵀX + I)⁻¹ Xᵀ V over the target tokens of a turn, with v = −η ‖x̂‖² ĝ.

    x: what enters a module where a target token is predicted; g: the loss's gradient at its output; x̂, ĝ: both
    normalised by running moments over all turns so far, shared by modules of equal shape.

    modules: "name:layers", a name in a block and one layer or a range, such as "mlp.up_proj:18-24"; "mlp_out" is the
    MLP's output projection, whatever the family calls it.
    lr: η. chunk: facts in a forward and backward pass, whose mean loss is differentiated.
    """

    mass_editor = True

    modules: list[str]
    lr: float = 1.0e-6
    chunk: int = 10
    _moments: dict[str, RunningMoments] = field(default_factory=dict, init=False, repr=False)

    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> WeightDelta:
        """One update a module; the moments after this turn are left in its memory."""
        names = self._names(lm)
        rows = lm.head.encode([(request.text, request.target_new) for request in requests])
        with lm.monitor.phase("train"), lm.monitor.task("gradients", len(rows)) as advance:
            seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
            for first in range(0, len(rows), self.chunk):
                found = _inputs_and_gradients(lm, rows[first : first + self.chunk], names)
                for name in names:
                    seen[name].append(found[name])
                advance(len(rows[first : first + self.chunk]))
        with lm.monitor.phase("solve"):
            moments = self._after(lm, seen)
            delta = WeightDelta(info={"tokens": sum(len(row.target) for row in rows)})
            for name in names:
                inputs, gradients = (torch.cat(parts) for parts in zip(*seen[name], strict=True))
                values = self._values(inputs, gradients, moments[_shape(lm, name)])
                identity = ScaledIdentity(inputs.shape[1], inputs.device)
                update = solve(values.T.to(exact(inputs)), inputs.T, identity, 1.0)
                delta.updates[f"{name}.weight"] = update
        for shape, kept in moments.items():
            delta.memory[f"mean.{shape}"], delta.memory[f"squares.{shape}"] = kept.mean, kept.squares
            delta.memory[f"count.{shape}"] = torch.tensor(kept.count)
        self._moments = moments
        return delta.compact(lm)

    def _values(self, inputs: Tensor, gradients: Tensor, moments: RunningMoments) -> Tensor:
        normal = moments.normalised(torch.cat([inputs, gradients], dim=1).double())
        direction, slope = normal.split([inputs.shape[1], gradients.shape[1]], dim=1)
        return -self.lr * direction.square().sum(1, keepdim=True) * slope

    def _after(self, lm: LM, seen: dict[str, list[tuple[Tensor, Tensor]]]) -> dict[str, RunningMoments]:
        """The moments with this turn taken in, by shape; chunk by chunk, and in each chunk module by module, as
        released.
        """
        moments = {}
        for name in seen:
            shape, width = _shape(lm, name), sum(widths(lm.module(name)))
            before = self._moments.get(shape)
            moments[shape] = RunningMoments(**vars(before)) if before else RunningMoments.nothing(width, lm.device)
        for chunk in zip(*seen.values(), strict=True):
            for name, (inputs, gradients) in zip(seen, chunk, strict=True):
                moments[_shape(lm, name)].update(torch.cat([inputs, gradients], dim=1).double())
        if any(kept.count < 2 for kept in moments.values()):
            raise UsageError(
                "ultraedit normalises over target tokens and modules of equal shape, and one alone has no deviation:"
                " edit more facts at once (protocol.batch_size)"
            )
        return moments

    def _names(self, lm: LM) -> list[str]:
        if not self.modules:
            raise UsageError("method.modules is empty: give names and layers, such as method.modules=[mlp_out:3-5]")
        names = []
        for entry in self.modules:
            match = re.fullmatch(r"(.+):(\d+)(?:-(\d+))?", entry)
            if not match:
                raise UsageError(
                    f"method.modules: {entry!r} is no name and layers, such as mlp_out:3 or mlp.up_proj:18-24"
                )
            part, first, last = match.groups()
            for layer in range(int(first), int(last or first) + 1):
                name = lm.layout.mlp_out(layer) if part == "mlp_out" else f"{lm.layout.block(layer)}.{part}"
                try:
                    fits = is_projection(lm.module(name))
                except AttributeError:
                    fits = False
                if not fits:
                    raise UsageError(f"method.modules: {entry!r} names no Linear or Conv1D layer of {lm.name}: {name}")
                names.append(name)
        return list(dict.fromkeys(names))

    def recall(self, lm: LM, edit: Edit) -> None:
        """The moments as they were after `edit`."""
        memory = getattr(edit, "memory", {})
        known: dict[str, Size] = {}
        for shape in {name.partition(".")[2] for name in memory if re.fullmatch(r"\w+\.\d+x\d+", name)}:
            width = sum(map(int, shape.split("x")))
            known |= {f"mean.{shape}": size(width), f"squares.{shape}": size(width), f"count.{shape}": Size((), True)}
        fitted(memory, known, "an earlier edit", "make it again")
        for name in memory:
            kind, _, shape = name.partition(".")
            if kind == "count":
                parts = (memory[f"{part}.{shape}"].to(lm.device) for part in ("mean", "squares"))
                self._moments[shape] = RunningMoments(int(memory[name]), *parts)

    def reset(self) -> None:
        self._moments = {}


def _shape(lm: LM, name: str) -> str:
    return "x".join(map(str, widths(lm.module(name))))


def _inputs_and_gradients(lm: LM, rows: Sequence[Row], names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: (x (t, d_in), g (t, d_out))} at the positions that predict the rows' target tokens, float32.

    g is the gradient of the mean cross-entropy over these tokens at the module's output.
    """
    ids, mask = pad_right([row.ids[:-1] for row in rows], lm.head.pad, lm.device)
    at = [(r, column) for r, row in enumerate(rows) for column in range(row.start - 1, len(row.ids) - 1)]
    where, columns = torch.tensor(at, device=lm.device).T
    labels = torch.tensor([token for row in rows for token in row.target], device=lm.device)
    inputs: dict[str, Tensor] = {}
    probes: dict[str, Tensor] = {}

    def add_probe(name: str, hidden: Tensor) -> Tensor:
        probes[name] = torch.zeros_like(hidden, requires_grad=True)
        return hidden + probes[name]

    def read(states: Tensor) -> Tensor:
        """At the positions; modules may lie on several devices."""
        return exact(states.detach()[where.to(states.device), columns.to(states.device)]).to(lm.device)

    def keep(name: str, hidden: Tensor) -> None:
        inputs[name] = read(hidden)

    with ExitStack() as stack:
        for name in names:
            module = lm.module(name)
            stack.enter_context(on_input(module, lambda hidden, name=name: keep(name, hidden), len(rows)))
            stack.enter_context(on_output(module, lambda hidden, name=name: add_probe(name, hidden), len(rows)))
        logits = lm.head.logits_at(ids, mask, where, columns)
    loss = torch.nn.functional.cross_entropy(logits, labels.to(logits.device))
    gradients = torch.autograd.grad(loss, [probes[name] for name in names])
    return {name: (inputs[name], read(gradient)) for name, gradient in zip(names, gradients, strict=True)}
