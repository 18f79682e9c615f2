"""GRACE (Hartvigsen et al., 2023): a codebook beside one layer; prompts that fall near a key get the key's value for
output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, TypedDict

import torch
from torch import Tensor, nn

from edit_cli.config.schema import Count, NonNegative, Positive
from edit_cli.editors.locate.context_prefixes import ContextConfig, sample_contexts
from edit_cli.editors.memory.base import (
    GAP,
    SLACK,
    Entries,
    MemoryConfig,
    MemoryEditor,
    MemoryLayer,
    MemoryPatch,
    nearest,
)
from edit_cli.editors.passes import Passes, at_prompt_end, passes, row_losses
from edit_cli.files.tensors import Size, size
from edit_cli.lm.layout import widths
from edit_cli.lm.model import LM
from edit_cli.lm.prompt_position import PromptPosition
from edit_cli.lm.reading import HookPoint, read
from edit_cli.lm.tokenization import Row
from edit_cli.lm.weights.access import Undo
from edit_cli.requests import EditRequest

Replace = Literal["last", "prompt", "all"]


class GraceLayer(MemoryLayer):
    """The codebook as it is attached: keys (n, d_in), values (n, d_out), radii (n, 1) and the answers that the values
    stand for (token ids).

    radius: of new keys.
    """

    def __init__(
        self,
        original: nn.Module,
        lm: LM,
        module: str,
        radius: float = 1.0,
        replace: Replace = "last",
        include_query: bool = False,
    ) -> None:
        super().__init__(original, lm, module)
        d_out, d_in = widths(original)
        self.keys, self.values, self.radii = (Entries(width, lm.device) for width in (d_in, d_out, 1))
        self.answers: list[tuple[int, ...]] = []
        self.radius, self.replace, self.include_query = radius, replace, include_query

    def add(self, edit: MemoryPatch) -> Undo:
        new = edit.tensors
        undo = [
            self.keys.append(new["keys"]),
            self.values.append(new["values"]),
            self.radii.append(new["radii"]),
            self.radii.put(new["moved"], new["moved_radii"]),
            self.values.put(new["retrained"], new["retrained_values"]),
        ]
        before = len(self.answers)
        self.answers += [tuple(answer) for answer in edit.content["answers"]]

        def take_back() -> None:
            for step in reversed(undo):
                step()
            del self.answers[before:]

        return take_back

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = self.original(states, *args, **kwargs)
        inside = self.rows(states)
        if inside is None or not len(self.keys):
            return output
        chosen = self.decided(self.position, lambda: self.lookup(at_prompt_end(inside, self.position)))
        where = replaced(self.position, self.replace, self.include_query) & (chosen >= 0)[:, None]
        if not bool(where.any()):
            return output
        values = self.values.all[chosen.clamp_min(0)].to(output)
        plain = output.view(*inside.shape[:2], -1)
        return torch.where(where[..., None].to(output.device), values[:, None], plain).view_as(output)

    def lookup(self, queries: Tensor) -> Tensor:
        """(r,) index of the nearest key where the query (r, d_in) lies within its radius, else −1."""
        distance, index = nearest(queries.to(self.keys.all), self.keys.all, self.radii.all[:, 0] > 0)
        return torch.where(distance <= self.radii.all[index, 0] * (1 + SLACK), index, -1)


def replaced(position: PromptPosition, which: Replace, include_query: bool) -> Tensor:
    """(rows, tokens): the tokens whose output is replaced in a row that has found a key."""
    columns = torch.arange(position.first, position.first + position.mask.shape[1], device=position.mask.device)
    ends = position.ends[:, None]
    if which == "last":
        return columns == ends
    if which == "prompt":
        return position.mask.bool() & (columns <= ends if include_query else columns < ends)
    return position.mask.bool()


class GraceContent(TypedDict):
    """What an edit says beside its tensors. answers: token ids, one list a new entry."""

    answers: list[list[int]]
    radius: float
    replace: Replace
    include_query: bool


class GracePatch(MemoryPatch):
    """New entries, the radii of earlier ones that moved, and values of earlier ones that were trained again."""

    layer: ClassVar[type[MemoryLayer]] = GraceLayer
    settings = ("radius", "replace", "include_query")
    holds = GraceContent
    axes: ClassVar = {"keys": 0, "moved": 0, "retrained": 0}

    @classmethod
    def brings(cls, lm: LM, d_out: int, d_in: int, content: dict[str, Any]) -> dict[str, Size]:
        new = len(content["answers"])
        return {
            "keys": size(new, d_in), "values": size(new, d_out), "radii": size(new, 1),
            "moved": Size(("moved",), index=True), "moved_radii": size("moved", 1),
            "retrained": Size(("again",), index=True), "retrained_values": size("again", d_out),
        }  # fmt: skip

    @classmethod
    def concatenate(cls, patches: Sequence[Self], layer: GraceLayer) -> Self:
        """As any edit's; radii and values are those that the last of them has left."""
        whole = super().concatenate(patches, layer)
        earlier = len(layer.keys) - len(whole.tensors["keys"])
        for which, part, rows in (("moved", "radii", layer.radii.all), ("retrained", "values", layer.values.all)):
            changed = whole.tensors[which].unique()
            changed = changed[changed < earlier]
            whole.tensors |= {part: rows[earlier:].clone(), which: changed, f"{which}_{part}": rows[changed]}
        return whole


@dataclass(frozen=True, kw_only=True)
class GRACEConfig(MemoryConfig):
    """The projection's input at the prompt's last token is the key, its output is what is replaced."""

    radius: Positive | Literal["auto"] = 1.0
    """ε of a new key, Euclidean. It fits one layer of one model only (see `edit-cli calibrate`); auto measures it on
    the first fact behind sampled texts."""
    replace: Replace = "last"
    """Tokens whose output is replaced: the last one of the prompt, those before it (prompt), or all, the answer's
    included."""
    include_query: bool = False
    """Whether replace=prompt also replaces the output of the last token."""
    init: Literal["cold", "warm"] = "cold"
    """What a value is before training: uniform in [0, 1) (cold), or the present output (warm)."""
    lr: Positive = 1.0
    """Learning rate of Adam on a value."""
    steps: Count = 100
    """Most training steps of a value."""
    stop_loss: NonNegative = 0.05
    """Loss below which a value is trained no further."""
    only_mistakes: bool = True
    """Whether a fact that the model already answers gets no entry."""
    spread: Positive = 1.8
    """radius=auto is so many times the distance (95 % of cases) by which sampled texts before a prompt move its key."""
    context: ContextConfig = field(default_factory=lambda: ContextConfig(lengths=[5, 10]))
    """Texts by which radius=auto is measured."""


class GRACE(MemoryEditor[GRACEConfig]):
    """General Retrieval Adaptors for Continual Editing."""

    Config = GRACEConfig
    Patch = GracePatch

    def edit(self, requests: Sequence[EditRequest]) -> GracePatch:
        """Entries for the requests, one after another; a fact that the model answers when its turn comes needs none."""
        attached = GracePatch.present(self.lm, self.module)
        radius = attached.radius if attached else self._radius(requests[0])
        return self.in_turn(requests, lambda request: self._entry(radius, request), "values")

    def _entry(self, radius: float, request: EditRequest) -> GracePatch:
        """The entry of one fact, on top of the codebook that is attached; none if the model answers it already."""
        config, fact = self.config, (request.text, request.target_new)
        settings = {"radius": radius, "replace": config.replace, "include_query": config.include_query}
        book = Codebook(self.memory(**settings), radius)
        if not (config.only_mistakes and all(self.lm.loglikelihood([fact])[0].hits)):
            self._fit(book, self.lm.head.encode([fact])[0])
        return GracePatch(self.module, book.attached.digest, *book.added(settings))

    def _fit(self, book: Codebook, row: Row) -> None:
        """Find the row an entry, and fit its value to the row's target."""
        config = self.config
        with passes(self.lm, [row], self.module, self.layer, end=True) as run:
            entry = book.add_key(run.queries[0], row.target)
            where = replaced(run.position, config.replace, config.include_query)[..., None]
            present = book.value(entry)
            value = (self._initial(run, entry) if present is None else present).requires_grad_()
            optimizer = torch.optim.Adam([value], lr=config.lr)
            for _ in range(config.steps):
                found = run.answers(lambda output: torch.where(where, value.to(output), output))
                loss = row_losses(found, 1)[0]
                if loss.item() < config.stop_loss:
                    break
                (value.grad,) = torch.autograd.grad(loss, [value])
                optimizer.step()
        book.values[entry] = value.detach()

    def _initial(self, run: Passes, entry: int) -> Tensor:
        """(d_out,): the value of a new entry before training, as `init` says."""
        if self.config.init == "cold":
            draw = torch.Generator().manual_seed(self.config.seed * 1_000_003 + entry)
            return torch.rand(widths(self.lm.module(self.module))[0], generator=draw).to(run.queries)
        outputs: list[Tensor] = []

        def keep(output: Tensor) -> None:
            outputs.append(at_prompt_end(output, run.position)[0])

        with torch.no_grad():
            run.answers(keep)
        return outputs[0]

    def _radius(self, request: EditRequest) -> float:
        """ε, measured on the request where it is to be."""
        lm, radius = self.lm, self.config.radius
        if not isinstance(radius, str):
            return radius
        with lm.monitor.phase("calibrate"):
            prefixes = sample_contexts(lm, self.config.context).texts
            rows = lm.head.encode([(request.in_context(prefix), None) for prefix in prefixes])
            keys = read(lm, rows, [len(row.ids) - 1 for row in rows], [HookPoint(self.module, "input")])[0].float()
            radius = self.config.spread * float((keys[1:] - keys[0]).norm(dim=-1).quantile(0.95))
        lm.monitor.note(f"method.radius=auto is {radius:.4g} at {self.module}")
        return radius


class Codebook:
    """What is attached, and on top of it what this edit adds and changes (publication, Algorithm 1).

    initial: ε of a new key. keys, answers: of new entries. radii, values: of new entries, and of earlier ones that
    changed, by number.
    """

    def __init__(self, attached: GraceLayer, radius: float) -> None:
        self.attached, self.initial = attached, radius
        self.earlier = len(attached.keys)
        self.keys: list[Tensor] = []
        self.answers: list[tuple[int, ...]] = []
        self.radii: dict[int, float] = {}
        self.values: dict[int, Tensor] = {}

    def radius(self, entry: int) -> float:
        return self.radii[entry] if entry in self.radii else float(self.attached.radii.all[entry, 0])

    def answer(self, entry: int) -> tuple[int, ...]:
        return self.answers[entry - self.earlier] if entry >= self.earlier else self.attached.answers[entry]

    def value(self, entry: int) -> Tensor | None:
        """A copy of the entry's present value; a new one has none."""
        if entry in self.values:
            return self.values[entry].clone()
        return self.attached.values.all[entry].clone() if entry < self.earlier else None

    def add_key(self, query: Tensor, answer: tuple[int, ...]) -> int:
        """The entry for a query (d_in,): a new key, or an old one of the same answer whose radius grows to hold it.

        A key of another answer is split from the new one half-way. One that lies at the very same place gives way: two
        answers to one prompt are a correction.
        """
        found = self._nearest(query)
        if found is None:
            return self._new(query, answer, self.initial)
        distance, entry = found
        if distance > self.initial + self.radius(entry):
            return self._new(query, answer, self.initial)
        if self.answer(entry) == answer:
            self.radii[entry] = max(self.radius(entry), distance)
            return entry
        if distance <= SLACK * float(query.norm()):
            held, self.radii[entry] = max(self.radius(entry), distance), -1.0
            return self._new(query, answer, held)
        self.radii[entry] = min(self.radius(entry), distance / 2 - GAP)
        return self._new(query, answer, min(self.initial, distance / 2))

    def _new(self, query: Tensor, answer: tuple[int, ...], radius: float) -> int:
        entry = self.earlier + len(self.keys)
        self.keys.append(query)
        self.answers.append(answer)
        self.radii[entry] = radius
        return entry

    def _nearest(self, query: Tensor) -> tuple[float, int] | None:
        """Distance and number of the nearest key that has not given way."""
        keys = torch.cat([self.attached.keys.all, *(key[None].to(self.attached.keys.all) for key in self.keys)])
        if not len(keys):
            return None
        alive = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
        alive[: self.earlier] = self.attached.radii.all[:, 0] > 0
        for entry, radius in self.radii.items():
            alive[entry] = radius > 0
        distance, index = nearest(query[None].to(keys), keys, alive)
        return (float(distance), int(index)) if bool(distance.isfinite()) else None

    def added(self, settings: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, content) of an edit that brings what was added and changed."""
        new = range(self.earlier, self.earlier + len(self.keys))
        moved = sorted(entry for entry in self.radii if entry < self.earlier)
        again = sorted(entry for entry in self.values if entry < self.earlier)
        none = {part: getattr(self.attached, part).all[:0] for part in ("keys", "values")}  # (0, width)

        def index(entries: Sequence[int]) -> Tensor:
            return torch.tensor(entries, dtype=torch.long, device=none["keys"].device)

        def radii(entries: Sequence[int]) -> Tensor:
            return torch.tensor([self.radii[entry] for entry in entries], device=none["keys"].device).reshape(-1, 1)

        def rows(part: str, rows: list[Tensor]) -> Tensor:
            return torch.stack(rows) if rows else none[part].clone()

        tensors = {
            "keys": rows("keys", self.keys),
            "values": rows("values", [self.values[entry] for entry in new]),
            "radii": radii(new),
            "moved": index(moved),
            "moved_radii": radii(moved),
            "retrained": index(again),
            "retrained_values": rows("values", [self.values[entry] for entry in again]),
        }
        return tensors, {"answers": [list(answer) for answer in self.answers], **settings}
