"""TRANSITION. What every editor was: a dataclass of hyper-parameters with one method that turns requests into an Edit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from edit_cli.editors.base import AUTO, CORPUS, EXAMPLES, Context, Examples  # noqa: F401
from edit_cli.edits.edit import Edit
from edit_cli.errors import UsageError
from edit_cli.lm.kinds import NAMES
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest


class Editor(ABC):
    """Base of all editors. Subclasses are dataclasses; their fields are the keys of conf/method/<name>.yaml.

    mass_editor: the method is meant for many facts at once (sets the default of `protocol.batch_size`).
    needs_subject: requests without a subject are refused.
    heads: kinds of models that the method can work on: "causal", "seq2seq" (encoder-decoder), "classifier".
    looks_back: how many of the latest edits `recall` needs with their weights; 0: what they remember beside those is
    enough.
    examples: given by commands, for methods that remember some records; none of a split that the data lack.
    """

    mass_editor: ClassVar[bool] = False
    needs_subject: ClassVar[bool] = False
    heads: ClassVar[tuple[str, ...]] = ("causal",)
    looks_back: ClassVar[int] = 0
    examples: ClassVar[Examples | None] = None

    @abstractmethod
    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> Edit:
        """An Edit after which `lm` answers every request. Leaves `lm` bit for bit as it was."""

    def check(self, lm: LM, request: EditRequest) -> None:
        """Refuse a request that this method cannot work on, before any work is done.

        Raises:
            RejectedRequest: says why; other requests of the batch are not affected. UsageError: as `fits`.
        """
        self.fits(lm)
        lm.head.encode([(request.text, request.target_new)])
        if self.needs_subject:
            _ = request.subject_span

    def fits(self, lm: LM) -> None:
        """Refuse a model of a kind that this method cannot work on, before it is asked anything.

        Raises:
            UsageError: says which kinds it works on.
        """
        self.refuse_kind(lm.head.kind, lm.name)

    @classmethod
    def refuse_kind(cls, kind: str, model: str) -> None:
        """`fits`, of a model that need not be loaded."""
        if kind not in cls.heads:
            able = " or ".join(NAMES[known] for known in cls.heads)
            raise UsageError(
                f"{cls.__name__} works on {able}, and {model} is {NAMES[kind]}: choose another method (ft works on all)"
                " or model"
            )

    def require(self, model: str) -> None:
        """Refuse what this method needs and cannot have (text, a trained network, a library) before the model of that
        name is loaded, which may take long. What only the loaded model can tell is left to `warm_up`.

        Raises:
            MissingError: says what is missing, and what to do about it. UsageError: settings that leave nothing to do.
        """

    def warm_up(self, lm: LM) -> None:
        """Compute what is paid once a model, not once an edit (statistics): together, before processes go separate
        ways.
        """

    def reset(self) -> None:
        """Forget what earlier edits left in the editor (most keep nothing)."""

    def recall(self, lm: LM, edit: Edit) -> None:
        """Take up what making `edit` left in the editor (most keep nothing): a sequence goes on from saved edits, in
        their order.
        """

    def figures(self, lm: LM, requests: Sequence[EditRequest]) -> dict[str, dict[str, Any]]:
        """{name of a figure: its data} of the attached edits of `requests`, in their order; commands/figures.py
        names who draws it.
        """
        return {}

    def scratch(self, lm: LM) -> dict[Any, Any]:
        """Things worth computing once a model (factorised statistics, sampled prefixes); gone with the model or the
        editor.
        """
        memory = self.__dict__.setdefault("_scratch", WeakKeyDictionary())
        return memory.setdefault(lm, {})


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


class OldMethod:
    """An editor of the old form as a `Method`."""

    def __init__(self, editor: Editor) -> None:
        self.editor = self.config = editor

    def begin(self, lm: LM, context: Context | None = None) -> Bridge:
        context = context or Context()
        self.editor.examples = context.examples
        if context.train_command is not None and hasattr(self.editor, "checkpoint"):
            self.editor.train_command = context.train_command()
        self.editor.reset()
        self.editor.fits(lm)
        for layer in getattr(self.editor, "layers", None) or ():
            lm.layout.block(layer)
        return Bridge(self.editor, lm)

    def require(self, model: str, context: Context) -> None:
        self.editor.examples = context.examples
        if context.train_command is not None and hasattr(self.editor, "checkpoint"):
            self.editor.train_command = context.train_command()
        self.editor.require(model)


class Bridge:
    def __init__(self, editor: Editor, lm: LM) -> None:
        self.old, self.lm = editor, lm
        self.looks_back, self.mass_editor = editor.looks_back, editor.mass_editor
        self.config = editor

    def edit(self, requests):
        return self.old.edit(self.lm, requests)

    def check(self, request):
        self.old.check(self.lm, request)

    def warm_up(self):
        self.old.warm_up(self.lm)

    def recall(self, edit):
        self.old.recall(self.lm, edit)

    def figures(self, requests):
        return self.old.figures(self.lm, requests)
