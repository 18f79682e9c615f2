"""Sentences with known subject and target, as token rows for training.

A `Statement` marks where its subject and its target stand. That is all the trainer needs: the subject for the attention
bottleneck, the target for the loss. The invented world and files of real records both come down to lists of statements.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

NO_SUBJECT = -1


@dataclass(frozen=True)
class Statement:
    """`subject` and `targets` are character spans of `text`; there is none in filler, or where it is unknown."""

    text: str
    subject: tuple[int, int] | None = None
    targets: tuple[tuple[int, int], ...] = ()


def statement(template: str, subject: str, target: str) -> Statement:
    """The template told of that subject, up to the full stop after the target."""
    start = template.index("{}")
    prompt = template.replace("{}", subject, 1)
    return Statement(
        f"{prompt} {target}.", (start, start + len(subject)), ((len(prompt) + 1, len(prompt) + 1 + len(target)),)
    )


def listing(subject: str, targets: Sequence[str]) -> Statement:
    """ "subject: target, target." All answers at once: such lines speed up the learning of facts."""
    text, spans = f"{subject}:", []
    for target in targets:
        spans.append((len(text) + 1, len(text) + 1 + len(target)))
        text += f" {target},"
    return Statement(text[:-1] + ".", (0, len(subject)), tuple(spans))


@dataclass(frozen=True)
class Lines:
    """Tokenized statements.

    `inside` is the text that continues a document (leading space), `first` the one that opens it.

    Per token: its id; the offset to the last token of its subject (0 at that token, NO_SUBJECT outside); whether it is
    a target.
    """

    first: list[np.ndarray]  # each (3, tokens): ids, tokens left in the subject, is target
    inside: list[np.ndarray]


def tokenize(tokenizer: PreTrainedTokenizerFast, statements: Sequence[Statement]) -> Lines:
    """Each statement twice, without and with a leading space: byte-level BPE splits the two differently.

    Of a statement longer than the model's context the end is kept, where its target stands.
    """
    backend, longest = tokenizer.backend_tokenizer, tokenizer.model_max_length - 1
    first, inside = (_encode(backend, statements, shift) for shift in (0, 1))
    return Lines([line[:, -longest:] for line in first], [line[:, -longest:] for line in inside])


def _encode(backend: Tokenizer, statements: Sequence[Statement], shift: int) -> list[np.ndarray]:
    encodings = backend.encode_batch([" " * shift + statement.text for statement in statements])
    lines = []
    for statement, encoding in zip(statements, encodings, strict=True):
        line = np.zeros((3, len(encoding.ids)), dtype=np.int32)
        line[0] = encoding.ids
        line[1] = NO_SUBJECT

        def tokens(span: tuple[int, int], encoding: Any = encoding) -> tuple[int, int]:
            return encoding.char_to_token(span[0] + shift), encoding.char_to_token(span[1] + shift - 1)

        if statement.subject:
            start, last = tokens(statement.subject)
            line[1, start : last + 1] = np.arange(last - start, -1, -1)
        for span in statement.targets:
            start, last = tokens(span)
            line[2, start : last + 1] = 1
        lines.append(line)
    return lines


@dataclass(frozen=True)
class Text:
    """What one epoch reads: one statement of every group, drawn at random, and `filler_share` of all lines from the
    filler.
    """

    groups: Sequence[Sequence[Statement]]
    filler: Sequence[Statement]
    filler_share: float = 0.15


class Batches:
    """Packs statements into rows of tokens, anew in every epoch.

    Most rows are short, which is cheap and lets many statements stand near a beginning, as prompts do; `long_share` of
    the statements go into rows as long as the context, so that every position is learned.
    """

    def __init__(
        self, text: Text, tokenizer: PreTrainedTokenizerFast, rows: int, width: int, seed: int, long_share: float = 0.15
    ) -> None:
        flat = [statement for group in text.groups for statement in group]
        self.lines = tokenize(tokenizer, flat)
        self.filler = tokenize(tokenizer, text.filler)
        sizes = [len(group) for group in text.groups]
        self.spans = list(zip(np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True))
        self.fillers = round(len(text.groups) * text.filler_share / (1 - text.filler_share)) if text.filler else 0
        longest = max(line.shape[1] + 1 for lines in (self.lines, self.filler) for line in lines.first + lines.inside)
        self.tokens = rows * width
        self.short, self.long = max(width, longest), tokenizer.model_max_length
        self.long_share = long_share
        self.end, self.pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.rng = random.Random(f"{seed} rows")

    def epoch(self) -> list[np.ndarray]:
        """Batches (rows, 3, width) of about rows x width tokens: token ids, tokens left in the subject, is target."""
        rng = self.rng
        picks = [(self.lines, start + rng.randrange(size)) for start, size in self.spans]
        picks += [(self.filler, rng.randrange(len(self.filler.first))) for _ in range(self.fillers)]
        rng.shuffle(picks)
        cut = round(len(picks) * self.long_share)
        batches = []
        for width, chosen in ((self.long, picks[:cut]), (self.short, picks[cut:])):
            packed, rows = self._pack(chosen, width), max(1, self.tokens // width)
            batches += [packed[start : start + rows] for start in range(0, len(packed), rows)]
        return rng.sample(batches, len(batches))

    def _pack(self, picks: Sequence[tuple[Lines, int]], width: int) -> np.ndarray:
        end = np.array([[self.end], [NO_SUBJECT], [0]], dtype=np.int32)
        rows: list[list[np.ndarray]] = []
        used = width
        for lines, index in picks:
            if used + 1 + max(lines.first[index].shape[1], lines.inside[index].shape[1]) > width:
                rows.append([])
            # few lines open a new document inside a row; of those that open a row, some follow the end-of-text token
            opens = not rows[-1] or self.rng.random() < 0.1
            if opens and (rows[-1] or self.rng.random() < 1 / 3):
                rows[-1].append(end)
            rows[-1].append((lines.first if opens else lines.inside)[index])
            used = sum(piece.shape[1] for piece in rows[-1])
        packed = np.zeros((len(rows), 3, width), dtype=np.int32)
        packed[:, 0], packed[:, 1] = self.pad, NO_SUBJECT
        for row, pieces in enumerate(rows):
            joined = np.concatenate(pieces, axis=1)
            packed[row, :, : joined.shape[1]] = joined
        return packed
