"""Numbers that no setting can have are refused by name, wherever they stand."""

from __future__ import annotations

import math

import pytest

from edit_cli.config.bounds import fault

WRONG = [
    ("steps", 0, "a whole number from 1 up"),
    ("steps", -1, "a whole number from 1 up"),
    ("lr", 0.0, "a number above 0"),
    ("lr", math.nan, "finite"),
    ("weight_decay", -0.1, "a number from 0 up"),
    ("weight_decay", math.inf, "finite"),
    ("batch_tokens", 0, "from 1 up"),
    ("batch_tokens", -5, "from 1 up"),
    ("seed", 99999999999999999999999, "up to 4,294,967,295"),
    ("noise_seed", -1, "from 0 up"),
    ("top_tokens", 2**63, "up to 9,223,372,036,854,775,807"),
    ("layers", [1, -1], "from 0 up"),
    ("layers", [1, 1], "1 occurs twice"),
    ("kinds", ["mlp", "attn", "mlp"], "mlp occurs twice"),
    ("checkpoints", [10, 10], "10 occurs twice"),
    ("dropout", 1.5, "from 0 to 1"),
]
RIGHT = [
    ("weight_decay", 0.0), ("seed", 0), ("beta", -3.0), ("clip", math.inf), ("layers", [0, 1]), ("lengths", [5, 5]),
    ("fsdp", False), ("batch_size", "all"), ("limit", None), ("dropout", 1.0), ("layer", 0), ("warmup", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "told"), WRONG)
def test_what_makes_no_sense_is_refused(name, value, told):
    assert told in (fault(name, value) or "accepted")


@pytest.mark.parametrize(("name", "value"), RIGHT)
def test_what_makes_sense_is_taken(name, value):
    assert fault(name, value) is None
