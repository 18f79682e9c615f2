"""How texts are written: what stands between a prompt and its answer, and where words end.

Both are told by the characters that meet, by their Unicode properties. THE rule of `answer` holds wherever a prompt and
its answer become one text: when a fact is edited, scored, told in a context, or given as a reply.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

JOINER = "\u2060"  # WORD JOINER: a target that begins with it follows its prompt at once
JOINS = {"none": JOINER, "space": " "}  # what the setting `join` may say, and how a target says it
# Scripts without spaces, as Unicode names their characters. The first write other scripts and digits without spaces,
# too (成立于1949年); the others set them apart (ในปี 1949).
EAST_ASIAN = frozenset({"CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "BOPOMOFO", "YI"})
SOUTH_EAST_ASIAN = frozenset({"THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE", "BALINESE", "TAI"})
INVISIBLE = frozenset({"\u200b", JOINER})  # they part or join words without a width of their own
CLOSING = frozenset(".,;:!?…%‰°。、،؛؟।॥")
STRAIGHT = frozenset("\"'`")
BINDING = frozenset("/\\_&=")  # like dashes: they stand between two words, with spaces on both sides or on neither
PREFIXES = frozenset("#@")
THINK, THOUGHT = "<think>", "</think>"  # what reasoning models put around what they do not say
CONTRACTED = re.compile(r"['’](?:s|t|d|m|re|ve|ll)\b", re.IGNORECASE)


def answer(prompt: str, target: str) -> str:
    """The target as it is written after the prompt, with what stands between the two before it.

    A target that begins with white space asks for a space, one that begins with JOINER for nothing; all others follow
    `joint`.
    """
    text = bare(target)
    if target.startswith(JOINER):
        return text
    if target[:1].isspace():
        return text if prompt[-1:].isspace() else f" {text}"
    return joint(prompt, text) + text


def as_text(prompt: str, target: str) -> str:
    """Prompt and answer as one text."""
    return prompt + answer(prompt, target)


def bare(target: str) -> str:
    """The target alone, without white space around it and without what it says of its joint."""
    return target.strip().removeprefix(JOINER).strip()


def joined(target: str, join: str | None) -> str:
    """The target with what `join` (a key of JOINS, None for the rule) says of its joint, unless it says so itself."""
    if join is None or target[:1].isspace() or target.startswith(JOINER):
        return target
    return JOINS[join] + target


def joint(prompt: str, target: str) -> str:
    """A space, or nothing where the characters that meet ask for none.

    Nothing after white space, opening quotes and brackets, a currency sign, the sign of a tag, full-width punctuation,
    and dashes, slashes and the like that stand right behind a word; nothing before closing punctuation and contracted
    words; nothing within a script that is written without spaces.
    """
    if not prompt or not target:
        return " "
    return "" if (_leads_on(prompt, target) or _closes(target) or _flows(prompt, target)) else " "


def _leads_on(prompt: str, target: str) -> bool:
    """Whether the prompt's last character sticks to what comes after it."""
    last, before = prompt[-1], prompt[-2:-1]
    kind = unicodedata.category(last)
    stands_apart = not before or before.isspace()
    if kind == "Sc":
        return not before.isdigit()  # "5€" is a whole amount, "$" begins one
    if kind == "Pd" or last in BINDING:
        return not stands_apart or (last == "-" and target[:1].isdigit())
    if last == "−":
        return stands_apart and target[:1].isdigit()
    if _is_quote(last):  # one that opens in one language closes in another: „so“, »so«, ”so”, "so"
        return stands_apart or _leads_on(prompt[:-1], target) or (kind == "Pi" and is_unspaced(before))
    if last in PREFIXES:
        return stands_apart
    full_width = kind.startswith("P") and unicodedata.east_asian_width(last) in "WF"
    return last.isspace() or last in INVISIBLE or kind == "Ps" or last in "¿¡" or full_width


def _closes(target: str) -> bool:
    """Whether the target begins with what belongs to the word before it."""
    first = unicodedata.normalize("NFKC", target[:1])[:1]  # full-width marks are marks
    if _is_quote(first):
        alone = target.count(target[0]) == 1 and not target[1:2].isalnum()
        closing = alone and unicodedata.category(first) != "Pi"
        return closing or CONTRACTED.match(target) is not None
    return first in CLOSING or unicodedata.category(first) == "Pe"


def _flows(prompt: str, target: str) -> bool:
    """Whether both stand in a script without spaces, be it with a closing quote or bracket between them."""
    word = prompt
    while word and (_is_quote(word[-1]) or unicodedata.category(word[-1]) == "Pe"):
        word = word[:-1]
    left = _script(word[-1:])
    if left in EAST_ASIAN and word == prompt:
        return True
    return left in EAST_ASIAN | SOUTH_EAST_ASIAN and is_unspaced(target[:1])


def _is_quote(character: str) -> bool:
    return character in STRAIGHT or unicodedata.category(character) in ("Pi", "Pf")


def is_unspaced(character: str) -> bool:
    """Whether a character is of a script that puts no spaces between words."""
    return _script(character) in EAST_ASIAN | SOUTH_EAST_ASIAN


def _script(character: str) -> str:
    """The first word of the character's Unicode name, which for these scripts is the script; "" of no character."""
    plain = unicodedata.normalize("NFKC", character)[:1]  # half-width letters are named after their width
    return unicodedata.name(plain, "").split(" ")[0] if plain else ""


def spoken(text: str) -> str:
    """A reply without the thoughts of a reasoning model in it, closed or not; one without any as it is."""
    if THINK not in text and THOUGHT not in text:
        return text
    said = text.rpartition(THOUGHT)[2] if THOUGHT in text else text
    return said.partition(THINK)[0].lstrip()


def occurrences(text: str, part: str) -> Iterator[int]:
    """Where `part` begins in `text`, overlapping ones too."""
    at = text.find(part) if part else -1
    while at >= 0:
        yield at
        at = text.find(part, at + 1)


def find_words(text: str, words: str) -> int:
    """Where `words` first stands as whole words, else where it first stands at all; -1 where it does not."""
    whole = (at for at in occurrences(text, words) if is_whole(text, at, at + len(words)))
    return next(whole, text.find(words))


def replace_words(text: str, words: str, other: str) -> str:
    """`text` with `other` in place of `words`: wherever it stands as whole words, else wherever it stands."""
    places = [at for at in occurrences(text, words) if is_whole(text, at, at + len(words))]
    if not places:
        return text.replace(words, other)
    parts, end = [], 0
    for at in places:
        if at >= end:
            parts += [text[end:at], other]
            end = at + len(words)
    return "".join([*parts, text[end:]])


def is_whole(text: str, begin: int, end: int) -> bool:
    """Whether no word goes on across the ends of `text[begin:end]`."""
    return _parted(text[:begin][-1:], text[begin]) and _parted(text[end - 1], text[end : end + 1])


def _parted(left: str, right: str) -> bool:
    both = left and right and _in_word(left) and _in_word(right)
    return not both or is_unspaced(left) or is_unspaced(right)


def _in_word(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character).startswith("M")
