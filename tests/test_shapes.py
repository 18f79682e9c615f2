"""Values of files against the shapes that they must have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from edit_cli.errors import MissingError
from edit_cli.files.json_files import parse
from edit_cli.files.shapes import Count, Rule, at_least, checked


class Part(TypedDict):
    kind: Literal["a", "b", 1]
    at: NotRequired[tuple[int, float]]


class Whole(TypedDict):
    name: str
    parts: list[Part]
    by: dict[str, float | None]
    count: Count
    more: NotRequired[Any]


@dataclass
class Settings:
    rate: float
    names: list[str] = field(default_factory=list)


RIGHT = {"name": "x", "parts": [{"kind": "a", "at": [1, 2.5]}, {"kind": 1}], "by": {"y": None, "z": 3}, "count": 0}


def test_what_fits_is_given_back():
    assert checked({**RIGHT, "else": object}, Whole, "f")["name"] == "x"
    assert checked({"rate": 1}, Settings, "f") == {"rate": 1}
    assert checked([1, None], list[int | None], "f") == [1, None]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": 5}, "name is 5, not text"),
        ({"name": None}, "name is null, not text"),
        ({"parts": {}}, "parts is {}, not a list"),
        ({"parts": [5]}, "parts[0] is 5, not an object"),
        ({"parts": [{"kind": "a"}, {"kind": True}]}, "parts[1].kind is true, not one of a, b, 1"),
        ({"parts": [{}]}, "parts[0].kind is missing"),
        ({"parts": [{"kind": "b", "at": [1]}]}, "parts[0].at is [1], not a list of 2"),
        ({"parts": [{"kind": "b", "at": [1.0, 2]}]}, "parts[0].at[0] is 1.0, not a whole number"),
        ({"by": {"y": "x" * 10_000}}, "by.y is 'xxxx"),
        ({"by": {"y": float("nan")}}, "by.y is nan, not a number or null"),
        ({"by": {"y": 10**400}}, "not a number or null"),
        ({"count": -1}, "count is -1, not 0 or more"),
        ({"count": True}, "count is true, not a whole number"),
    ],
)
def test_what_does_not_fit_is_named(change, told):
    with pytest.raises(MissingError) as caught:
        checked({**RIGHT, **change}, Whole, "file.json", "make it again")
    message = str(caught.value)
    assert message.startswith("file.json is damaged: ") and message.endswith("; make it again")
    assert told in message and len(message) < 200


def test_rules_and_arguments():
    even = Annotated[int, at_least(2, 8), Rule(lambda n: n % 2 == 0, "an even number")]
    assert checked(4, even, "f") == 4
    for wrong, told in ((10, "from 2 to 8"), (5, "an even number"), (4.0, "a whole number")):
        with pytest.raises(MissingError, match=f"it is {wrong}, not {told}"):
            checked(wrong, even, "f")
    for arguments in ({"rate": 1, "other": 2}, {}, {"rate": "1"}, {"rate": 1, "names": [1]}, None):
        with pytest.raises(MissingError, match="f is damaged"):
            checked(arguments, Settings, "f")


@pytest.mark.parametrize(
    "text",
    ["NaN", "[Infinity]", "[" * 200_000, '{"a":' * 100 + "1" + "}" * 100, "", "{", b"\xff"],
    ids=["NaN", "infinity", "deep", "deep and whole", "empty", "torn", "no text"],
)
def test_json_that_is_none(text):
    with pytest.raises(ValueError):
        parse(text)
    assert parse("[" * 50 + "]" * 50) is not None
