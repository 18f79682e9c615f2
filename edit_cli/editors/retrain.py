"""Training on the original text with the edits among it: the ceiling of editing, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from edit_cli.corpora import Corpus, EmbeddedText, TextFile
from edit_cli.editors.base import Editor
from edit_cli.editors.tuning import moved, step, tuning
from edit_cli.edits import WeightDelta
from edit_cli.errors import UsageError
from edit_cli.lm.hooks import exact
from edit_cli.lm.model import LM
from edit_cli.lm.tokens import answer, pad_right
from edit_cli.requests import EditRequest
from edit_cli.wording import many

EMBEDDED = "embedded"


@dataclass(kw_only=True)
class Retrain(Editor):
    """All weights go on from where they are, on the model's own training text in which every new fact stands
    `oversample` times.

    corpus: that text: a file (plain text, a document a line, or .jsonl), or "embedded" for the packaged model's. No
    other text will do: on text that the model was not trained on, this is another experiment.
    contradictions: "drop" leaves out documents that name a subject together with its old answer; "keep" does not.
    ending: what follows an answer. row_tokens: documents are joined and cut into rows of so many tokens. lr falls to
    zero linearly.
    """

    mass_editor = True

    corpus: str | None = None
    field: str = "text"
    epochs: int = 1
    oversample: int = 10
    contradictions: str = "drop"
    ending: str = "."
    lr: float = 1.0e-4
    weight_decay: float = 0.01
    row_tokens: int = 64
    batch_size: int = 16
    seed: int = 0

    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> WeightDelta:
        """Dense updates of all parameters."""
        documents, dropped = self._documents(requests)
        if dropped:
            lm.monitor.note(
                f"{many(dropped, 'document says', 'documents say')} what an edit contradicts, and is left out"
                " (method.contradictions=keep keeps it)"
            )
        rows = self._rows(lm, documents)
        names = [name.replace(".original.", ".") for name, _ in lm.model.named_parameters()]
        with lm.monitor.phase("train"), tuning(lm, names) as weights:
            optimizer = torch.optim.AdamW(
                [weight.tuned for weight in weights], lr=self.lr, weight_decay=self.weight_decay
            )
            total = self.epochs * -(-len(rows) // self.batch_size)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / total)
            with lm.monitor.task("retraining", total) as advance:
                for batch in self._batches(rows):
                    step(optimizer, weights, text_loss(lm, batch))
                    schedule.step()
                    advance(1)
            return moved(weights, {"documents": len(documents), "dropped": dropped, "tokens": sum(map(len, rows))})

    def require(self, model: str) -> None:
        self._text().require()

    def _text(self) -> Corpus:
        if self.corpus is None:
            raise UsageError(
                "method.corpus has no value: retraining needs the text that this model was trained on"
                " (method.corpus=FILE, a document a line)"
            )
        if self.contradictions not in ("drop", "keep"):
            raise UsageError(f"method.contradictions={self.contradictions}: choose drop or keep")
        return EmbeddedText() if self.corpus == EMBEDDED else TextFile(self.corpus, self.field)

    def _documents(self, requests: Sequence[EditRequest]) -> tuple[list[str], int]:
        """The text with the new facts in it, and how many documents were left out."""
        told = list(self._text().documents(self.seed))
        kept = (
            told
            if self.contradictions == "keep"
            else [text for text in told if not any(_contradicts(text, r) for r in requests)]
        )
        new = [request.text + answer(request.target_new) + self.ending for request in requests] * self.oversample
        return [*kept, *new], len(told) - len(kept)

    def _rows(self, lm: LM, documents: Sequence[str]) -> list[list[int]]:
        """Documents in random order, joined, in rows of `row_tokens` tokens."""
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(self.seed)).tolist()
        between = lm.tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids = [
            token
            for i in order
            for token in [*lm.tokenizer(documents[i], add_special_tokens=False)["input_ids"], *between]
        ]
        return [ids[first : first + self.row_tokens] for first in range(0, len(ids) - 1, self.row_tokens)]

    def _batches(self, rows: Sequence[list[int]]) -> Iterator[list[list[int]]]:
        draw = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            order = torch.randperm(len(rows), generator=draw).tolist()
            for first in range(0, len(rows), self.batch_size):
                yield [rows[i] for i in order[first : first + self.batch_size]]


def _contradicts(text: str, request: EditRequest) -> bool:
    return (
        None not in (request.subject, request.target_true) and request.subject in text and request.target_true in text
    )


def text_loss(lm: LM, rows: Sequence[Sequence[int]]) -> Tensor:
    """Mean negative log-likelihood of the rows' tokens after their first ones."""
    ids, mask = pad_right(rows, lm.head.pad, lm.device)
    logits = exact(lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1])
    real = mask[:, 1:].bool()
    return cross_entropy(logits[real.to(logits.device)], ids[:, 1:][real].to(logits.device))
