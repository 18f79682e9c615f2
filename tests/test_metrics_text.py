"""Answer matching, entropy and TF-IDF similarity on texts whose values are known."""

from __future__ import annotations

import math
import random

import pytest

from edit_cli.metrics.text import (
    EntropyMeter,
    ReferenceScorer,
    clean,
    contains_any,
    first_sentence,
    matches_exactly,
    normalize,
)
from edit_cli.writing import JOINS, joined


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The  Eiffel Tower! ", "eiffel tower"),
        ("An apple, a day", "apple day"),
        ("U.S.", "us"),
        ("A", "a"),
        ("«São Paulo»", "são paulo"),
        ("...", ""),
        ("Theory", "theory"),
    ],
)
def test_normalize(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("text", "answer", "reply"),
    [
        (" Paris. It is big.", "Paris", "Paris"),
        (" Paris\nLondon", "Paris", "Paris"),
        (" 3.5 million people", "3.5", "3.5 million people"),
        (" St. Petersburg. It is", "St. Petersburg", "St. Petersburg"),
        (" Really? Yes", "Really?", "Really"),
        ("", "Paris", ""),
    ],
)
def test_reply_ends_at_the_first_sentence_end(text, answer, reply):
    assert first_sentence(text, answer) == reply


def test_exact_match():
    assert matches_exactly(" the U.S. Army. He", ["U.S. Army"])
    assert matches_exactly(" Big Apple", ["New York", "the big apple"])
    assert not matches_exactly(" Paris, France", ["Paris"])
    assert not matches_exactly("", ["Paris"])


def test_an_answer_without_letters_matches_nothing():
    assert not matches_exactly("", ["..."])
    assert not contains_any("anything", ["..."])


def test_contains_respects_words_and_the_natural_stop():
    assert contains_any(" in the city of Paris, France", ["Paris"])
    assert not contains_any(" a Parisian café", ["Paris"])
    assert not contains_any(" London. Not Paris", ["Paris"])
    assert contains_any(" known as the New York City", ["Big Apple", "New York"])


def test_clean_is_nfkd_with_blank_lines_as_spaces():
    assert clean("ﬁne\n\nday") == "fine day"


def test_entropy_of_known_texts():
    """a b a b a b: bigrams ab ×3, ba ×2; trigrams aba ×2, bab ×2."""
    two = -(3 / 5 * math.log2(3 / 5) + 2 / 5 * math.log2(2 / 5))
    assert EntropyMeter()("a b a b a b") == pytest.approx(two / 3 + 2 * 1.0 / 3)
    assert EntropyMeter()("x x x x x") == 0.0


def test_entropy_of_all_different_words_is_the_logarithm_of_their_number():
    words = [f"w{i}" for i in range(10)]
    assert EntropyMeter()(" ".join(words)) == pytest.approx((math.log2(9) + 2 * math.log2(8)) / 3)


def test_short_texts_have_no_entropy():
    assert EntropyMeter()("") == EntropyMeter()("one two") == 0.0
    assert EntropyMeter()("one two three") > 0.0


def test_sentence_ends_inside_a_text_are_words_of_their_own():
    """Without a sentence splitter NLTK leaves "came." in one piece, which moves the entropy by several points."""
    assert EntropyMeter().words("He came. She can't go.") == ["He", "came", ".", "She", "ca", "n't", "go", "."]


def test_reference_score_of_the_same_and_of_unrelated_texts():
    scorer = ReferenceScorer({"1": ["red green", "blue"], "2": ["north south"], "3": [], "4": [" "]})
    texts = [["red green blue"], ["east west"], ["red"], ["red"], ["red"]]
    same, unrelated, *without = scorer(["1", "2", "3", "4", "unknown"], texts)
    assert same == pytest.approx(1.0)
    assert unrelated == 0.0
    assert without == [None, None, None]


def test_reference_score_by_hand():
    """Two documents, "aa bb" and "bb cc": idf of aa, cc = 1 + ln(3/2), of bb = 1. Cosine of "bb" and "aa bb"."""
    rare = 1 + math.log(3 / 2)
    (score,) = ReferenceScorer({"1": ["aa bb"], "2": ["bb cc"]})(["1"], [["bb"]])
    assert score == pytest.approx(1 / math.sqrt(1 + rare**2))


def test_reference_score_does_not_depend_on_which_cases_are_scored():
    scorer = ReferenceScorer({"1": ["aa bb"], "2": ["bb cc"]})
    assert scorer(["2"], [["bb"]]) == pytest.approx(scorer(["1", "2"], [["aa"], ["bb"]])[1:])
    assert scorer([], []) == []


def test_scripts_without_spaces_have_their_own_ends_of_sentences_and_words():
    assert first_sentence("北京。它是首都。") == "北京"
    assert first_sentence("東京\uff01ほか") == "東京"
    assert matches_exactly("北京。它是首都。", ["北京"])
    assert contains_any("北京市。", ["北京"]) and contains_any("是北京", ["北京"])
    assert contains_any("首都是Paris\uff0c法国", ["Paris"])
    assert contains_any("กรุงเทพมหานคร", ["กรุงเทพ"])
    assert not contains_any("首都是Parisian", ["Paris"])
    assert not contains_any("北京。不是上海", ["上海"])


def test_what_an_answer_says_of_its_joint_is_no_part_of_it():
    for join in JOINS:
        assert normalize(joined("Oslo", join)) == "oslo"
        assert matches_exactly("Oslo.", [joined("Oslo", join)]) and contains_any("in Oslo", [joined("Oslo", join)])


@pytest.mark.parametrize("seed", range(3))
def test_words_are_nltks_whatever_stands_between_them(seed):
    """Most words are not put to NLTK at all, others without those around them."""
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    meter, rng = EntropyMeter(), random.Random(seed)
    sentences, tokenizer = PunktSentenceTokenizer(), NLTKWordTokenizer()
    parts = [
        *"can cannot gonna wanna Gimme 'tis 'twas more'n d'ye ' '' \" `` ` . .. ... , : a b I x 1 2,3 3.14 - -- —"
        " ( ) [ ] { } < >"
        " « » “ ” ’ ‘ ! ? * % $ & ; s 's n't 'll 'LL don't Mr. é 東京 İ g\u0131mme ² _ the not na is t".split(),
        "\n",
        "\t",
        " ",
        "\xa0",
    ]
    for _ in range(700):
        text = "".join(rng.choice(parts) + " " * (rng.random() < 0.55) for _ in range(rng.randrange(1, 14)))
        assert meter.words(text) == [word for s in sentences.tokenize(text) for word in tokenizer.tokenize(s)], text
