"""What a module is usually given: its inputs on running text, which an edit should leave alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edit_cli.corpora import Corpus
from edit_cli.errors import MissingError
from edit_cli.lm.hooks import StopForward, exact, on_input
from edit_cli.lm.model import LM
from edit_cli.lm.tokens import by_length, pad_right

LONGEST = 256  # tokens of a document, the rest is cut
DOCUMENTS = 64  # read at a time


@torch.no_grad()
def inputs_on_text(lm: LM, module: str, corpus: Corpus, count: int, seed: int) -> Tensor:
    """(count, d_in) float32: what enters `module` at the tokens of the corpus, but for the first of each document; unedited model.

    Raises:
        MissingError: the corpus has too little text.
    """
    found: list[Tensor] = []
    total = 0
    documents = iter(corpus.documents(seed))
    with lm.pristine(), lm.monitor.task("memory", count) as advance:
        while total < count:
            texts = [text for _, text in zip(range(DOCUMENTS), documents, strict=False)]
            if not texts:
                raise MissingError(f"corpus {corpus.label} has {total:,} usable tokens, and {count:,} are wanted: lower method.memory_size or validation_size")
            inputs = _inputs(lm, module, texts)
            found.append(inputs[: count - total])
            total += len(found[-1])
            advance(len(found[-1]))
    return torch.cat(found)


def _inputs(lm: LM, module: str, texts: list[str]) -> Tensor:
    rows = [ids for ids in lm.tokenizer(texts)["input_ids"] if len(ids) > 1]
    rows = [ids[: min(LONGEST, lm.head.max_length)] for ids in rows]
    found = inputs_of_rows(lm, module, rows)
    return torch.cat([states[1:] for states in found]) if rows else torch.zeros(0, 0, device=lm.device)


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
