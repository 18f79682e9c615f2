"""What is read from a file, held against the shape that the program counts on.

A shape is a type: `str`, `int`, `float` (any finite number), `bool`, `None`, unions, `Literal`, `list[X]`,
`tuple[X, Y]` (a list of that length), `dict[str, X]`, a `TypedDict` (which may hold more), a dataclass (its arguments
by name), `Any`; with `Annotated[X, Rule(…)]` there is a condition.

Values are not converted: a number is no text and `true` no number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, is_dataclass
from dataclasses import fields as dataclass_fields
from functools import cache
from reprlib import Repr
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from edit_cli.errors import MissingError

WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}
LARGEST = 2**63  # whole numbers beyond it are no counts of anything

Test = Callable[[Any], None]


@dataclass(frozen=True)
class Rule:
    """holds: whether a value of the right type will do. wanted: what it should be, in words."""

    holds: Callable[[Any], bool]
    wanted: str


def at_least(low: float, most: float = math.inf) -> Rule:
    """A number from `low` up."""
    wanted = f"{low:g} or more" if most == math.inf else f"from {low:g} to {most:g}"
    return Rule(lambda value: low <= value <= most, wanted)


Count = Annotated[int, at_least(0)]
Seconds = Annotated[float, at_least(0)]


def checked(value: Any, shape: Any, source: object, remedy: str = "") -> Any:
    """`value`, which has that shape.

    source: the file that it comes from. remedy: what can be done about a damaged one.

    Raises:
        MissingError: it has another shape; names the file, the field and what should be there.
    """
    try:
        _test_of(shape)(value)
    except Unfit as problem:
        raise MissingError(f"{source} is damaged: {problem}{f'; {remedy}' if remedy else ''}") from None
    return value


class Unfit(ValueError):
    """A value that does not fit. place: the way to it from the top, innermost first."""

    def __init__(self, value: Any, wanted: str, *place: str) -> None:
        super().__init__(value, wanted)
        self.value, self.wanted, self.place = value, wanted, list(place)

    def __str__(self) -> str:
        path = "".join(reversed(self.place)).removeprefix(".") or "it"
        return f"{path} is {shown(self.value)}, not {self.wanted}"


class Lacking(Unfit):
    """A field that is not there."""

    def __str__(self) -> str:
        return f"{''.join(reversed(self.place)).removeprefix('.')} is missing"


def shown(value: Any) -> str:
    """A value in short, whatever it is."""
    short = Repr()
    short.maxstring = short.maxother = 40
    return json.dumps(value) if value is None or isinstance(value, bool) else short.repr(value)


@cache
def _test_of(shape: Any) -> Test:
    """What raises `Unfit` for a value of another shape; made once a shape, because it is asked a million times."""
    kind, parts = get_origin(shape), get_args(shape)
    if shape is Any:
        return lambda value: None
    if shape in (int, float):
        return _number(shape)
    if shape in (str, bool, None, NoneType):
        return _exactly(NoneType if shape is None else shape)
    if kind is Literal:
        return _ruled(lambda value: None, Rule(_among(parts), f"one of {', '.join(map(str, parts))}"))
    if kind is Annotated:
        return _ruled(_test_of(parts[0]), *(part for part in parts[1:] if isinstance(part, Rule)))
    if kind in (Union, UnionType):
        return _either(parts)
    if kind is list:
        return _list(_test_of(parts[0]))
    if kind is tuple:
        return _row([_test_of(part) for part in parts])
    if kind is dict:
        return _mapping(_test_of(parts[1]))
    if is_typeddict(shape):
        return _fields(shape)
    if is_dataclass(shape):
        return _arguments(shape)
    raise TypeError(f"{shape} is no shape")


def words_of(shape: Any) -> str:
    """A shape in words."""
    kind, parts = get_origin(shape), get_args(shape)
    if kind in (Union, UnionType):
        return " or ".join(map(words_of, parts))
    if kind is Annotated:
        return ", ".join([words_of(parts[0]), *(part.wanted for part in parts[1:] if isinstance(part, Rule))])
    if kind is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if kind in (list, tuple):
        return "a list"
    return WORDS.get(NoneType if shape is None else shape, "an object")


def _among(options: tuple[Any, ...]) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(option) and value == option for option in options)


def _exactly(kind: type) -> Test:
    def test(value: Any) -> None:
        if type(value) is not kind:
            raise Unfit(value, WORDS[kind])

    return test


def _number(kind: type) -> Test:
    def test(value: Any) -> None:
        if type(value) is float:
            if kind is int or not math.isfinite(value):
                raise Unfit(value, WORDS[kind])
        elif type(value) is not int or not -LARGEST <= value < LARGEST:
            raise Unfit(value, WORDS[kind])

    return test


def _ruled(test: Test, *rules: Rule) -> Test:
    def both(value: Any) -> None:
        test(value)
        for rule in rules:
            if not rule.holds(value):
                raise Unfit(value, rule.wanted)

    return both


def _either(options: tuple[Any, ...]) -> Test:
    tests = [_test_of(option) for option in options]
    wanted = " or ".join(map(words_of, options))

    def test(value: Any) -> None:
        deepest: Unfit | None = None
        for option in tests:
            try:
                return option(value)
            except Unfit as problem:
                if problem.place and (deepest is None or len(problem.place) > len(deepest.place)):
                    deepest = problem
        raise deepest or Unfit(value, wanted)

    return test


def _list(of: Test) -> Test:
    def test(value: Any) -> None:
        if type(value) is not list:
            raise Unfit(value, "a list")
        for index, part in enumerate(value):
            try:
                of(part)
            except Unfit as problem:
                problem.place.append(f"[{index}]")
                raise

    return test


def _row(parts: list[Test]) -> Test:
    def test(value: Any) -> None:
        if type(value) is not list or len(value) != len(parts):
            raise Unfit(value, f"a list of {len(parts)}")
        for index, (part, of) in enumerate(zip(value, parts, strict=True)):
            try:
                of(part)
            except Unfit as problem:
                problem.place.append(f"[{index}]")
                raise

    return test


def _mapping(of: Test) -> Test:
    def test(value: Any) -> None:
        if type(value) is not dict:
            raise Unfit(value, "an object")
        for key, part in value.items():
            try:
                of(part)
            except Unfit as problem:
                problem.place.append(f".{key[:60]}")
                raise

    return test


def _fields(shape: Any) -> Test:
    total, fields = shape.__total__, []
    for name, hint in get_type_hints(shape, include_extras=True).items():
        optional = get_origin(hint) is NotRequired
        fields.append((name, _test_of(get_args(hint)[0] if optional else hint), total and not optional))
    return _object(fields, more=True)


def _arguments(shape: Any) -> Test:
    hints = get_type_hints(shape, include_extras=True)
    able = [field for field in dataclass_fields(shape) if field.init]
    needed = {field.name for field in able if field.default is MISSING and field.default_factory is MISSING}
    return _object([(field.name, _test_of(hints[field.name]), field.name in needed) for field in able], more=False)


def _object(fields: list[tuple[str, Test, bool]], more: bool) -> Test:
    """fields: names, tests, and whether they may not be missing. more: whether there may be others."""
    known = {name for name, _, _ in fields}

    def test(value: Any) -> None:
        if type(value) is not dict:
            raise Unfit(value, "an object")
        if not more and (other := next((name for name in value if name not in known), None)) is not None:
            raise Unfit(other, "a field that there is")
        for name, of, needed in fields:
            if name in value:
                try:
                    of(value[name])
                except Unfit as problem:
                    problem.place.append(f".{name}")
                    raise
            elif needed:
                raise Lacking(None, "", f".{name}")

    return test
