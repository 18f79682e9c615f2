"""What a module is usually given: its inputs on running text, which an edit should leave alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import islice

import torch
from torch import Tensor

from edit_cli.corpora import Corpus
from edit_cli.editors.passes import passes
from edit_cli.errors import MissingError, RejectedRequest
from edit_cli.lm.hooks import StopForward, exact, on_input
from edit_cli.lm.model import LM
from edit_cli.lm.tokens import by_length, pad_right

LONGEST = 256  # tokens of a document, the rest is cut
WORDS = 100
DOCUMENTS = 64  # read at a time


@torch.no_grad()
def inputs_on_text(lm: LM, module: str, corpus: Corpus, count: int, seed: int) -> Tensor:
    """(n, d_in) float32, n at most `count`: what enters `module` of the unedited model where it answers, on the documents of a corpus.

    Of running text these are all tokens but each document's first; of a classifier the token that it reads a text's label from; of a decoder
    beside an encoder the tokens of a document's second half, the first being the prompt.

    Raises:
        MissingError: the corpus holds next to nothing.
    """
    found: list[Tensor] = []
    total = 0
    documents = iter(corpus.documents(seed))
    with lm.pristine(), lm.monitor.task("memory", count) as advance:
        while total < count and (texts := list(islice(documents, DOCUMENTS))):
            inputs = _on_running_text(lm, module, texts) if lm.head.kind == "causal" else _on_answers(lm, module, texts)
            found.append(inputs[: count - total])
            total += len(found[-1])
            advance(len(found[-1]))
    if total < 2:
        raise MissingError(f"corpus {corpus.label} holds no text that this model can read: name another one (corpus=NAME)")
    if total < count:
        lm.monitor.note(f"corpus {corpus.label} holds {total:,} tokens of the {count:,} that are wanted")
    return torch.cat(found)


def _on_running_text(lm: LM, module: str, texts: list[str]) -> Tensor:
    rows = [ids for ids in lm.tokenizer(texts)["input_ids"] if len(ids) > 1]
    rows = [ids[: min(LONGEST, lm.head.max_length)] for ids in rows]
    return torch.cat([states[1:] for states in inputs_of_rows(lm, module, rows)])


def _on_answers(lm: LM, module: str, texts: list[str]) -> Tensor:
    found = []
    for text in texts:
        words = text.split()[:WORDS]
        if len(words) < 2:
            continue
        half, label = len(words) // 2, lm.head.kind == "classifier"
        pair = (" ".join(words), lm.head.labels[0]) if label else (" ".join(words[:half]), " ".join(words[half:]))
        with suppress(RejectedRequest), passes(lm, lm.head.encode([pair]), module, 0) as run:
            found.append(run.queries.float() if label else run.inputs[0, 1:].float())
    return torch.cat(found) if found else torch.zeros(0, 0, device=lm.device)


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

        with on_input(lm.module(module), see, len(batch)):
            try:
                lm.model(input_ids=ids, attention_mask=mask, use_cache=False)
            except StopForward:
                pass
    return [kept[index] for index in range(len(rows))]
