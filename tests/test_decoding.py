"""Rows that leave and join a batch write what they write alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import tiny_lm

from edit_cli.lm.fast.decoding import Decoder
from edit_cli.lm.heads.sampling import TopKDraws

PROMPTS = [
    "Ada",
    "The capital of France is the city of",
    "Ada Lovelace was born in",
    "The",
    "Ada",
    "In the old town of Paris, where the river bends,",
]


def model(family: str) -> Any:
    return tiny_lm(family)


def narrow(lm: Any, rows: int) -> Decoder:
    """The model's decoder with room for so many rows only, and for two short prompts a pass."""
    config = lm.model.config
    width = config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    longest = max(len(row.ids) for row in lm.head.encode([(prompt, None) for prompt in PROMPTS])) + 12
    bytes_a_token = 2 * config.num_hidden_layers * heads * width * 4
    return replace(lm.head._decoder, cache_bytes=rows * longest * bytes_a_token, prompt_tokens=8)


def texts(lm: Any, plainly: bool = False) -> tuple[list[str], list[str]]:
    lm.head.__dict__["decodes_together"] = not plainly
    return lm.generate(PROMPTS, 12), lm.sample(PROMPTS, range(len(PROMPTS)), 24, 5)


@pytest.mark.thin(2)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "bloom", "gpt_neox", "mistral", "qwen3"])
def test_texts_are_those_of_the_plain_path(family):
    lm = model(family)
    assert lm.head.decodes_together
    expected = texts(lm, plainly=True)
    assert texts(lm) == expected
    lm.head.__dict__["_decoder"] = narrow(lm, 2)  # rows wait, and join others that are under way
    assert texts(lm) == expected


def test_no_more_rows_are_written_at_once_than_there_is_room_for(monkeypatch):
    lm, seen, passes = model("gpt2"), [], Decoder.step

    def step(self, last, lengths, mask, cache):
        seen.append(len(last))
        return passes(self, last, lengths, mask, cache)

    monkeypatch.setattr(Decoder, "step", step)
    lm.head.__dict__["_decoder"] = narrow(lm, 2)
    texts(lm)
    assert max(seen) == 2


def test_logits_are_those_of_whole_texts():
    """Every token is chosen by what the model says to the whole text before it, whoever left or joined meanwhile."""
    lm = model("llama")
    rows = [row.ids for row in lm.head.encode([(prompt, None) for prompt in PROMPTS])]
    limits = [9, 1, 5, 0, 12, 3]
    said: dict[tuple[int, int], torch.Tensor] = {}

    def choose(logits, numbers, counts):
        said.update({key: row for key, row in zip(zip(numbers, counts, strict=True), logits, strict=True)})
        return logits.argmax(-1)

    ended: list[int] = []
    written = narrow(lm, 3).write(rows, limits, choose, lambda token: False, ended.append)
    assert [len(new) for new in written] == limits and sum(ended) == len(rows)
    with torch.no_grad():
        for number, (row, new) in enumerate(zip(rows, written, strict=True)):
            whole = lm.model(input_ids=torch.tensor([[*row, *new]])).logits[0]
            for count, token in enumerate(new):
                expected = whole[len(row) + count - 1]
                torch.testing.assert_close(said[number, count], expected, rtol=1e-5, atol=1e-5)
                assert token == int(expected.argmax())


def test_how_far_texts_have_come_is_told_while_none_has_ended():
    """All rows of a batch end together: a count of ended ones would stand at 0 until then."""
    lm = model("gpt2")
    heard: list[int] = []

    def choose(logits, numbers, counts):
        return logits.argmax(-1)

    rows = [lm.head.encode([("Ada", None)])[0].ids] * 8
    lm.head._decoder.write(rows, [8] * 8, choose, lambda token: False, heard.append)
    assert max(heard) == 1 and sum(heard) == 8  # one after another, though all end with the last token
    heard.clear()
    (one, *_) = lm.head._decoder.write(rows, [8] * 8, choose, lambda token: True, heard.append)
    assert len(one) == 1 and sum(heard) == 8


def test_half_as_many_rows_go_on_when_memory_runs_out(monkeypatch):
    lm, sizes, passes = model("gpt2"), [], Decoder.step
    expected = texts(lm)

    def step(self, last, lengths, mask, cache):
        sizes.append(len(last))
        if len(last) > 1 and mask.shape[1] > 14:
            raise torch.OutOfMemoryError("too much")
        return passes(self, last, lengths, mask, cache)

    monkeypatch.setattr(Decoder, "step", step)
    lm.head.__dict__["_decoder"] = narrow(lm, 4)
    assert texts(lm) == expected
    assert 4 in sizes and 1 in sizes


def test_one_row_that_does_not_fit_is_no_endless_loop(monkeypatch):
    lm = model("gpt2")

    def step(*_):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(Decoder, "step", step)
    with pytest.raises(torch.OutOfMemoryError):
        texts(lm)


def test_a_prompt_that_is_continued_twice_is_read_once(monkeypatch):
    lm, read, passes = model("gpt2"), [], Decoder._pass

    def whole(self, ids, mask, cache, positions):
        read.append(tuple(ids.shape))
        return passes(self, ids, mask, cache, positions)

    assert lm.head.decodes_together
    monkeypatch.setattr(Decoder, "_pass", whole)
    lm.head._write([(1, 2, 3)] * 5, [4] * 5, TopKDraws(range(5), [4] * 5, 5))
    assert read[0] == (1, 3) and max(rows for rows, _ in read) == 5
