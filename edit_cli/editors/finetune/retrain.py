"""Training on what the model was trained on with the edits among it: the ceiling of editing, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from edit_cli.editors.finetune.base import moved, step, tuning
from edit_cli.editors.old import Editor
from edit_cli.editors.passes import row_losses
from edit_cli.edits.edit import WeightDelta
from edit_cli.errors import MissingError, RejectedRequest, UsageError
from edit_cli.lm.hooks import exact
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import Row, pad_right
from edit_cli.requests import EditRequest
from edit_cli.statistics.corpora import EmbeddedText, PairFile, TextFile, embedded_pairs
from edit_cli.wording import many
from edit_cli.writing import as_text, bare

EMBEDDED = "embedded"
Pair = tuple[str, str]


@dataclass(kw_only=True)
class Retrain(Editor):
    """All weights go on from where they are, on the model's own training data in which every new fact stands
    `oversample` times.

    corpus: these data, or "embedded" for the packaged model's. Of a causal model text (a document a line, or .jsonl);
    of one that answers questions or judges claims .jsonl with a prompt and its answer a line. No others will do: on
    data that the model was not trained on, this is another experiment. field, fields: under which names they stand.
    contradictions: "drop" leaves out what names a subject together with its old answer (of claims: the edited claim
    with its old label); "keep" does not.
    ending: what follows an answer in text. row_tokens: documents are joined and cut into rows of so many tokens. lr
    falls to zero linearly. batch_size: rows, or pairs, in a step.
    """

    mass_editor = True
    heads = ("causal", "seq2seq", "classifier")

    corpus: str | None = None
    field: str = "text"
    fields: list[str] = dataclass_field(default_factory=lambda: ["prompt", "answer"])
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
        told, dropped = self._documents(requests, lm.head.kind)
        if dropped:
            lm.monitor.note(
                f"{many(dropped, 'document says', 'documents say')} what an edit contradicts, and is left out"
                " (method.contradictions=keep keeps it)"
            )
        rows, loss = (
            (self._rows(lm, told), text_loss) if lm.head.kind == "causal" else (_encoded(lm, told), answer_loss)
        )
        names = [name.replace(".original.", ".") for name, _ in lm.model.named_parameters()]
        with lm.monitor.phase("train"), tuning(lm, names) as weights:
            optimizer = torch.optim.AdamW(
                [weight.tuned for weight in weights], lr=self.lr, weight_decay=self.weight_decay
            )
            total = self.epochs * -(-len(rows) // self.batch_size)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / total)
            with lm.monitor.task("retraining", total) as advance:
                for batch in self._batches(rows):
                    step(optimizer, weights, loss(lm, batch))
                    schedule.step()
                    advance(1)
            return moved(weights, {"documents": len(told), "dropped": dropped, "rows": len(rows)})

    def require(self, model: str) -> None:
        if self.corpus is None:
            raise UsageError(
                "method.corpus has no value: retraining needs what this model was trained on (method.corpus=FILE: text,"
                " a document a line; prompts and answers, .jsonl, where the model answers or judges)"
            )
        if self.corpus != EMBEDDED:
            TextFile(self.corpus, self.field).require()

    def _documents(self, requests: Sequence[EditRequest], kind: str) -> tuple[list[Any], int]:
        """The training data with the new facts in it, and how many documents were left out: texts for a causal model,
        (prompt, answer) pairs for others.
        """
        if self.corpus is None:
            what = "text that this model was trained on (method.corpus=FILE, a document a line)"
            if kind != "causal":
                what = "prompts and answers that this model was trained on (method.corpus=FILE.jsonl, a pair a line)"
            raise UsageError(f"method.corpus has no value: retraining needs the {what}")
        if self.contradictions not in ("drop", "keep"):
            raise UsageError(f"method.contradictions={self.contradictions}: choose drop or keep")
        told: list[Any] = self._texts() if kind == "causal" else self._pairs(kind)
        contradicts: Any = CONTRADICTS[kind]
        keeps = self.contradictions == "keep"
        kept = told if keeps else [one for one in told if not any(contradicts(one, request) for request in requests)]
        new: list[Any] = [(request.text, bare(request.target_new)) for request in requests]
        if kind == "causal":
            new = [as_text(request.text, request.target_new) + self.ending for request in requests]
        return [*kept, *new * self.oversample], len(told) - len(kept)

    def _texts(self) -> list[str]:
        source = EmbeddedText() if self.corpus == EMBEDDED else TextFile(str(self.corpus), self.field)
        return list(source.documents(self.seed))

    def _pairs(self, kind: str) -> list[Pair]:
        if self.corpus == EMBEDDED:
            return embedded_pairs(kind)
        if len(self.fields) != 2:
            raise UsageError(f"method.fields={self.fields}: give two names, of the prompt and of its answer")
        return PairFile(str(self.corpus), (self.fields[0], self.fields[1]), "method.corpus").pairs()

    def _rows(self, lm: LM, documents: Sequence[str]) -> list[list[int]]:
        """Documents in random order, joined, in rows of `row_tokens` tokens."""
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(self.seed)).tolist()
        between = lm.tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids = lm.head.vocabulary.readable(
            [
                token
                for i in order
                for token in [*lm.tokenizer(documents[i], add_special_tokens=False)["input_ids"], *between]
            ]
        )
        return [ids[first : first + self.row_tokens] for first in range(0, len(ids) - 1, self.row_tokens)]

    def _batches(self, rows: Sequence[Any]) -> Iterator[list[Any]]:
        draw = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            order = torch.randperm(len(rows), generator=draw).tolist()
            for first in range(0, len(rows), self.batch_size):
                yield [rows[i] for i in order[first : first + self.batch_size]]


def _text_contradicts(text: str, request: EditRequest) -> bool:
    if request.subject is None or request.target_true is None:
        return False
    return request.subject in text and bare(request.target_true) in text


def _answer_contradicts(pair: Pair, request: EditRequest) -> bool:
    """The edited prompt with another answer, or what else is asked about its subject with the old one."""
    old = bare(request.target_true or "").casefold()
    names = request.subject is not None and request.subject in pair[0]
    return _label_contradicts(pair, request) or (names and pair[1].strip().casefold() == old)


def _label_contradicts(pair: Pair, request: EditRequest) -> bool:
    """The edited prompt with another label: the old one says nothing about other claims on its subject."""
    return pair[0] == request.text and pair[1].strip().casefold() != bare(request.target_new).casefold()


CONTRADICTS = {"causal": _text_contradicts, "seq2seq": _answer_contradicts, "classifier": _label_contradicts}


def _encoded(lm: LM, pairs: Sequence[Pair]) -> list[Row]:
    """The pairs as the model reads them, without those that it cannot.

    Raises:
        MissingError: it can read none of them.
    """
    rows: list[Row] = []
    for pair in pairs:
        with suppress(RejectedRequest):
            rows += lm.head.encode([pair])
    if not rows:
        raise MissingError(f"method.corpus holds nothing that {lm.name} can read: is it what the model was trained on?")
    if len(rows) < len(pairs):
        lm.monitor.note(
            f"{len(pairs) - len(rows):,} pairs are too long for {lm.name}, or no answer of its, and left out"
        )
    return rows


def answer_loss(lm: LM, rows: Sequence[Any]) -> Tensor:
    """Mean over rows of the mean negative log-likelihood of the answer's tokens and its end."""
    return row_losses(lm.head.answers(rows, end=True), len(rows)).mean()


def text_loss(lm: LM, rows: Sequence[Sequence[int]]) -> Tensor:
    """Mean negative log-likelihood of the rows' tokens after their first ones."""
    ids, mask = pad_right(rows, lm.head.pad, lm.device)
    logits = exact(lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1])
    real = mask[:, 1:].bool()
    return cross_entropy(logits[real.to(logits.device)], ids[:, 1:][real].to(logits.device))
