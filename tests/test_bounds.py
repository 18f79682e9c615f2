"""Values that no setting can have are refused by name, wherever they come from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from annotated_types import Gt, Le, Len, Lt

from edit_cli.config.schema import (
    Config,
    Count,
    Layers,
    Limit,
    Mark,
    Natural,
    NonNegative,
    Positive,
    Seed,
    SettingError,
    Share,
    describe,
)


@dataclass(frozen=True, kw_only=True)
class Some(Config):
    """One setting of each sort."""

    place = "some"

    steps: Count = 1
    warmup: Natural = 0
    offset: int = 0
    lr: Positive = 0.1
    weight_decay: NonNegative = 0.0
    clip: Limit | None = math.inf
    dropout: Share = 1.0
    momentum: Annotated[float, Gt(0), Lt(1)] = 0.9
    most: Annotated[int, Le(9)] = 9
    seed: Seed = 0
    layers: Layers = field(default_factory=list)
    lengths: list[Count] = field(default_factory=list)
    kinds: Annotated[list[Literal["mlp", "attn"]], Len(1), Mark.DISTINCT] | None = None
    batch_size: Count | Literal["all", "auto"] = "auto"
    switch: bool = False
    sizes: dict[str, int] | None = None


WRONG = [
    ("steps", 0, "give a whole number from 1 up"),
    ("steps", 1.5, "give a whole number from 1 up"),
    ("steps", True, "give a whole number from 1 up"),
    ("steps", 2**63, "up to 9,223,372,036,854,775,807"),
    ("warmup", -1, "give a whole number from 0 up"),
    ("lr", 0.0, "give a number above 0"),
    ("lr", math.nan, "give a number above 0"),
    ("lr", math.inf, "give a finite number above 0"),
    ("weight_decay", -0.1, "give a number from 0 up"),
    ("weight_decay", math.inf, "give a finite number from 0 up"),
    ("clip", math.nan, "give a number above 0 or null"),
    ("clip", 0.0, "give a number above 0 or null"),
    ("dropout", 1.5, "give a number above 0 and up to 1"),
    ("momentum", 1.0, "give a number above 0 and below 1"),
    ("most", 10, "give a whole number up to 9"),
    ("seed", 2**32, "give a whole number from 0 to 4,294,967,295"),
    ("layers", [1, -1], "give a list of whole numbers from 0 up, such as [1, 2]"),
    ("layers", [1, 1], "1 occurs twice; name it once"),
    ("kinds", ["mlp", "attn", "mlp"], "mlp occurs twice"),
    ("kinds", [], "give a list of mlp or attn, such as [mlp]"),
    ("kinds", ["bones"], "give a list of mlp or attn, such as [mlp]"),
    ("batch_size", "some", "give a whole number from 1 up, all or auto"),
    ("batch_size", 0, "give a whole number from 1 up, all or auto"),
    ("switch", 1, "give true or false"),
    ("sizes", [1], "give settings in braces, such as {a: 1, b: 2}"),
]
RIGHT = [
    ("weight_decay", 0.0), ("seed", 0), ("offset", -3), ("clip", math.inf), ("clip", None), ("layers", [0, 1]),
    ("lengths", [5, 5]), ("batch_size", "all"), ("batch_size", 7), ("dropout", 1.0), ("warmup", 0), ("sizes", {"a": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "told"), WRONG)
def test_what_makes_no_sense_is_refused(name, value, told):
    with pytest.raises(SettingError) as caught:
        Some(**{name: value})
    assert str(caught.value).startswith(f"some.{name}=")
    assert told in str(caught.value)


@pytest.mark.parametrize(("name", "value"), RIGHT)
def test_what_makes_sense_is_taken(name, value):
    assert getattr(Some(**{name: value}), name) == value


def test_a_whole_number_is_a_number_too():
    assert isinstance(Some(lr=1).lr, float)


def test_a_type_is_told_in_words():
    assert describe(Literal["a", "b", "c"]) == "choose a, b or c"
    assert describe(Literal["a"] | None) == "choose a or null"
    assert describe(str | None) == "text or null"
