"""What a setting may be is said once, in its dataclass: type and bounds in the annotation, default beside it, one
sentence under it.

From there come the check of a value, the words of a refusal, the defaults of the command line, help and reference.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import sys
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from edit_cli.errors import UsageError

if TYPE_CHECKING:
    from pydantic import TypeAdapter


@dataclass(frozen=True)
class Linked:
    """Marks a field whose value on the command line comes from another key unless it is given: an interpolation."""

    to: str


@dataclass(frozen=True)
class Form:
    """Says of a text what it may be, in words, where its class holds it to a form of its own."""

    words: str


@dataclass(frozen=True)
class Such:
    """Says of a list of texts which ones it may hold among others, for help and completion: `words`, or the options of
    a group, such as method.
    """

    words: tuple[str, ...] = ()
    group: str = ""


class Mark(Enum):
    """What else an annotation says of a field."""

    DISTINCT = "nothing stands twice in the list: it chooses"
    INFINITE = "inf is a value, too"
    FILE = "the text names a file or a folder: a leading ~ is filled in"
    SENTENCE = "every character is part of the text, $ and commas included"


# Bounds that many settings have
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Share = Annotated[float, Gt(0), Le(1)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]  # what NumPy's generators take
Limit = Annotated[float, Gt(0), Mark.INFINITE]  # inf switches it off
Layers = Annotated[list[Natural], Mark.DISTINCT]
FilePath = Annotated[str, Mark.FILE]
Sentence = Annotated[str, Mark.SENTENCE]
Modules = Annotated[list[str], Mark.DISTINCT, Such(("mlp_in", "mlp_out"))]
Trackers = Annotated[list[str], Mark.DISTINCT, Such(("tensorboard", "wandb", "mlflow", "trackio"))]

UNSET = "???"  # a value that has to be given, as configuration files write it
LARGEST = 2**63 - 1  # whole number that a tensor holds


class SettingError(UsageError):
    """A value that its field does not take."""

    def __init__(self, place: str, name: str, complaint: str) -> None:
        super().__init__(f"{place}.{name}{complaint}" if place else f"{name}{complaint}")
        self.name, self.complaint = name, complaint

    def at(self, place: str) -> SettingError:
        """The same, of the group of that name."""
        return SettingError(place, self.name, self.complaint)


class Config:
    """Base of all settings: frozen dataclasses whose values are checked when they are made, from wherever they come.

    place: the group that its keys usually stand in, for messages.

    Raises:
        SettingError: a value of another type or out of bounds; names the field and what it takes.
    """

    place: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            if field.init:
                object.__setattr__(self, field.name, checked(type(self), field.name, getattr(self, field.name)))


def checked(cls: type[Config], name: str, value: Any) -> Any:
    """`value` as the field `name` of `cls` holds it (3 becomes 3.0 where a float is wanted).

    Raises:
        SettingError: the field does not take it.
    """
    from pydantic import ValidationError

    hint = hints(cls)[name]  # type: ignore[arg-type]  # mypy takes classes for unhashable
    made = part_of(hint)
    if made is not None:
        if isinstance(value, made) or (value is None and _optional(hint)):
            return value
        raise SettingError(cls.place, name, f"={shown(value)}: {wanted(hint)}")
    try:
        found = _adapter(cls, name).validate_python(value, strict=True)  # type: ignore[arg-type]  # likewise
    except ValidationError:
        words = wanted(hint)
        if isinstance(value, float) and math.isinf(value):
            words = words.replace("a number", "a finite number", 1)
        raise SettingError(cls.place, name, f"={shown(value)}: {words}") from None
    if isinstance(found, int) and abs(found) > LARGEST:
        raise SettingError(cls.place, name, f"={shown(value)}: give a whole number up to {LARGEST:,}")
    if Mark.FILE in marks(hint) and found == "":
        raise SettingError(cls.place, name, "= is empty: give a file or a folder")
    if Mark.DISTINCT in marks(hint):
        for part, times in Counter(map(str, found or ())).items():
            if times > 1:
                raise SettingError(cls.place, name, f"={shown(value)}: {part} occurs twice; name it once")
    return found


@cache
def hints(cls: type) -> dict[str, Any]:
    """Annotations of a dataclass with what they are annotated with."""
    return get_type_hints(cls, include_extras=True)


@cache
def _adapter(cls: type, name: str) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter  # a tenth of a second, which help does without

    hint = hints(cls)[name]
    infinite = Mark.INFINITE in marks(hint)
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=infinite))


def part_of(hint: Any) -> type | None:
    """The class of settings, or of parts, that a field holds, be it optional or not; None for plain values."""
    for option in _options(hint):
        if isinstance(option, type) and (is_dataclass(option) or inspect.isabstract(option)):
            return option
    return None


# --- a type in words -------------------------------------------------------------------------------------------------


def wanted(hint: Any) -> str:
    """What a field takes, as the end of a refusal: `give a whole number from 1 up, or null`."""
    words = describe(hint)
    return words if words.startswith("choose ") else f"give {words}"


def describe(hint: Any) -> str:
    """A type in words: `a number above 0`, `choose both or out`, `a list of whole numbers, such as [1, 2]`."""
    hint, bounds = _bare(hint)
    options = _options(hint)
    if len(options) > 1 or get_origin(hint) is Literal:
        told: list[str] = []
        for option in options:
            bare, own = _bare(option)
            if get_origin(bare) is Literal:
                told += map(shown, get_args(bare))
            else:
                told.append("null" if bare is types.NoneType else describe(Annotated[bare, *bounds, *own, None]))
        chosen = all(get_origin(_bare(option)[0]) is Literal or option is types.NoneType for option in options)
        return f"{'choose ' if chosen else ''}{_either(told)}"
    if get_origin(hint) in (list, tuple):
        if get_args(hint) and get_origin(_bare(get_args(hint)[0])[0]) is Literal:
            return f"some of [{', '.join(map(shown, get_args(_bare(get_args(hint)[0])[0])))}]"
        inner = describe(get_args(hint)[0]) if get_args(hint) else "values"
        such = [word for part in bounds if isinstance(part, Such) for word in part.words]
        example = f"[{', '.join(such[:2])}]" if such else _example(get_args(hint))
        return f"a list of {_plural(inner)}, such as {example}"
    if get_origin(hint) is dict or hint is dict:
        return "settings in braces, such as {a: 1, b: 2}"
    if hint is str and (forms := [part.words for part in bounds if isinstance(part, Form)]):
        return forms[0]
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Any: "a value"}
    return words.get(hint, "a group of settings") + _bounds(bounds)


def shown(value: Any) -> str:
    """A value as it is typed."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _bounds(bounds: tuple[Any, ...]) -> str:
    told: dict[str, str] = {}
    for bound in bounds:
        match bound:
            case Gt(least):
                told["least"] = f"above {_number(least)}"
            case Ge(least):
                told["least"] = f"from {_number(least)}"
            case Lt(most):
                told["most"] = f"below {_number(most)}"
            case Le(most):
                told["most"] = f"up to {_number(most)}"
    match told:
        case {"least": least, "most": most} if least.startswith("from") and most.startswith("up"):
            return f" {least} {most.removeprefix('up ')}"
        case {"least": least, "most": most}:
            return f" {least} and {most}"
        case {"least": least}:
            return f" {least}{' up' if least.startswith('from') else ''}"
        case {"most": most}:
            return f" {most}"
    return ""


def _number(bound: Any) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def _plural(words: str) -> str:
    """`whole numbers from 0 up`, of what each part of a list is."""
    for noun in ("a whole number", "a number", "text"):
        if words.startswith(noun):
            return f"{noun.removeprefix('a ')}s{words.removeprefix(noun)}"
    return words


def _example(inner: tuple[Any, ...]) -> str:
    if not inner:
        return "[a, b]"
    bare, _ = _bare(inner[0])
    return {int: "[1, 2]", float: "[0.5, 1]"}.get(bare, "[a, b]")


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _bare(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """(type, bounds) of an annotated type, whatever the depth."""
    if get_origin(hint) is Annotated:
        inner, bounds = _bare(get_args(hint)[0])
        return inner, bounds + tuple(
            part for part in hint.__metadata__ if isinstance(part, Gt | Ge | Lt | Le | Form | Such)
        )
    return hint, ()


def _options(hint: Any) -> list[Any]:
    """The types that a hint allows: several where it is a union."""
    bare, _ = _bare(hint)
    if get_origin(bare) in (Union, types.UnionType):
        return [
            part
            for option in get_args(bare)
            for part in ([option] if get_origin(option) is Annotated else _options(option))
        ]
    return [bare]


def _optional(hint: Any) -> bool:
    return types.NoneType in _options(hint)


def marks(hint: Any) -> set[Mark]:
    """What else a field's annotation says, be the field optional or not."""
    if get_origin(hint) is Annotated:
        return {part for part in hint.__metadata__ if isinstance(part, Mark)} | marks(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return set().union(*map(marks, get_args(hint)))
    return set()


def is_text(hint: Any) -> bool:
    """Whether all that a field takes is text, or one of some words, or null."""
    return all(
        option is str or (get_origin(option) is Literal and all(isinstance(word, str) for word in get_args(option)))
        for option in plain_options(hint)
    )


def is_texts(hint: Any) -> bool:
    """Whether a field takes a list of texts."""
    return all(get_origin(option) is list and is_text(get_args(option)[0]) for option in plain_options(hint))


def plain_options(hint: Any) -> list[Any]:
    """The types that a field takes, without their bounds and without null."""
    return [_bare(option)[0] for option in _options(hint) if option is not types.NoneType]


# --- defaults and sentences ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """A setting as help shows it. default: as it is typed; `???` where there is none. takes: its type in words."""

    name: str
    default: Any
    takes: str
    sentence: str

    @property
    def written(self) -> str:
        """`name=default`, as it is typed; where there is no default, `name=VALUE`."""
        value = "VALUE" if self.default == UNSET else self.default
        if isinstance(value, list):
            value = f"[{', '.join(shown(part) or repr(part) for part in value)}]"
        elif isinstance(value, Mapping):
            value = f"{{{', '.join(f'{name}: {shown(part)}' for name, part in value.items())}}}"
        return f"{self.name}={shown(value)}"

    @property
    def told(self) -> str:
        """The sentence, and what the key takes."""
        return f"{self.sentence} ({self.takes.removeprefix('choose ')})".strip()


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, annotation) of every setting of a class, those of groups inside it included."""
    for field in fields(cls):
        if not field.init:
            continue
        hint, name = hints(cls)[field.name], f"{prefix}{field.name}"
        part = part_of(hint)
        if part is not None and is_dataclass(part) and linked(hint) is None:
            yield from leaves(part, f"{name}.")
        else:
            yield name, hint


def keys(cls: type, prefix: str = "", values: Mapping[str, Any] | None = None) -> Iterator[Key]:
    """Every setting of a class, groups inside it included. values: what stands in for the class's defaults."""
    sentences = documented(cls)
    values = defaults(cls) if values is None else values
    for field in fields(cls):
        if not field.init:
            continue
        hint, name = hints(cls)[field.name], f"{prefix}{field.name}"
        value, part = values.get(field.name, UNSET), part_of(hint)
        if isinstance(value, Mapping) and part is not None and is_dataclass(part):
            yield from keys(part, f"{name}.", {**defaults(part), **value})
        else:
            yield Key(name, value, describe(hint), sentences.get(field.name, ""))


def defaults(cls: type, instance: Any = None) -> dict[str, Any]:
    """{key: default} of a class as plain containers, for Hydra: `???` where there is none, links as they are."""
    found: dict[str, Any] = {}
    for field in fields(cls):
        if not field.init:
            continue
        value = default_of(field) if instance is None else getattr(instance, field.name)
        if (link := linked(hints(cls)[field.name])) is not None:
            found[field.name] = link
        elif is_dataclass(value) and not isinstance(value, type):
            found[field.name] = defaults(type(value), value)
        else:
            found[field.name] = UNSET if value is MISSING else list(value) if isinstance(value, tuple) else value
    return found


def restored(cls: type, values: dict[str, Any]) -> Any:
    """The settings that `dataclasses.asdict` made plain, groups inside them included. Raises as `Config`."""
    groups = {name: part_of(hints(cls)[name]) for name, value in values.items() if isinstance(value, dict)}
    return cls(**values | {name: restored(part, values[name]) for name, part in groups.items() if part is not None})


def linked(hint: Any) -> str | None:
    """The interpolation that a field's value comes from, if it is linked."""
    parts = hint.__metadata__ if get_origin(hint) is Annotated else ()
    return next((part.to for part in parts if isinstance(part, Linked)), None)


def default_of(field: Field[Any]) -> Any:
    """A field's default, or MISSING."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


@cache
def documented(cls: type) -> dict[str, str]:
    """{field: the sentence under it}, of the class and those that it is made from."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if is_dataclass(owner):
            found |= _sentences(owner.__module__).get(owner.__qualname__, {})
    return found


@cache
def _sentences(module: str) -> dict[str, dict[str, str]]:
    """{class: {field: the sentence under it}} of a module, which is read once."""
    found: dict[str, dict[str, str]] = {}

    def read(body: Sequence[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                found[f"{prefix}{node.name}"] = dict(_under(node.body))
                read(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                read(node.body, f"{prefix}{node.name}.<locals>.")

    read(ast.parse(inspect.getsource(sys.modules[module])).body, "")
    return found


def _under(body: Sequence[ast.stmt]) -> Iterator[tuple[str, str]]:
    """(field, the sentence under it) of a class's body."""
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            yield ast.unparse(field.target), inspect.cleandoc(str(text.value.value)).replace("\n", " ")
