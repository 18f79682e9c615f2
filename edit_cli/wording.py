"""Numbers in sentences."""

from __future__ import annotations


def many(count: int, one: str, several: str | None = None) -> str:
    """`1 fact`, `2,000 facts`. several: where more than one takes more than an s."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def size(count: float) -> str:
    """`4.2 MB`"""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{count / power:,.1f} {unit}"
    return f"{count:.0f} B"
