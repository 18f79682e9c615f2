"""One raw record of a data file, with checked access to its fields.

The only change ever made to a text: white space around a phrase (subject, target) is removed, and at the end of a text
that others follow (a claim in a question). Prompts stay as they were typed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edit_cli.errors import RejectedRequest
from edit_cli.requests import slot_prompt
from edit_cli.writing import JOINS


class Fault(ValueError):
    """A record cannot be used: which field, and why.

    The reason names no values, so that equal faults can be counted.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field} {reason}")
        self.field = field
        self.reason = reason


@dataclass(frozen=True)
class Dropped:
    """A record that was left out, with the first fault found in it."""

    where: str  # "line 12" of JSON lines or CSV (from 1), "record 7" of a JSON list (from 0)
    field: str  # "" when the record as a whole is at fault
    reason: str
    id: str | None = None

    def __str__(self) -> str:
        named = f"{self.where} (id {self.id})" if self.id is not None else self.where
        return f"{named}: {f'{self.field} {self.reason}'.strip()}"


@dataclass(frozen=True)
class Row:
    """One raw record.

    Paths name nested fields with dots; every method raises `Fault` where the field does not hold what it asks for.
    """

    where: str
    index: int  # position in the file from 0, the id of records that have none
    values: dict[str, Any]

    def has(self, path: str) -> bool:
        """Whether the field is there and filled: null, an empty cell and an empty list count as absent."""
        try:
            return self.get(path) not in ("", [])
        except Fault:
            return False

    def get(self, path: str) -> Any:
        value: Any = self.values
        keys = path.split(".")
        for depth, key in enumerate(keys):
            if not isinstance(value, dict):
                raise Fault(".".join(keys[:depth]), "is not an object")
            value = value.get(key)
            if value is None:
                raise Fault(".".join(keys[: depth + 1]), "is missing")
        return value

    def join(self, default: str | None) -> str | None:
        """What stands before its answers: its field `join` ("none" or "", "space" or " "), else `default`."""
        if (value := self.values.get("join")) is None:
            return default
        known = {**{name: name for name in JOINS}, "": "none", " ": "space"}
        if not isinstance(value, str) or value not in known:
            raise Fault("join", f"is neither {' nor '.join(JOINS)}")
        return known[value]

    def id(self, path: str) -> str:
        """The record's own id, or its position in the file."""
        if not self.has(path):
            return str(self.index)
        value = self.get(path)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise Fault(path, "is neither a number nor text")
        return phrase(str(value), path)

    def phrase(self, path: str) -> str:
        """A subject or a target, without white space around it."""
        return phrase(self.get(path), path)

    def phrases(self, path: str) -> list[str]:
        """A list of targets, at least one."""
        values = [phrase(value, f"{path}[{position}]") for position, value in enumerate(_items(self.get(path), path))]
        if not values:
            raise Fault(path, "is empty")
        return values

    def text(self, path: str) -> str:
        """A text that others may follow, without white space at its end."""
        return prompt(self.get(path), path).rstrip()

    def prompt(self, path: str) -> str:
        """A probe's prompt."""
        return prompt(self.get(path), path)

    def prompts(self, path: str, required: bool = True) -> list[str]:
        """A list of probe prompts, in order and with repeats; it may be empty."""
        if not required and not self.has(path):
            return []
        return [prompt(value, f"{path}[{position}]") for position, value in enumerate(_items(self.get(path), path))]

    def template(self, path: str, subject: str) -> str:
        """The prompt to edit, with one slot `{}`: given so, or made of a full sentence (see `sentence`)."""
        text = self.prompt(path)
        if "{}" not in text:
            return self.sentence(path, subject)
        if text.count("{}") > 1:
            raise Fault(path, "holds more than one slot {}")
        return text

    def sentence(self, path: str, subject: str) -> str:
        """The prompt to edit, given as a full sentence in which the subject becomes the slot (see `slot_prompt`)."""
        text = self.prompt(path)
        if "{}" in text:
            raise Fault(path, "holds a slot {} where a full sentence is expected")
        try:
            return slot_prompt(text, subject)
        except RejectedRequest:
            raise Fault(path, "does not contain the subject") from None


def phrase(value: Any, path: str) -> str:
    return _text(value, path).strip()


def prompt(value: Any, path: str) -> str:
    return _text(value, path)


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise Fault(path, "is not text")
    if not value.strip():
        raise Fault(path, "is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise Fault(path, "is not valid Unicode") from None
    return value


def _items(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise Fault(path, "is not a list")
    return value
