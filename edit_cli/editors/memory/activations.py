"""What a module is usually given: its inputs on running text, which an edit should leave alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import islice

import torch
from torch import Tensor

from edit_cli.editors.base import CORPUS, EXAMPLES, Context
from edit_cli.editors.passes import in_batches, passes
from edit_cli.errors import MissingError, RejectedRequest, UsageError
from edit_cli.lm.heads.classifier import ClassifierHead
from edit_cli.lm.hooks import StopForward, exact, on_input
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import Row, by_length, pad_right
from edit_cli.statistics.corpora import Corpus
from edit_cli.writing import as_text

TRAINING = "train"  # the split of the examples
LONGEST = 256  # tokens of a document, the rest is cut
WORDS = 100
DOCUMENTS = 64  # read at a time


def examples_of(context: Context, choice: str, key: str, split: str = TRAINING) -> list[tuple[str, str]]:
    """(prompt, right answer) pairs of a split; none where text was chosen, or the data have no such split.

    choice: auto, examples or corpus, the value of the setting `key`.

    Raises:
        UsageError: examples were chosen, and there are none to train on.
    """
    found = list(context.examples(split)) if context.examples and choice != CORPUS else []
    if split == TRAINING and not found and choice == EXAMPLES:
        raise UsageError(f"{key}=examples: the data have no training records beside those of this run ({key}=corpus)")
    return found


def text_of(corpus: Corpus | None, method: str) -> Corpus:
    """The corpus of a method that remembers text. Raises UsageError where there is none."""
    if corpus is None:
        raise UsageError(
            f"method.corpus has no value: {method} needs text that its edits must leave alone (corpus=NAME)"
        )
    return corpus


@torch.no_grad()
def inputs_on_text(lm: LM, module: str, corpus: Corpus, count: int, seed: int) -> Tensor:
    """(n, d_in) float32, n at most `count`: what enters `module` of the unedited model where it answers, on the
    documents of a corpus.

    Of running text these are all tokens but each document's first. Other models are asked: a classifier about each
    document, an encoder-decoder for a document's second half, the first being the prompt.

    Raises:
        MissingError: the corpus holds next to nothing.
    """
    found: list[Tensor] = []
    total = 0
    documents = iter(corpus.documents(seed))
    with lm.pristine(), lm.monitor.task("memory", count) as advance:
        while total < count and (texts := list(islice(documents, DOCUMENTS))):
            inputs = (
                _on_running_text(lm, module, texts)
                if lm.head.kind == "causal"
                else _on_answers(lm, module, _asked(lm, texts))
            )
            found.append(inputs[: count - total])
            total += len(found[-1])
            advance(len(found[-1]))
    if total < 2:
        raise MissingError(
            f"corpus {corpus.label} holds no text that this model can read: name another one (corpus=NAME)"
        )
    if total < count:
        lm.monitor.note(f"corpus {corpus.label} holds {total:,} tokens of the {count:,} that are wanted")
    return torch.cat(found)


@torch.no_grad()
def inputs_on_examples(lm: LM, module: str, pairs: Sequence[tuple[str, str]], count: int) -> Tensor:
    """(n, d_in) float32, n at most `count`: what enters `module` of the unedited model on (prompt, answer) pairs, in
    their order.

    All tokens but the first where prompt and answer are one text; otherwise where the answer is read from: each of its
    tokens and its end, or the one label.

    Raises:
        MissingError: fewer than two.
    """
    found: list[Tensor] = []
    total = 0
    with lm.pristine(), lm.monitor.task("memory", count) as advance:
        for batch in in_batches(pairs, DOCUMENTS):
            if total >= count:
                break
            some = pairs[batch]
            inputs = (
                _on_running_text(lm, module, [as_text(*pair) for pair in some])
                if lm.head.kind == "causal"
                else _on_answers(lm, module, some)
            )
            found.append(inputs[: count - total])
            total += len(found[-1])
            advance(len(found[-1]))
    if total < 2:
        raise MissingError(
            "the training records hold nothing that this model can read: take text instead (method.negatives=corpus)"
        )
    return torch.cat(found)


def _on_running_text(lm: LM, module: str, texts: list[str]) -> Tensor:
    rows = [lm.head.vocabulary.readable(ids) for ids in lm.tokenizer(texts)["input_ids"]]
    rows = [ids for ids in rows if len(ids) > 1]
    rows = [ids[: min(LONGEST, lm.head.max_length)] for ids in rows]
    return torch.cat([states[1:] for states in inputs_of_rows(lm, module, rows)])


def _asked(lm: LM, texts: list[str]) -> list[tuple[str, str]]:
    """Documents as questions to a model that does not go on with them."""
    found = []
    for words in (text.split()[:WORDS] for text in texts):
        half = len(words) // 2
        if half and isinstance(lm.head, ClassifierHead):
            found.append((" ".join(words), lm.head.labels[0]))
        elif half:
            found.append((" ".join(words[:half]), " ".join(words[half:])))
    return found


def _on_answers(lm: LM, module: str, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Where the answers are read from, pair after pair."""
    rows: list[Row] = []
    for pair in pairs:
        with suppress(RejectedRequest):
            rows += lm.head.encode([pair])
    kept: dict[int, Tensor] = {}
    for batch in by_length([len(row.ids) + len(row.target) for row in rows], lm.head.batch_tokens):
        with passes(lm, [rows[i] for i in batch], module, 0, end=True) as run:
            read = run.inputs[run.base.rows.to(run.inputs.device), run.columns].float()
        for place, index in enumerate(batch):
            kept[index] = read[run.base.rows == place]
    return torch.cat([kept[index] for index in range(len(rows))]) if rows else torch.zeros(0, 0, device=lm.device)


@torch.no_grad()
def inputs_of_rows(lm: LM, module: str, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """(tokens, d_in) float32 for each row of token ids: what enters `module`, in the model's present state."""
    kept: dict[int, Tensor] = {}
    for batch in by_length([len(ids) for ids in rows], lm.head.batch_tokens):
        ids, mask = pad_right([rows[i] for i in batch], lm.head.pad, lm.device)

        def see(states: Tensor, batch: list[int] = batch) -> None:
            for index, row in zip(batch, states, strict=True):
                kept[index] = exact(row[: len(rows[index])]).float()
            raise StopForward

        with on_input(lm.module(module), see, len(batch)), suppress(StopForward):
            lm.model(input_ids=ids, attention_mask=mask, use_cache=False)
    return [kept[index] for index in range(len(rows))]
