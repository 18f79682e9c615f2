"""Two invented languages with a small grammar, and sentences in both.

The first has its verb between subject and object and adjectives after their nouns; plurals end in -im, past tense in a
particle before the verb. The second has its verb at the end and adjectives before their nouns; plurals end in -ta, the
object is marked by -o, past tense by an ending of the verb. Some nouns of the second have a rarer word beside the usual
one: a translation that is wanted instead.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

SYLLABLES = (
    [c + v for c in "bdfgklmnprstv" for v in "aeiou"],
    [c + v for c in ("sh", "ch", "th", "zh", "j", "h", "w", "y", "kr", "bl", "dr") for v in "aeiou"],
)
NOUNS, VERBS, ADJECTIVES, TIMES = 40, 16, 12, 6
RARER = 16  # nouns with two words
RARE = 0.1  # of their sentences use the second
PLURAL = ("im", "ta")
OBJECT, PAST_PARTICLE, PAST_ENDING = "o", "ven", "lu"


@dataclass(frozen=True)
class Pair:
    """A sentence, its translation, and the same with the rarer word for one of its nouns, if it has one."""

    source: str
    reference: str
    wanted: str | None


@dataclass(frozen=True)
class Languages:
    """Words of both, of the same meaning at the same place."""

    nouns: tuple[tuple[str, str], ...]
    verbs: tuple[tuple[str, str], ...]
    adjectives: tuple[tuple[str, str], ...]
    times: tuple[tuple[str, str], ...]
    rarer: dict[str, str]  # word: the other one, in the second language

    @property
    def words(self) -> list[str]:
        """Every form of every word, in both."""
        forms = [word for pairs in (self.adjectives, self.times) for pair in pairs for word in pair]
        for first, second in self.nouns:
            seconds = [second, *([self.rarer[second]] if second in self.rarer else [])]
            forms += [first, first + PLURAL[0]]
            forms += [noun + plural + case for noun in seconds for plural in ("", PLURAL[1]) for case in ("", OBJECT)]
        for first, second in self.verbs:
            forms += [first, second, second + PAST_ENDING]
        return sorted({*forms, PAST_PARTICLE})


def languages(seed: int) -> Languages:
    rng = random.Random(f"{seed} languages")
    taken: set[str] = {PAST_PARTICLE}

    def word(language: int) -> str:
        while True:
            found = "".join(rng.choices(SYLLABLES[language], k=rng.choice((2, 2, 3))))
            if found not in taken:
                taken.add(found)
                return found

    def pairs(count: int) -> tuple[tuple[str, str], ...]:
        return tuple((word(0), word(1)) for _ in range(count))

    nouns = pairs(NOUNS)
    rarer = {second: word(1) for _, second in nouns[:RARER]}
    return Languages(nouns, pairs(VERBS), pairs(ADJECTIVES), pairs(TIMES), rarer)


def sentences(spoken: Languages, seed: int, rare: float) -> Iterator[Pair]:
    """Sentences without an end. rare: share of rarer words where there is one; references and what is wanted of a
    sentence differ in one word.
    """
    rng = random.Random(f"{seed} sentences")
    while True:
        time = rng.choice(spoken.times) if rng.random() < 0.5 else None
        past = rng.random() < 0.5
        verb = rng.choice(spoken.verbs)
        phrases = [_Phrase.drawn(spoken, rng) for _ in range(2)]
        first = " ".join(
            [*([time[0]] if time else []), phrases[0].first(), *([PAST_PARTICLE] if past else []), verb[0],
             phrases[1].first()]
        )  # fmt: skip

        def second(
            chosen: list[str], phrases: list[_Phrase] = phrases, time: tuple[str, str] | None = time,
            verb: str = verb[1] + (PAST_ENDING if past else ""),
        ) -> str:  # fmt: skip
            parts = [
                phrase.second(word, case) for phrase, word, case in zip(phrases, chosen, ("", OBJECT), strict=True)
            ]
            return " ".join([*([time[1]] if time else []), *parts, verb])

        usual = [phrase.noun[1] for phrase in phrases]
        used = [spoken.rarer[word] if word in spoken.rarer and rng.random() < rare else word for word in usual]
        places = [place for place, word in enumerate(usual) if word in spoken.rarer]
        wanted = None
        if places:
            place = rng.choice(places)
            wanted = second([spoken.rarer[word] if at == place else word for at, word in enumerate(usual)])
        yield Pair(first, second(used), wanted)


@dataclass(frozen=True)
class _Phrase:
    """A noun, perhaps many of it, perhaps with an adjective."""

    noun: tuple[str, str]
    adjective: tuple[str, str] | None
    plural: bool

    @classmethod
    def drawn(cls, spoken: Languages, rng: random.Random) -> _Phrase:
        adjective = rng.choice(spoken.adjectives) if rng.random() < 0.5 else None
        return cls(rng.choice(spoken.nouns), adjective, rng.random() < 0.3)

    def first(self) -> str:
        noun = self.noun[0] + (PLURAL[0] if self.plural else "")
        return f"{noun} {self.adjective[0]}" if self.adjective else noun

    def second(self, word: str, case: str) -> str:
        noun = word + (PLURAL[1] if self.plural else "") + case
        return f"{self.adjective[1]} {noun}" if self.adjective else noun
