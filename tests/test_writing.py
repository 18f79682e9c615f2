"""What stands between a prompt and its answer, and where words end."""

from __future__ import annotations

import pytest

from edit_cli.writing import JOINER, answer, as_text, bare, find_words, joined, replace_words

SPACED = [
    ("The mother tongue of Ada Lund is", "French"),
    ("Question: Where does she live? Answer:", "Oslo"),
    ("Who wrote it?", "Ada"),
    ("The Beatles'", "drummer"),
    ('The band "U2"', "is Irish"),
    ("Der Film „Metropolis“", "ist von 1927"),
    ("The ticket costs 5€", "more"),
    ("She writes C++", "code"),
    ("She writes C#", "code"),
    ("The town -", "Oslo"),
    ("Rock &", "roll"),
    ("It is called", "'Tis Pity"),
    ("It is called", "«Nana»"),
    ("It is called", '"Nana"'),
    ("It costs", "$5"),
    ("It was", "-5 degrees"),
    ("The Chinese name of Beijing is", "北京"),
    ("대한민국의 수도는", "서울"),
    ("عاصمة فرنسا هي", "باريس"),
    ("सूर्य का रंग", "पीला"),
    ("สงครามสิ้นสุดในปี", "1945"),
    ('The word "東京"', "means"),
    ("", "Oslo"),
]
UNSPACED = [
    ("中国的首都是", "北京"),
    ("日本の首都は", "東京"),
    ("東京タワー", "は高い"),
    ("中华人民共和国成立于", "1949"),
    ("微软公司的英文名称是", "Microsoft"),
    ("เมืองหลวงของฝรั่งเศสคือ", "ปารีส"),
    ("ນະຄອນຫຼວງຂອງລາວແມ່ນ", "ວຽງຈັນ"),
    ("រាជធានីនៃកម្ពុជាគឺ", "ភ្នំពេញ"),
    ("မြန်မာနိုင်ငံ၏မြို့တော်မှာ", "နေပြည်တော်"),
    ("答案\uff1a", "Paris"),
    ('他说"', "你好"),
    ("他说“", "Hello"),
    ("他说“你好”", "然后"),
    ('She said "', "yes"),
    ("She said '", "yes"),
    ("Elle dit « ", "oui"),
    ("She (", "born in Oslo"),
    ('She ("', "Ada"),
    ("Han sa ”", "ja"),
    ("¿", "Dónde"),
    ("It costs $", "5"),
    ("It costs US$", "5"),
    ("Peter Parker is Spider-", "Man"),
    ("It was -", "5 degrees"),
    ("km/", "h"),
    ("See https://", "example.org"),
    ("x=", "5"),
    ("She is number #", "1"),
    ("Who wrote it?\n", "Ada"),
    ("The town\t", "Oslo"),
    ("The price rose by 50", "%"),
    ("She lives in Oslo", ", Norway"),
    ("She lives in Oslo", "."),
    ("She (born 1990", ") lives"),
    ("She is Ada", "'s sister"),
    ("She is Ada", "’s sister"),
    ('She said "yes', '"'),
    ("首都", "\uff0c北京"),
]


@pytest.mark.parametrize(("prompt", "target"), SPACED)
def test_a_space_stands_between_words(prompt, target):
    assert answer(prompt, target) == f" {target}"


@pytest.mark.parametrize(("prompt", "target"), UNSPACED)
def test_nothing_stands_where_the_characters_ask_for_none(prompt, target):
    assert answer(prompt, target) == target
    assert as_text(prompt, target) == prompt + target


def test_a_target_may_say_itself_what_stands_before_it():
    assert answer("中国的首都是", joined("北京", "space")) == " 北京"
    assert answer("www.", joined("example", "none")) == "example"
    assert answer("www.", joined("example", None)) == " example"
    assert answer("Who?\n", " Ada ") == "Ada"  # there is white space already
    assert joined(JOINER + "x", "space") == JOINER + "x" and joined(" x", "none") == " x"
    assert [bare(joined("Ada", join)) for join in ("none", "space", None)] == ["Ada"] * 3


@pytest.mark.parametrize(
    ("text", "words", "place"),
    [
        ("The Parisian mayor of Paris", "Paris", 22),
        ("Paris-based, Parisian", "Paris", 0),
        ("Paris's mayor", "Paris", 0),
        ("The Parisian mayor", "Paris", 4),  # nowhere as a whole word
        ("C and C++", "C++", 6),
        ("巴黎人说巴黎", "巴黎", 0),  # words have no ends there
        ("ProiPhone和iPhone的制造商", "iPhone", 10),
        ("cafe\u0301 and cafe", "cafe", 10),  # the accent belongs to the word
        ("Oslo", "Rome", -1),
        ("aaa", "aa", 0),
    ],
)
def test_whole_words_come_first(text, words, place):
    assert find_words(text, words) == place


def test_words_are_replaced_as_wholes_where_they_stand_as_such():
    assert replace_words("Austria, US; US-made", "US", "UK") == "Austria, UK; UK-made"
    assert replace_words("Parisian", "Paris", "Rom") == "Romian"
    assert replace_words("x", "y", "z") == "x"
