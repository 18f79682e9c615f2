"""What the triggers of a key have in common, told without human labels: how they end, and which words they share.

Shallow: they end alike. Semantic: they share a word, wherever it stands, that other text has seldom.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from edit_cli.inspection.prefixes import Prefix
from edit_cli.lm.reading import HookPoint, read
from edit_cli.lm.tokenization import Row

if TYPE_CHECKING:
    from edit_cli.lm.model import LM

WORD = re.compile(r"[^\W\d_]{4,}")
COMMON = 0.5  # share of the triggers that makes something a pattern
SELDOM = 0.03  # share of random prefixes up to which a word is telling
WORDS = 3  # shared words that are told
REMOVED = ("first", "last", "random")

Kind = Literal["shallow", "semantic", "none"]
Decode = Callable[[Sequence[int]], str]


def words_of(text: str) -> frozenset[str]:
    """Its words of four letters or more."""
    return frozenset(word.lower() for word in WORD.findall(text))


def background(texts: Iterable[str]) -> dict[str, float]:
    """{word: share of these texts that have it}."""
    found = [words_of(text) for text in texts]
    return {word: count / len(found) for word, count in Counter(word for words in found for word in words).items()}


def pattern(prefixes: Sequence[Prefix], decode: Decode, usual: Mapping[str, float]) -> dict[str, Any]:
    """What prefixes share: their most common last token and bigram, words beyond those, and whether they are from
    documents of their own.
    """
    size = len(prefixes)
    last, bigram = (_commonest([prefix.ids[-count:] for prefix in prefixes]) for count in (1, 2))
    texts = [decode(prefix.ids) for prefix in prefixes]
    shares = {word: share for word, share in background(texts).items() if usual.get(word, 0.0) <= SELDOM}
    words = sorted(shares, key=lambda word: (-shares[word], word))[:WORDS]
    kind: Kind = "none"
    if last[1] >= COMMON:
        kind = "shallow"
    elif words and shares[words[0]] >= COMMON:
        kind = "semantic"
    return {
        "kind": kind,
        "last": [decode(last[0]), last[1]],
        "bigram": [decode(bigram[0]), bigram[1]],
        "words": [[word, shares[word]] for word in words],
        "documents": len({prefix.document for prefix in prefixes}) / size,
    }


def _commonest(ends: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], float]:
    (found,) = Counter(ends).most_common(1)
    return found[0], found[1] / len(ends)


def without(prefix: Prefix, which: str, draw: random.Random) -> tuple[int, ...]:
    """The prefix without its first, its last or a random token; what a tokenizer puts before each text stays."""
    place = {"first": 0, "last": len(prefix.ids) - 1}.get(which)
    place = draw.randrange(len(prefix.ids)) if place is None else place
    return prefix.start + prefix.ids[:place] + prefix.ids[place + 1 :]


@torch.no_grad()
def removals(
    lm: LM, layer: int, triggers: Sequence[tuple[int, Sequence[tuple[Prefix, float]]]], seed: int
) -> list[dict[str, float] | None]:
    """Of every (key, its triggers with their coefficients) the mean relative change of the coefficient, over its size,
    where a token is removed; None for a key without a trigger of two tokens.
    """
    asked = []  # (number of the key, which token, key, coefficient, what is left of the prefix)
    for number, (key, found) in enumerate(triggers):
        draw = random.Random(f"{seed} {layer} {key}")
        for prefix, before in found:
            for which in REMOVED:
                if (left := without(prefix, which, draw)) and before:
                    asked.append((number, which, key, before, left))
    changes: list[dict[str, list[float]]] = [{which: [] for which in REMOVED} for _ in triggers]
    if asked:
        rows = [Row(left, len(left), ()) for *_, left in asked]
        point = HookPoint(lm.layout.mlp_out(layer), "input")
        (after,) = read(lm, rows, [len(row.ids) - 1 for row in rows], [point])
        for (number, which, key, before, _), row in zip(asked, after, strict=True):
            changes[number][which].append((row[key].item() - before) / abs(before))
    return [
        {which: sum(values) / len(values) for which, values in found.items()} if found["last"] else None
        for found in changes
    ]
