"""Numbers in sentences."""

from __future__ import annotations


def many(count: int, one: str, several: str | None = None) -> str:
    """`1 fact`, `2,000 facts`. several: where more than one takes more than an s."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"
