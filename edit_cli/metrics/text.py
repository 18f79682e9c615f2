"""Measures on generated text: answer matching, n-gram entropy, TF-IDF similarity."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from edit_cli.writing import bare, is_unspaced, occurrences

WORDS_KEPT = 2**16  # words, replies and places in texts, with what was found out about them
ARTICLES = frozenset({"a", "an", "the"})
STOPS = ".!?\u061f\u06d4\u0964\u0965"  # with Arabic, Urdu and Devanagari ones, before a space or the end
WIDE_STOPS = "\u3002\uff01\uff1f\uff0e\uff61\u104b\u17d4"  # of scripts without spaces: East Asian, Burmese, Khmer
SENTENCE_END = re.compile(rf"[{STOPS}](?=\s|$)|[{WIDE_STOPS}]")


@lru_cache(WORDS_KEPT)
def normalize(text: str) -> str:
    """Lower case, without punctuation and the articles a/an/the, spaces collapsed.

    Articles stay if nothing else is left.
    """
    plain = "".join(
        c for c in unicodedata.normalize("NFKC", bare(text)).lower() if not unicodedata.category(c).startswith("P")
    )
    words = plain.split()
    return " ".join([word for word in words if word not in ARTICLES] or words)


@lru_cache(WORDS_KEPT)
def first_sentence(text: str, answer: str = "") -> str:
    """What a reader takes as the reply: `text` up to its first line break or sentence end.

    Full stops inside the expected `answer` ("St. Petersburg") are no sentence ends, so as many ends are passed over.
    """
    line = text.strip().split("\n")[0]
    inside = len(SENTENCE_END.findall(bare(answer).rstrip(STOPS + WIDE_STOPS)))
    ends = [match.start() for match in SENTENCE_END.finditer(line)]
    return line[: ends[inside]] if len(ends) > inside else line


def matches_exactly(text: str, answers: Sequence[str]) -> bool:
    """Whether the reply in `text` is one of `answers` (normalized exact match)."""
    return any(
        bool(wanted := normalize(answer)) and normalize(first_sentence(text, answer)) == wanted for answer in answers
    )


def contains_any(text: str, answers: Sequence[str]) -> bool:
    """Whether the reply in `text` holds one of `answers` as whole words (normalized)."""
    return any(
        bool(wanted := normalize(answer)) and _holds(normalize(first_sentence(text, answer)), wanted)
        for answer in answers
    )


def _holds(reply: str, wanted: str) -> bool:
    """Whether `wanted` stands in `reply` between spaces, where its script puts spaces between words."""
    ends = ((at, at + len(wanted)) for at in occurrences(reply, wanted))
    return any(
        _parted(reply[:begin][-1:], wanted[0]) and _parted(wanted[-1], reply[end : end + 1]) for begin, end in ends
    )


def _parted(left: str, right: str) -> bool:
    return not left.strip() or not right.strip() or is_unspaced(left) or is_unspaced(right)


def clean(text: str) -> str:
    """A sampled text as the reference code reads it: NFKD, blank lines as a space."""
    return unicodedata.normalize("NFKD", text).replace("\n\n", " ")


class EntropyMeter:
    """Generation entropy (Zhang et al., 2018; "fluency" in ROME, Meng et al., 2022, §3.3).

    Tokens are those of NLTK's `word_tokenize` but for the sentence splitter: its trained parameters are a download, so
    the same Punkt algorithm runs without them. It then cuts after abbreviations, which hardly moves the entropy
    (docs/metrics.md).

    Most words stand alone: letters and digits between spaces, which no rule looks across. Only what stands between such
    words is put to NLTK, once.
    """

    def __init__(self) -> None:
        self._alone = lru_cache(WORDS_KEPT)(self._is_alone)
        self._parts = lru_cache(WORDS_KEPT)(self._split)

    @cached_property
    def _tokenizers(self) -> tuple[Any, Any]:
        from nltk.tokenize import NLTKWordTokenizer
        from nltk.tokenize.punkt import PunktSentenceTokenizer

        sentences = PunktSentenceTokenizer()  # untrained, so what it says to a place in a text is always the same
        sentences.text_contains_sentbreak = lru_cache(WORDS_KEPT)(sentences.text_contains_sentbreak)
        return sentences, NLTKWordTokenizer()

    def words(self, text: str) -> list[str]:
        sentences, _ = self._tokenizers
        return [word for sentence in sentences.tokenize(text) for word in self._words(sentence)]

    def _words(self, sentence: str) -> list[str]:
        words: list[str] = []
        begun, held = 0, sentence.split(" ")
        for place, word in enumerate([*held, None]):
            if word is None or self._alone(word):
                if begun < place:
                    words += self._parts(" ".join(held[begun:place]), begun > 0, place < len(held))
                if word is not None:
                    words.append(word)
                begun = place + 1
        return words

    def _is_alone(self, word: str) -> bool:
        """Whether it stays as it is, whatever stands beside it."""
        return word.isalnum() and self._split(word, True, True) == [word]

    def _split(self, text: str, after: bool, before: bool) -> list[str]:
        """NLTK's tokens of a text that stands after a word of its own, or before one, or is all there is."""
        _, words = self._tokenizers
        found = words.tokenize("x " * after + text + " x" * before)
        return found[after : len(found) - before]

    def __call__(self, text: str) -> float:
        """Bits: H₂/3 + 2·H₃/3 over the text's word bigrams and trigrams; 0 for fewer than three words."""
        words = self.words(clean(text))
        return (_entropy(words, 2) + 2 * _entropy(words, 3)) / 3 if len(words) >= 3 else 0.0


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = counts.total()
    return -math.fsum(count / total * math.log2(count / total) for count in counts.values())


class ReferenceScorer:
    """Reference score ("consistency" in ROME): how near a case's sampled texts are to its reference texts.

    Cosine of TF-IDF vectors, scikit-learn's `TfidfVectorizer` with its defaults, fitted on all distinct texts of
    `references` ({case id: texts}): pass those of the whole data set, then a case's score does not depend on which
    others were run.
    """

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        self.references = {
            case: tuple(texts) for case, texts in references.items() if any(text.strip() for text in texts)
        }

    @cached_property
    def _vectorizer(self) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        distinct = dict.fromkeys(text for texts in self.references.values() for text in texts)
        return TfidfVectorizer().fit(list(distinct))

    def __call__(self, cases: Sequence[str], texts: Sequence[Sequence[str]]) -> list[float | None]:
        """One cosine (0–1) a case, between its `texts`, joined, and its references, joined; None for a case without
        references.
        """
        scored = [index for index, case in enumerate(cases) if case in self.references and texts[index]]
        scores: list[float | None] = [None] * len(cases)
        if scored:
            place = {
                known: row for row, known in enumerate(dict.fromkeys(self.references[cases[index]] for index in scored))
            }
            known = self._vectorizer.transform([" ".join(known) for known in place])
            known = known[[place[self.references[cases[index]]] for index in scored]]
            sampled = self._vectorizer.transform([" ".join(map(clean, texts[index])) for index in scored])
            for index, cosine in zip(scored, np.asarray(known.multiply(sampled).sum(axis=1)).ravel(), strict=True):
                scores[index] = float(cosine)  # the rows have length 1
        return scores
