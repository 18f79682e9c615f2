"""Numbers in sentences."""

from __future__ import annotations

import pytest

from edit_cli.wording import many


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (many(1, "fact"), "1 fact"),
        (many(0, "fact"), "0 facts"),
        (many(2000, "fact"), "2,000 facts"),
        (many(1, "pair of facts has", "pairs of facts have"), "1 pair of facts has"),
        (many(2, "pair of facts has", "pairs of facts have"), "2 pairs of facts have"),
    ],
)
def test_one_is_one(told, expected):
    assert told == expected
