"""UltraEdit (Gu et al., 2025): one backward pass, a running normalization and a ridge regression; no subject, no
second moments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from edit_cli.config.schema import Count, Mark, Natural, Positive
from edit_cli.editors.base import Context, Editor, EditorConfig
from edit_cli.editors.locate.solver import ScaledIdentity, solve
from edit_cli.editors.passes import in_batches
from edit_cli.edits.edit import Edit, WeightDelta
from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.files.tensors import Size, fitted, size
from edit_cli.lm.hooks import exact, on_input, on_output
from edit_cli.lm.layout import is_projection, widths
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import Row, pad_right
from edit_cli.requests import EditRequest


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

    def normalized(self, rows: Tensor) -> Tensor:
        deviation = (self.squares / (self.count - 1)).sqrt()
        return (rows - self.mean) / (deviation + torch.finfo(torch.float32).eps)


@dataclass(frozen=True, kw_only=True)
class UltraEditConfig(EditorConfig):
    """No subject, no second moments, no training."""

    modules: Annotated[list[str], Mark.DISTINCT]
    """Names in a block with one layer or a range, such as mlp.up_proj:18-24; mlp_out is the MLP's output projection,
    whatever the family calls it."""
    lr: Positive = 1.0e-6
    """η."""
    chunk: Count = 10
    """Facts in one forward and backward pass, whose mean loss is differentiated."""
    begin_with: Natural = 20
    """Facts that the moments begin with. Few say nothing: two tokens are always as far from their mean as they deviate.
    What a first turn lacks of so many is taken from the training split: prompts that the run neither edits nor asks
    about, each with another's answer. As in StableEdit (2026), but that nothing of it is written."""


class UltraEdit(Editor[UltraEditConfig]):
    """ΔWᵀ = (XᵀX + I)⁻¹ Xᵀ V over the target tokens of a turn, with v = −η ‖x̂‖² ĝ.

    x: what enters a module where a target token is predicted; g: the loss's gradient at its output; x̂, ĝ: both
    normalized by running moments over all turns so far, shared by modules of equal shape.
    """

    Config = UltraEditConfig
    mass_editor = True

    def __init__(self, config: UltraEditConfig, lm: LM, context: Context | None = None) -> None:
        super().__init__(config, lm, context)
        self.moments: dict[str, RunningMoments] = {}

    def edit(self, requests: Sequence[EditRequest]) -> WeightDelta:
        """One update a module; the moments after this turn are left in its memory."""
        names = self._names()
        rows = self.lm.head.encode([(request.text, request.target_new) for request in requests])
        before = self.moments or self._warmed(names, len(rows))
        with self.lm.monitor.phase("train"):
            seen = _seen(self.lm, rows, names, self.config.chunk)
        with self.lm.monitor.phase("solve"):
            moments = _after(self.lm, before, seen)
            if any(kept.count < 2 for kept in moments.values()):
                raise UsageError(
                    "ultraedit normalizes over target tokens and modules of equal shape, and one alone has no"
                    " deviation: edit more facts at once (protocol.batch_size) or read others (method.begin_with=20)"
                )
            delta = WeightDelta(info={"tokens": sum(len(row.target) for row in rows)})
            for name in names:
                inputs, gradients = (torch.cat(parts) for parts in zip(*seen[name], strict=True))
                values = self._values(inputs, gradients, moments[_shape(self.lm, name)])
                identity = ScaledIdentity(inputs.shape[1], inputs.device)
                update = solve(values.T.to(exact(inputs)), inputs.T, identity, 1.0)
                delta.updates[f"{name}.weight"] = update
        for shape, kept in moments.items():
            delta.memory[f"mean.{shape}"], delta.memory[f"squares.{shape}"] = kept.mean, kept.squares
            delta.memory[f"count.{shape}"] = torch.tensor(kept.count)
        delta = delta.compact(self.lm)
        self.remember(delta)
        return delta

    def _values(self, inputs: Tensor, gradients: Tensor, moments: RunningMoments) -> Tensor:
        normal = moments.normalized(torch.cat([inputs, gradients], dim=1).double())
        direction, slope = normal.split([inputs.shape[1], gradients.shape[1]], dim=1)
        return -self.config.lr * direction.square().sum(1, keepdim=True) * slope

    def _warmed(self, names: Sequence[str], facts: int) -> dict[str, RunningMoments]:
        """The moments that a first turn of so many facts goes on from, of the unedited model; none if it has enough.

        They are read in passes of as many facts as the turn's, by which a gradient is divided.
        """
        lacking, chunk = self.config.begin_with - facts, min(self.config.chunk, facts)
        if lacking <= 0:
            return {}

        def read() -> dict[str, RunningMoments]:
            with self.lm.monitor.phase("statistics"), self.lm.pristine():
                return _after(self.lm, {}, _seen(self.lm, self._others(facts, lacking), names, chunk))

        return self.context.once(("first moments", lacking, chunk), read)

    def _others(self, facts: int, count: int) -> list[Any]:
        """Rows of prompts that are not edited, each with the answer of the next one.

        Raises:
            UsageError: there are none.
        """
        able: list[tuple[str, str]] = []
        for pair in self.context.examples("train") if self.context.examples else []:
            if len(able) == count:
                break
            with suppress(RejectedRequest):
                self.lm.head.encode([pair])
                able.append(pair)
        if not able:
            raise UsageError(
                f"ultraedit normalizes by what facts have shown: a first turn of {facts} shows too little, and these"
                f" data have no training records to begin with: edit {self.config.begin_with} at once"
                " (protocol.batch_size) or go without (method.begin_with=0)"
            )
        prompts, answers = zip(*able, strict=True)
        return self.lm.head.encode(list(zip(prompts, (*answers[1:], answers[0]), strict=True)))

    def _names(self) -> list[str]:
        if not self.config.modules:
            raise UsageError("method.modules is empty: give names and layers, such as method.modules=[mlp_out:3-5]")
        names = []
        for entry in self.config.modules:
            match = re.fullmatch(r"(.+):(\d+)(?:-(\d+))?", entry)
            if not match:
                raise UsageError(
                    f"method.modules: {entry!r} is no name and layers, such as mlp_out:3 or mlp.up_proj:18-24"
                )
            part, first, last = match.groups()
            for layer in range(int(first), int(last or first) + 1):
                name = self.lm.layout.mlp_out(layer) if part == "mlp_out" else f"{self.lm.layout.block(layer)}.{part}"
                try:
                    fits = is_projection(self.lm.module(name))
                except AttributeError:
                    fits = False
                if not fits:
                    raise UsageError(
                        f"method.modules: {entry!r} names no Linear or Conv1D layer of {self.lm.name}: {name}"
                    )
                names.append(name)
        return list(dict.fromkeys(names))

    def recall(self, edit: Edit) -> None:
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
                parts = (memory[f"{part}.{shape}"].to(self.lm.device) for part in ("mean", "squares"))
                self.moments[shape] = RunningMoments(int(memory[name]), *parts)


def _seen(lm: LM, rows: Sequence[Row], names: Sequence[str], chunk: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """What `_inputs_and_gradients` finds of `chunk` rows at a time."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    with lm.monitor.task("gradients", len(rows)) as advance:
        for part in in_batches(rows, chunk):
            found = _inputs_and_gradients(lm, rows[part], names)
            for name in names:
                seen[name].append(found[name])
            advance(len(rows[part]))
    return seen


def _after(
    lm: LM, before: Mapping[str, RunningMoments], seen: Mapping[str, Sequence[tuple[Tensor, Tensor]]]
) -> dict[str, RunningMoments]:
    """The moments with what was seen taken in, by shape; chunk by chunk, and in each chunk module by module, as
    released.
    """
    moments = {}
    for name in seen:
        shape, width = _shape(lm, name), sum(widths(lm.module(name)))
        moments[shape] = (
            RunningMoments(**vars(before[shape])) if shape in before else RunningMoments.nothing(width, lm.device)
        )
    for chunk in zip(*seen.values(), strict=True):
        for name, (inputs, gradients) in zip(seen, chunk, strict=True):
            moments[_shape(lm, name)].update(torch.cat([inputs, gradients], dim=1).double())
    return moments


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
            stack.enter_context(on_input(module, partial(keep, name), len(rows)))
            stack.enter_context(on_output(module, partial(add_probe, name), len(rows)))
        logits = lm.head.logits_at(ids, mask, where, columns)
    loss = torch.nn.functional.cross_entropy(logits, labels.to(logits.device))
    gradients = torch.autograd.grad(loss, [probes[name] for name in names])
    return {name: (inputs[name], read(gradient)) for name, gradient in zip(names, gradients, strict=True)}
