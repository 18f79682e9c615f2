"""THE tokenization rule: where targets begin and subjects end, for tokenizers that differ in everything they may
differ in.
"""

from __future__ import annotations

import pytest
import torch
from families import tokenizer

from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.lm.tokenization import by_length, pad_left, pad_right, tokenize
from edit_cli.writing import JOINER, answer, joined

TOKENIZERS = {
    f"{kind}{'-bos' * bos}{'-eos' * eos}-{side}": (kind, bos, eos, side)
    for kind in ("bytes", "pieces")
    for bos in (False, True)
    for eos in (False, True)
    for side in ("left", "right")
}
every = pytest.mark.parametrize("words", [tokenizer(*fields) for fields in TOKENIZERS.values()], ids=list(TOKENIZERS))


def decoded(words, ids) -> str:
    return words.decode(ids, skip_special_tokens=True)


@every
@pytest.mark.parametrize(
    "target", ["Paris", "the northern shore of the island", "東京", "🙂 Zoë", "++", "42", "\u00a0x"]
)
def test_prompt_and_target_are_cut_at_the_prompts_end(words, target):
    prompt = "Ada Lund's café is called"
    (row,) = tokenize(words, [(prompt, target)])
    assert decoded(words, row.ids[: row.start]) == prompt
    assert decoded(words, row.ids) == f"{prompt} {target.strip()}"
    assert row.target == row.ids[row.start :]
    assert len(row.offsets) == len(row.ids)


@every
def test_a_leading_space_in_the_target_makes_no_difference(words):
    rows = tokenize(words, [("Ada lives in", target) for target in ("Paris", " Paris", "  Paris ", "Paris\n")])
    assert len({row.ids for row in rows}) == 1
    assert len({row.start for row in rows}) == 1
    assert answer("Ada lives in", "  Paris ") == " Paris"


@every
def test_batches_tokenize_as_rows_do_alone_and_without_padding(words):
    pairs = [
        ("Ada", "Oslo"),
        ("The old lighthouse of Marlow stands on", "the northern shore"),
        ("C", "++"),
        ("Rome", None),
    ]
    assert tokenize(words, pairs) == [tokenize(words, [pair])[0] for pair in pairs]
    assert all(words.pad_token_id not in row.ids for row in tokenize(words, pairs))


@every
def test_no_eos_is_left_at_the_end(words):
    for row in tokenize(words, [("Ada lives in", "Oslo"), ("Ada lives in", None)]):
        assert row.ids[-1] != words.eos_token_id
        assert (row.ids[0] == words.bos_token_id) == (words("")["input_ids"][:1] == [words.bos_token_id])


@every
@pytest.mark.parametrize(
    "prefix, subject, rest",
    [
        ("", "Ada Lund", " lives in"),
        ("The mother tongue of ", "Ada Lund", " is"),
        ("Ada Lund met Ada Lund. Therefore ", "Ada Lund", " lives in"),  # the subject occurs before
        ("In ", "C", "++ code"),  # followed at once by a punctuation mark that the tokenizer may merge
        ("", "O'Brien", "'s café, in"),
        ("The capital of ", "東京", "は"),
        ("She said: ", "Zoë 🙂", "."),
        ("A. ", "Ada", ""),
        ("", "é", " is"),
    ],
)
def test_the_subjects_last_token_holds_its_last_character(words, prefix, subject, rest):
    text = prefix + subject + rest
    (row,) = tokenize(words, [(text, "Oslo")])
    character = len(prefix) + len(subject) - 1
    index = row.token_at(character)
    begin, end = row.offsets[index]
    assert begin <= character < end
    assert all(not begin <= character < end for begin, end in row.offsets[index + 1 :])
    # cut after that token, the text ends with the subject (or with what the tokenizer merged with its last character)
    read = decoded(words, row.ids[: index + 1])
    assert read.startswith(prefix + subject)
    assert len(read) - len(prefix + subject) <= (2 if rest.startswith(("++", "'s")) else 0)
    # cut before it, the subject is not complete
    assert not decoded(words, row.ids[:index]).startswith(prefix + subject)


def test_bos_moves_every_index_by_one():
    (plain,), (begun,) = (tokenize(tokenizer(bos=bos), [("Ada Lund lives in", "Oslo")]) for bos in (False, True))
    assert begun.ids[1:] == plain.ids
    assert begun.start == plain.start + 1
    assert [begun.token_at(at) - plain.token_at(at) for at in (0, 7, 12)] == [1, 1, 1]


def test_a_row_may_be_cut_after_any_token():
    (row,) = tokenize(tokenizer(), [("Ada Lund lives in", "Oslo")])
    cut = row.until(2)
    assert cut.ids == row.ids[:3]
    assert cut.target == ()
    assert row.until(len(row.ids) - 1) == row


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("target", ["", "  ", "\n"])
def test_an_empty_target_is_rejected(target, bos):
    with pytest.raises(RejectedRequest, match="target is empty for prompt 'Ada'"):
        tokenize(tokenizer(bos=bos), [("Ada", target)])


def test_an_empty_prompt_needs_a_bos():
    with pytest.raises(RejectedRequest, match="prompt is empty"):
        tokenize(tokenizer(), [("", "Oslo")])
    (row,) = tokenize(tokenizer(bos=True), [("", "Oslo")])
    assert row.start == 1


@pytest.mark.parametrize("eos", [False, True])
def test_an_empty_prompt_alone_is_the_bos(eos):
    words = tokenizer(bos=True, eos=eos)
    assert tokenize(words, [("", None)])[0].ids == (words.bos_token_id,)


def test_unknown_targets_are_rejected():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "Ada": 1, "Oslo": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    assert tokenize(words, [("Ada", "Oslo")])[0].target == (2,)
    assert tokenize(words, [("Ada", "Oslo Rome")])[0].target == (2, 0)
    with pytest.raises(RejectedRequest, match="'Rome' is unknown"):
        tokenize(words, [("Ada", "Rome")])


def test_a_character_that_the_tokenizer_drops_is_rejected():
    words = tokenizer()
    from tokenizers import normalizers

    words.backend_tokenizer.normalizer = normalizers.Replace("†", "")
    (row,) = tokenize(words, [("Ada†", "Oslo")])
    with pytest.raises(RejectedRequest, match="no token covers character 3"):
        row.token_at(3)


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(UsageError, match="no character offsets"):
        tokenize(object(), [("Ada", "Oslo")])
    assert tokenize(object(), []) == []


@pytest.mark.parametrize("pad, side", [(pad_left, "left"), (pad_right, "right")])
def test_padding_leaves_rows_as_they_are(pad, side):
    ids, mask = pad([[5, 6, 7], [8], [9, 9]], pad=9, device="cpu")
    assert ids.shape == mask.shape == (3, 3)
    assert [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)] == [[5, 6, 7], [8], [9, 9]]
    assert mask[1].tolist() == ([0, 0, 1] if side == "left" else [1, 0, 0])
    assert ids[mask == 0].tolist() == [9, 9, 9]
    assert ids.dtype == torch.long


@pytest.mark.parametrize("budget", [1, 10, 37, 10_000])
def test_batches_hold_every_row_once_within_the_budget(budget):
    lengths = [3, 9, 1, 4, 4, 20, 7, 2, 2, 2, 11]
    batches = by_length(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    assert by_length([], budget) == []


@every
@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("東京は", "東京"),
        ("Who is it?\n", "Ada Lund"),
        ('She said "', "Paris"),
        ("Ada Lund (", "Oslo"),
        ("Ada", ", Zoë"),
    ],
)
def test_no_space_is_put_where_there_is_to_be_none(words, prompt, target):
    (row,) = tokenize(words, [(prompt, target)])
    assert decoded(words, row.ids) == prompt + target
    assert decoded(words, row.ids[row.start :]).endswith(target[1:])  # a token may hold both sides of the joint
    assert row.offsets[row.start][1] > len(prompt)
    assert row.start == 0 or row.offsets[row.start - 1][1] <= len(prompt)


@every
def test_spaces_at_the_end_of_a_prompt_go_with_what_comes_after_it(words):
    for target in ("Oslo", None):
        plain, spaced = tokenize(words, [("Ada lives in", target), ("Ada lives in ", target)])
        assert spaced == plain
    newline, none = tokenize(words, [("Ada lives in\n", None), ("Ada lives in\n ", None)])
    assert none == newline
    assert decoded(words, newline.ids) == "Ada lives in\n"


def test_what_a_target_says_of_its_joint_is_no_part_of_it():
    words = tokenizer()
    spaced, glued = tokenize(words, [("東京は", joined("東京", "space")), ("Ada", joined("Oslo", "none"))])
    assert (decoded(words, spaced.ids), decoded(words, glued.ids)) == ("東京は 東京", "AdaOslo")
    with pytest.raises(RejectedRequest, match="target is empty"):
        tokenize(words, [("Ada", JOINER)])
