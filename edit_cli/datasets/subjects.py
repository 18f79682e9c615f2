"""Whom a text is about, where a data set does not say: its first name, read off the capital letters.

Splits must share no subject, and locality is asked of the same subject and of others; for both a guess that is right
most of the time, and the same for all texts about one thing, will do.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

# words that open a sentence without being a name
_OPENERS = """
    A About After All Also Although An And Another Any Are As At Before Both But By Can Could Did Do Does During Each
    Every First For From Had Has Have He Her His How However I If In Into Is It Its Many May Most No Not Of On One Only
    Or Our She Since Some Such That The Their There These They This Those To Under Until Up Was We Were What When Where
    Which While Who Whom Whose Why Will With Would You
"""
OPENERS = frozenset(_OPENERS.split())
JOINERS = r"(?:of|the|and|de|la|von|van|der|du|al|in|for|on|to|at)"
WORD = r"[A-Z0-9\u00c0-\u00de][^\s,;:!?()\"]*"
POSSESSIVE = re.compile(r"['’]s?$")
NAMES = re.compile(rf"{WORD}(?:\s+(?:{JOINERS}\s+){{0,2}}{WORD})*")


def first_name(text: str) -> str | None:
    """The first run of capitalized words of `text`, without the words that open a sentence; None if there is none.

    Small words inside it belong to it ("Lord of the Rings"); a possessive or a full stop at its end does not.
    """
    for match in NAMES.finditer(text):
        words = match.group().split()
        while words and (words[0] in OPENERS or words[0].islower()):
            words = words[1:]
        name = POSSESSIVE.sub("", " ".join(words).rstrip(".,"))
        if any(character.isalpha() for character in name):
            return name
    return None


def split_of(subject: str, shares: Sequence[float], names: Sequence[str]) -> str:
    """One of `names`, the same for the same subject on every machine, in the proportions of `shares`."""
    digest = hashlib.sha256(" ".join(subject.casefold().split()).encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64 * sum(shares)
    for name, share in zip(names, shares, strict=True):
        place -= share
        if place < 0:
            return name
    return names[-1]
