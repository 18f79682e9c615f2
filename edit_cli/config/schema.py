"""What a setting may be is said once, in its dataclass: type and bounds in the annotation, default beside it, one
sentence under it.

From there come the check of a value, the words of a refusal, the defaults of the command line, help and reference.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError

from edit_cli.errors import UsageError

# Bounds that many settings have
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Share = Annotated[float, Gt(0), Le(1)]

UNSET = "???"  # a value that has to be given, as configuration files write it


@dataclass(frozen=True)
class Linked:
    """Marks a field whose value on the command line comes from another key unless it is given: an interpolation."""

    to: str


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
    hint = hints(cls)[name]
    made = part_of(hint)
    if made is not None:
        if isinstance(value, made) or (value is None and _optional(hint)):
            return value
    else:
        try:
            return _adapter(cls, name).validate_python(value, strict=True)
        except ValidationError:
            pass
    raise SettingError(cls.place, name, f"={shown(value)}: {wanted(hint)}")


@cache
def hints(cls: type) -> dict[str, Any]:
    """Annotations of a dataclass with what they are annotated with."""
    return get_type_hints(cls, include_extras=True)


@cache
def _adapter(cls: type, name: str) -> TypeAdapter[Any]:
    return TypeAdapter(hints(cls)[name], config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))


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
    options = [option for option in _options(hint) if option is not types.NoneType]
    if len(options) > 1 or len(options) < len(_options(hint)):
        told = [describe(Annotated[option, *bounds] if bounds else option) for option in options]
        told = [words.removeprefix("choose ") for words in told] if len(told) > 1 else told
        return " or ".join([*told, *(["null"] if _optional(hint) else [])])
    if get_origin(hint) is Literal:
        return f"choose {_either(get_args(hint))}"
    if get_origin(hint) in (list, tuple):
        inner = describe(get_args(hint)[0]) if get_args(hint) else "values"
        return f"a list of {_plural(inner)}, such as {_example(get_args(hint))}"
    if get_origin(hint) is dict or hint is dict:
        return "a mapping, such as {a: b}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Any: "a value"}
    return words.get(hint, getattr(hint, "__name__", str(hint))) + _bounds(bounds)


def shown(value: Any) -> str:
    """A value as it is typed."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _bounds(bounds: tuple[Any, ...]) -> str:
    told = []
    for bound in bounds:
        match bound:
            case Gt(least):
                told.append(f"above {least:g}")
            case Ge(least):
                told.append(f"from {least:g} up")
            case Lt(most):
                told.append(f"below {most:g}")
            case Le(most):
                told.append(f"up to {most:g}")
    if len(told) == 2:
        told = [
            f"{told[0].removesuffix(' up')} and {told[1]}"
            if not told[0].startswith("from")
            else f"{told[0].removesuffix(' up')} {told[1].removeprefix('up ')}"
        ]
    return f" {told[0]}" if told else ""


def _plural(words: str) -> str:
    if words.startswith("choose "):
        return f"{words.removeprefix('choose ')}"
    noun, _, rest = (
        words.removeprefix("a ").partition(" ")
        if not words.startswith("a whole")
        else ("whole number", "", words.removeprefix("a whole number").strip())
    )
    return f"{noun}s{f' {rest}' if rest else ''}" if noun not in ("text",) else "texts"


def _example(inner: tuple[Any, ...]) -> str:
    if not inner:
        return "[a, b]"
    bare, _ = _bare(inner[0])
    if get_origin(bare) is Literal:
        return f"[{get_args(bare)[0]}]"
    return {int: "[1, 2]", float: "[0.5, 1]"}.get(bare, "[a, b]")


def _either(words: tuple[Any, ...]) -> str:
    told = [shown(word) for word in words]
    return told[0] if len(told) == 1 else f"{', '.join(told[:-1])} or {told[-1]}"


def _bare(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """(type, bounds) of an annotated type, whatever the depth."""
    if get_origin(hint) is Annotated:
        inner, bounds = _bare(get_args(hint)[0])
        return inner, bounds + tuple(part for part in hint.__metadata__ if not isinstance(part, Linked | Len))
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


# --- defaults and sentences ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """A setting as help shows it. default: as it is typed; `???` where there is none. takes: its type in words."""

    name: str
    default: Any
    takes: str
    sentence: str


def keys(cls: type, prefix: str = "", instance: Any = None) -> Iterator[Key]:
    """Every setting of a class, groups inside it included. instance: whose values stand in for the class's defaults."""
    sentences = documented(cls)
    for field in fields(cls):
        if not field.init:
            continue
        value = default_of(field) if instance is None else getattr(instance, field.name)
        hint, name = hints(cls)[field.name], f"{prefix}{field.name}"
        if (link := linked(hint)) is not None:
            yield Key(name, link, describe(hint), sentences.get(field.name, ""))
        elif is_dataclass(value) and not isinstance(value, type):
            yield from keys(type(value), f"{name}.", value)
        else:
            yield Key(name, UNSET if value is MISSING else value, describe(hint), sentences.get(field.name, ""))


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
        if not is_dataclass(owner):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        for field, text in zip(body.body, body.body[1:], strict=False):  # type: ignore[attr-defined]
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = inspect.cleandoc(str(text.value.value)).replace("\n", " ")
    return found
