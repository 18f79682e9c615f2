"""What every method is: settings that never change, and an editor that is begun with them on one model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor

from edit_cli.config.schema import Config
from edit_cli.editors.cost import Cost
from edit_cli.edits.edit import Edit
from edit_cli.errors import UsageError
from edit_cli.lm.heads.kinds import NAMES
from edit_cli.lm.layout import Layout
from edit_cli.lm.model import LM
from edit_cli.lm.outline import Outline
from edit_cli.requests import Case, EditRequest

SOLVED, VALUES_KEPT = "solved", "values kept"  # ways in which an edit is made again without some of its facts
# what methods remember, or spare: examples, text, or whichever there is
AUTO, EXAMPLES, CORPUS = "auto", "examples", "corpus"
C = TypeVar("C", bound="EditorConfig")


class Examples(Protocol):
    """What a run neither edits nor asks about."""

    def __call__(self, split: str) -> Sequence[tuple[str, str]]:
        """(prompt, right answer) of a split."""

    def others(self) -> Sequence[Case]:
        """Other records of the run's data set: of its training split, where it has one."""


@dataclass(frozen=True, kw_only=True)
class EditorConfig(Config):
    """Settings of a method: its fields are the keys of `method`."""

    place = "method"


@dataclass
class Context:
    """What a command hands to the editors that it begins.

    examples: records that methods may remember; None where a command has none. train_command: tells what would train
    the editor. kept: what is computed once a model (factorized statistics, sampled prefixes), whichever editor asks
    first.
    """

    examples: Examples | None = None
    train_command: Callable[[], str] | None = None
    kept: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned when it was first called for this key."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]


class Remade(NamedTuple):
    """An edit without some of its facts, and in which way it was made: solved, from what was stored alone, or values
    kept, with passes of the model but without looking for values that were stored.
    """

    edit: Edit
    way: str


class Editor(ABC, Generic[C]):
    """A method at work on one model. What it remembers from edit to edit begins and ends with it.

    Attributes:
        Config: the class of its settings.
        mass_editor: the method is meant for many facts at once (sets the default of `protocol.batch_size`).
        needs_subject: requests without a subject are refused.
        heads: kinds of models that the method can work on: "causal", "seq2seq" (encoder-decoder), "classifier" (of
            texts), "image" (classifiers).
        experts: it works on mixtures of experts, since it writes to no matrix of the model.
        takes_long: why one edit takes far longer than an edit should; `doctor` tries such a method only if it is named.
        looks_back: how many of the latest edits `recall` needs with their weights; 0: what they remember beside those
            is enough.
    """

    Config: ClassVar[type[EditorConfig]]
    mass_editor: ClassVar[bool] = False
    needs_subject: ClassVar[bool] = False
    heads: ClassVar[tuple[str, ...]] = ("causal",)
    experts: ClassVar[bool] = False
    takes_long: ClassVar[str | None] = None
    looks_back: ClassVar[int] = 0

    def __init__(self, config: C, lm: LM, context: Context | None = None) -> None:
        """Begin on a model.

        Raises:
            UsageError: it is of a kind that this method cannot work on, or lacks a layer.
        """
        self.config, self.lm = config, lm
        self.context = context or Context()
        self.refuse_kind(lm.head.kind, lm.name)
        self.refuse_layout(config, lm.layout, lm.name)

    @abstractmethod
    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        """An Edit after which the model answers every request. Leaves the model bit for bit as it was."""

    def edit_cases(self, cases: Sequence[Case]) -> Edit:
        """An Edit of all requests of some cases. What the cases' probes ask is none of an editor's business: only a
        reference that is told the answers looks at it.
        """
        return self.edit([request for case in cases for request in case.requests])

    def edit_each(self, batches: Sequence[Sequence[EditRequest]]) -> Sequence[Edit] | None:
        """Edits of batches that know nothing of each other, together: each what `edit` makes of it on a new editor,
        but for last digits. None: this method makes them one by one.

        Raises:
            RejectedRequest: one of them cannot be made.
        """
        return None

    def without(
        self, requests: Sequence[EditRequest], revoked: Collection[int], edit: Edit, by_fact: Mapping[str, Tensor]
    ) -> Remade | None:
        """The edit of all `requests` but those numbered `revoked`, from what `edit`, of all of them, was made of. The
        model is in the state that `edit` was made on. None: all that is left has to be edited again.

        by_fact: of the edit (`WeightDelta.by_fact`); empty where nothing was kept.

        Raises:
            MissingError: what was kept does not fit this model.
        """
        return None

    def check(self, request: EditRequest) -> None:
        """Refuse a request that this method cannot work on, before any work is done.

        Raises:
            RejectedRequest: says why; other requests of the batch are not affected.
        """
        self.lm.head.encode([(request.text, request.target_new)])
        if self.needs_subject:
            _ = request.subject_span

    @classmethod
    def refuse_kind(cls, kind: str, model: str) -> None:
        """Refuse a model of a kind that this method cannot work on; it need not be loaded.

        Raises:
            UsageError: says which kinds it works on.
        """
        if kind not in cls.heads:
            able = " or ".join(NAMES[known] for known in cls.heads)
            raise UsageError(
                f"{cls.__name__} works on {able}, and {model} is {NAMES[kind]}: choose another method (ft works on all)"
                " or model"
            )

    @classmethod
    def refuse_layout(cls, config: C, layout: Layout, model: str) -> None:
        """Refuse a model that lacks a layer, or with whose experts this method cannot be right; it need not be loaded.

        Raises:
            UsageError: says why.
        """
        if not cls.experts:
            layout.refuse_experts(cls.__name__, model)
        for layer in getattr(config, "layers", None) or ():
            layout.block(layer)

    @classmethod
    def require(cls, config: C, model: str, context: Context) -> None:
        """Refuse what this method needs and cannot have (text, a trained network, a library) before the model of that
        name is loaded, which may take long. What only the loaded model can tell is left to `warm_up`.

        Raises:
            MissingError: says what is missing, and what to do about it. UsageError: settings that leave nothing to do.
        """

    @classmethod
    def cost(cls, config: C, outline: Outline, lengths: Sequence[int]) -> Cost | None:
        """What editing facts of so many tokens together takes on such a model; None where that cannot be told ahead."""
        return None

    @classmethod
    def beforehand(cls, config: C) -> str | None:
        """What the method does once a model, before its first edit, in words that go on after its name; None for
        nothing that takes long, or what is told by its own (second moments).
        """
        return None

    def warm_up(self) -> None:
        """Compute what is paid once a model, not once an edit (statistics): together, before processes go separate
        ways.
        """

    def recall(self, edit: Edit) -> None:
        """Take up what making `edit` left in the editor (most keep nothing): a sequence goes on from saved edits, in
        their order.
        """

    def remember(self, edit: Edit) -> None:
        """Take it up right after it was made, unless it holds numbers that are none: such an edit is not kept, and what
        it left would spoil all that come after it.
        """
        if edit.is_finite:
            self.recall(edit)

    def figures(self, requests: Sequence[EditRequest]) -> dict[str, dict[str, Any]]:
        """{name of a figure: its data} of the attached edits of `requests`, in their order; experiment/figures.py
        names who draws it.
        """
        return {}


@dataclass(frozen=True)
class Method:
    """A method with its settings, ready to begin on a model."""

    editor: type[Editor[Any]]
    config: EditorConfig

    def begin(self, lm: LM, context: Context | None = None) -> Editor[Any]:
        """An editor that remembers nothing yet. Raises as `Editor`."""
        return self.editor(self.config, lm, context)

    def require(self, model: str, context: Context) -> None:
        """See `Editor.require`."""
        self.editor.require(self.config, model, context)


def require_layers(layers: Sequence[int], lm: LM) -> list[int]:
    """The layers in ascending order.

    Raises:
        UsageError: none given, or one that the model does not have.
    """
    if not layers:
        raise UsageError("method.layers is empty: give at least one layer, such as method.layers=[3]")
    for layer in layers:
        lm.layout.block(layer)
    return sorted(layers)
