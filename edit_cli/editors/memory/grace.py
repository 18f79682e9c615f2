"""GRACE (Hartvigsen et al., 2023): a codebook beside one layer; prompts that fall near a key get the key's value for
output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor, nn

from edit_cli.editors.locate.context_prefixes import ContextConfig, sample_contexts
from edit_cli.editors.memory.base import Entries, MemoryLayer, MemoryPatch, in_turn, module_of, nearest
from edit_cli.editors.old import Editor
from edit_cli.editors.passes import Passes, at_prompt_end, passes, row_losses
from edit_cli.errors import UsageError
from edit_cli.files.tensors import Size, size
from edit_cli.lm.layout import widths
from edit_cli.lm.model import LM
from edit_cli.lm.prompt_position import Focus
from edit_cli.lm.reading import Tap, read
from edit_cli.lm.tokenization import Row
from edit_cli.lm.weights.access import Undo
from edit_cli.requests import EditRequest

SLACK = 1e-4  # relative: a prompt's state differs in its last digits with what else is in the batch
GAP = 1e-5  # kept between two balls that a split sets apart


class GraceLayer(MemoryLayer):
    """The codebook: keys (n, d_in), values (n, d_out), radii (n, 1) and the answers that the values stand for (token
    ids).

    radius: of new keys.
    """

    def __init__(
        self,
        original: nn.Module,
        lm: LM,
        module: str,
        radius: float,
        replace: str = "last",
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
        inside, outside = self.rows(states), self.rows(output)
        if inside is None or not len(self.keys):
            return output
        chosen = self.decided(self.watch.focus, lambda: self.lookup(at_prompt_end(inside, self.watch.focus)))
        where = replaced(self.watch.focus, self.replace, self.include_query) & (chosen >= 0)[:, None]
        if not bool(where.any()):
            return output
        values = self.values.all[chosen.clamp_min(0)].to(output)
        return torch.where(where[..., None].to(output.device), values[:, None], outside).view_as(output)

    def lookup(self, queries: Tensor) -> Tensor:
        """(r,) index of the nearest key where the query (r, d_in) lies within its radius, else −1."""
        distance, index = nearest(queries.to(self.keys.all), self.keys.all, self.radii.all[:, 0] > 0)
        return torch.where(distance <= self.radii.all[index, 0] * (1 + SLACK), index, -1)


def replaced(focus: Focus, which: str, include_query: bool) -> Tensor:
    """(rows, tokens): the tokens whose output is replaced in a row that has found a key."""
    columns = torch.arange(focus.first, focus.first + focus.mask.shape[1], device=focus.mask.device)
    ends = focus.ends[:, None]
    if which == "last":
        return columns == ends
    if which == "prompt":
        return focus.mask.bool() & (columns <= ends if include_query else columns < ends)
    return focus.mask.bool()


class GraceContent(TypedDict):
    """What an edit says beside its tensors. answers: token ids, one list a new entry."""

    answers: list[list[int]]
    radius: float
    replace: Literal["last", "prompt", "all"]
    include_query: bool


class GracePatch(MemoryPatch):
    """New entries, the radii of earlier ones that moved, and values of earlier ones that were trained again."""

    layer: ClassVar[type[MemoryLayer]] = GraceLayer
    holds = GraceContent

    @classmethod
    def brings(cls, lm: LM, d_out: int, d_in: int, content: dict[str, Any]) -> dict[str, Size]:
        new = len(content["answers"])
        return {
            "keys": size(new, d_in), "values": size(new, d_out), "radii": size(new, 1),
            "moved": Size(("moved",), index=True), "moved_radii": size("moved", 1),
            "retrained": Size(("again",), index=True), "retrained_values": size("again", d_out),
        }  # fmt: skip

    def begin(self, original: nn.Module, lm: LM) -> GraceLayer:
        return GraceLayer(
            original, lm, self.module, *(self.content[key] for key in ("radius", "replace", "include_query"))
        )


@dataclass(kw_only=True)
class Grace(Editor):
    """General Retrieval Adaptors for Continual Editing.

    layer, module: whose input is the key and whose output is replaced: "mlp_in" or "mlp_out" of the layer, or a name in
    the block.
    radius: ε of a new key, Euclidean. It fits one layer of one model only: `edit-cli calibrate` measures it on records.
    "auto": `spread` times the distance (95 % of cases) by which the first fact's own key moves when sampled texts
    (`context`) stand before its prompt.
    replace: which tokens' output is replaced: "last" of the prompt, "prompt" (those before the last, and the last with
    `include_query`), or "all", the answer included. init: of a value: "cold" (uniform in [0, 1)) or "warm" (the present
    output). lr, steps: Adam on the value; it stops once the loss is below `stop_loss`.
    only_mistakes: a fact that the model already answers gets no entry.
    """

    heads = ("causal", "seq2seq", "classifier")

    layer: int
    module: str = "mlp_in"
    radius: int | float | str = 1.0
    replace: str = "last"
    include_query: bool = False
    init: str = "cold"
    lr: float = 1.0
    steps: int = 100
    stop_loss: float = 0.05
    only_mistakes: bool = True
    seed: int = 0
    spread: float = 1.8
    context: ContextConfig = field(default_factory=lambda: ContextConfig(lengths=[5, 10]))

    @property
    def layers(self) -> list[int]:
        return [self.layer]

    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> GracePatch:
        """Entries for the requests, one after another; a fact that the model answers when its turn comes needs none."""
        self._refuse_wrong_words()
        name = module_of(lm, self.layer, self.module)
        attached = GracePatch.present(lm, name)
        initial = attached.radius if attached else self._radius(lm, name, requests[0])
        with in_turn(lm, requests, lambda request: self._entry(lm, name, initial, request), "values") as patches:
            return joined(patches, GracePatch.present(lm, name))

    def _entry(self, lm: LM, name: str, initial: float, request: EditRequest) -> GracePatch:
        """The entry of one fact, on top of the codebook that is attached; none if the model answers it already."""
        book, fact = Book(GracePatch.present(lm, name), initial), (request.text, request.target_new)
        if not (self.only_mistakes and all(lm.loglikelihood([fact])[0].hits)):
            self._fit(lm, name, book, lm.head.encode([fact])[0])
        return book.patch(lm, name, {"radius": initial, "replace": self.replace, "include_query": self.include_query})

    def _fit(self, lm: LM, name: str, book: Book, row: Row) -> None:
        """Find the row an entry, and fit its value to the row's target."""
        with passes(lm, [row], name, self.layer, end=True) as run:
            entry = book.place(run.queries[0], row.target)
            where = replaced(run.focus, self.replace, self.include_query)[..., None]
            present = book.value(entry)
            value = (self._fresh(run, entry) if present is None else present).requires_grad_()
            optimizer = torch.optim.Adam([value], lr=self.lr)
            for _ in range(self.steps):
                found = run.answers(lambda output: torch.where(where, value.to(output), output))
                loss = row_losses(found, 1)[0]
                if loss.item() < self.stop_loss:
                    break
                (value.grad,) = torch.autograd.grad(loss, [value])
                optimizer.step()
        book.values[entry] = value.detach()

    def _fresh(self, run: Passes, entry: int) -> Tensor:
        """(d_out,): the value of a new entry before training, as `init` says."""
        if self.init == "cold":
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + entry)
            return torch.rand(widths(run.lm.module(run.module))[0], generator=draw).to(run.queries)
        outputs: list[Tensor] = []

        def keep(output: Tensor) -> None:
            outputs.append(at_prompt_end(output, run.focus)[0])

        with torch.no_grad():
            run.answers(keep)
        return outputs[0]

    def _radius(self, lm: LM, name: str, request: EditRequest) -> float:
        if not isinstance(self.radius, str):
            return float(self.radius)
        with lm.monitor.phase("calibrate"):
            prefixes = sample_contexts(lm, self.context).texts
            rows = lm.head.encode([(prefix + request.text, None) for prefix in prefixes])
            keys = read(lm, rows, [len(row.ids) - 1 for row in rows], [Tap(name, "input")])[0].float()
            radius = self.spread * float((keys[1:] - keys[0]).norm(dim=-1).quantile(0.95))
        lm.monitor.note(f"method.radius=auto is {radius:.4g} at {name}")
        return radius

    def require(self, model: str) -> None:
        self._refuse_wrong_words()

    def _refuse_wrong_words(self) -> None:
        if isinstance(self.radius, str) and self.radius != "auto":
            raise UsageError(f"method.radius={self.radius}: give a distance, or auto")
        if not isinstance(self.radius, str) and self.radius <= 0:
            raise UsageError(f"method.radius={self.radius}: give a distance above 0, or auto")
        if self.replace not in ("last", "prompt", "all"):
            raise UsageError(f"method.replace={self.replace}: choose last, prompt or all")
        if self.init not in ("cold", "warm"):
            raise UsageError(f"method.init={self.init}: choose cold or warm")


class Book:
    """A codebook at work: what is attached, and on top of it what this edit adds and moves (publication, Algorithm
    1).
    """

    def __init__(self, attached: GraceLayer | None, radius: float) -> None:
        self.attached, self.initial = attached, radius
        self.earlier = len(attached.keys) if attached else 0
        self.keys: list[Tensor] = []
        self.answers: list[tuple[int, ...]] = []
        self.radii: dict[int, float] = {}  # of new entries, and of earlier ones that moved
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

    def place(self, query: Tensor, answer: tuple[int, ...]) -> int:
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
        parts = [self.attached.keys.all] if self.earlier else []
        keys = (
            torch.cat([*parts, *(key[None] for key in self.keys)])
            if parts or self.keys
            else query.new_zeros(0, len(query))
        )
        if not len(keys):
            return None
        alive = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
        if self.earlier:
            alive[: self.earlier] = self.attached.radii.all[:, 0] > 0
        for entry, radius in self.radii.items():
            alive[entry] = radius > 0
        distance, index = nearest(query[None].to(keys), keys, alive)
        return (float(distance), int(index)) if bool(distance.isfinite()) else None

    def patch(self, lm: LM, name: str, about: dict[str, Any]) -> GracePatch:
        """What was added and moved."""
        new = range(self.earlier, self.earlier + len(self.keys))
        moved = sorted(entry for entry in self.radii if entry < self.earlier)
        again = sorted(entry for entry in self.values if entry < self.earlier)
        d_out, d_in = widths(lm.module(name))

        def column(entries: Sequence[int]) -> Tensor:
            return torch.tensor([self.radii[entry] for entry in entries], device=lm.device).reshape(-1, 1)

        def stacked(rows: list[Tensor], width: int) -> Tensor:
            return torch.stack(rows) if rows else torch.zeros(0, width, device=lm.device)

        tensors = {
            "keys": stacked(self.keys, d_in),
            "values": stacked([self.values[entry] for entry in new], d_out),
            "radii": column(new),
            "moved": torch.tensor(moved, dtype=torch.long, device=lm.device),
            "moved_radii": column(moved),
            "retrained": torch.tensor(again, dtype=torch.long, device=lm.device),
            "retrained_values": stacked([self.values[entry] for entry in again], d_out),
        }
        before = self.attached.digest if self.attached else ""
        return GracePatch(name, before, tensors, {"answers": [list(answer) for answer in self.answers], **about})


def joined(patches: Sequence[GracePatch], layer: GraceLayer) -> GracePatch:
    """One patch for edits that were made on top of each other; `layer` is the codebook with all of them in it."""
    earlier = len(layer.keys) - sum(len(patch.tensors["keys"]) for patch in patches)

    def changed(part: str) -> Tensor:
        """(n,): which of the entries that were there before the first patch."""
        entries = torch.cat([patch.tensors[part] for patch in patches]).unique()
        return entries[entries < earlier]

    moved, retrained = changed("moved"), changed("retrained")
    tensors = {
        "keys": layer.keys.all[earlier:].clone(),
        "values": layer.values.all[earlier:].clone(),
        "radii": layer.radii.all[earlier:].clone(),
        "moved": moved,
        "moved_radii": layer.radii.all[moved],
        "retrained": retrained,
        "retrained_values": layer.values.all[retrained],
    }
    answers = [answer for patch in patches for answer in patch.content["answers"]]
    return GracePatch(patches[0].module, patches[0].before, tensors, {**patches[0].content, "answers": answers})
