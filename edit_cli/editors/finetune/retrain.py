"""Training on what the model was trained on with the edits among it: the ceiling of editing, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from edit_cli.config.schema import Count, Linked, NonNegative, Positive, Seed
from edit_cli.editors.base import Context, Editor, EditorConfig
from edit_cli.editors.finetune.base import moved, step, tuning
from edit_cli.editors.passes import in_batches, row_losses
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


@dataclass(frozen=True, kw_only=True)
class RetrainConfig(EditorConfig):
    """Settings of retraining."""

    corpus: str | None = None
    """What the model was trained on, a FILE: text, a document a line or .jsonl, for a causal model; prompts and
    answers in .jsonl for one that answers questions or judges claims. Or `embedded` for the packaged model's. On other
    data this is another experiment."""
    field: str = "text"
    """Name of a document in a .jsonl file of text."""
    fields: list[str] = dataclass_field(default_factory=lambda: ["prompt", "answer"])
    """Names of a prompt and its answer in a .jsonl file of pairs."""
    epochs: Count = 1
    """Passes over these data."""
    oversample: Count = 10
    """How often each new fact stands among them."""
    contradictions: Literal["drop", "keep"] = "drop"
    """Whether documents that name a subject together with its old answer (of claims: the edited claim with its old
    label) are left out (drop), or not (keep)."""
    ending: str = "."
    """What follows an answer in text."""
    lr: Positive = 1e-4
    """Learning rate of AdamW; falls to zero linearly."""
    weight_decay: NonNegative = 0.01
    """Weight decay of AdamW."""
    row_tokens: Count = 64
    """Documents are joined and cut into rows of so many tokens."""
    batch_size: Count = 16
    """Rows, or pairs, in a step."""
    seed: Annotated[Seed, Linked("${seed}")] = 0
    """Of the order of the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.fields) != 2:
            raise UsageError(f"method.fields={self.fields}: give two names, of the prompt and of its answer")


class Retrain(Editor[RetrainConfig]):
    """All weights go on from where they are, on the model's own training data with the new facts among them."""

    Config = RetrainConfig
    mass_editor = True
    takes_long = "it goes through all that the model was trained on"
    heads = ("causal", "seq2seq", "classifier")

    @classmethod
    def require(cls, config: RetrainConfig, model: str, context: Context) -> None:
        if config.corpus is None:
            raise UsageError(
                "method.corpus has no value: retraining needs what this model was trained on (method.corpus=FILE: text,"
                " a document a line; prompts and answers, .jsonl, where the model answers or judges)"
            )
        if config.corpus != EMBEDDED:
            TextFile(config.corpus, config.field).require()

    def edit(self, requests: Sequence[EditRequest]) -> WeightDelta:
        """Dense updates of all parameters."""
        lm, config = self.lm, self.config
        told, dropped = self._documents(requests)
        if dropped:
            lm.monitor.note(
                f"{many(dropped, 'document says', 'documents say')} what an edit contradicts, and is left out"
                " (method.contradictions=keep keeps it)"
            )
        causal = lm.head.kind == "causal"
        rows, loss = (self._rows(told), text_loss) if causal else (_encoded(lm, told), answer_loss)
        names = [name.replace(".original.", ".") for name, _ in lm.model.named_parameters()]
        with lm.monitor.phase("train"), tuning(lm, names) as weights:
            trained = [weight.tuned for weight in weights]
            optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
            total = config.epochs * -(-len(rows) // config.batch_size)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / total)
            with lm.monitor.task("retraining", total) as advance:
                for batch in self._batches(rows):
                    step(optimizer, weights, loss(lm, batch))
                    schedule.step()
                    advance(1)
            return moved(weights, {"documents": len(told), "dropped": dropped, "rows": len(rows)})

    def _documents(self, requests: Sequence[EditRequest]) -> tuple[list[Any], int]:
        """The training data with the new facts in it, and how many documents were left out: texts for a causal model,
        (prompt, answer) pairs for others.
        """
        kind, config = self.lm.head.kind, self.config
        told: list[Any] = self._texts() if kind == "causal" else self._pairs(kind)
        contradicts: Any = CONTRADICTS[kind]
        keeps = config.contradictions == "keep"
        kept = told if keeps else [one for one in told if not any(contradicts(one, request) for request in requests)]
        new: list[Any] = [(request.text, bare(request.target_new)) for request in requests]
        if kind == "causal":
            new = [as_text(request.text, request.target_new) + config.ending for request in requests]
        return [*kept, *new * config.oversample], len(told) - len(kept)

    def _texts(self) -> list[str]:
        corpus = self._corpus("text that this model was trained on (method.corpus=FILE, a document a line)")
        source = EmbeddedText() if corpus == EMBEDDED else TextFile(corpus, self.config.field)
        return list(source.documents(self.config.seed))

    def _pairs(self, kind: str) -> list[Pair]:
        corpus = self._corpus(
            "prompts and answers that this model was trained on (method.corpus=FILE.jsonl, a pair a line)"
        )
        if corpus == EMBEDDED:
            return embedded_pairs(kind)
        prompt, answer = self.config.fields
        return PairFile(corpus, (prompt, answer), "method.corpus").pairs()

    def _corpus(self, what: str) -> str:
        if self.config.corpus is None:
            raise UsageError(f"method.corpus has no value: retraining needs the {what}")
        return self.config.corpus

    def _rows(self, documents: Sequence[str]) -> list[list[int]]:
        """Documents in random order, joined, in rows of `row_tokens` tokens."""
        tokenizer, size = self.lm.tokenizer, self.config.row_tokens
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(self.config.seed)).tolist()
        between = tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids = self.lm.head.vocabulary.readable(
            [
                token
                for i in order
                for token in [*tokenizer(documents[i], add_special_tokens=False)["input_ids"], *between]
            ]
        )
        return [ids[first : first + size] for first in range(0, len(ids) - 1, size)]

    def _batches(self, rows: Sequence[Any]) -> Iterator[list[Any]]:
        draw = torch.Generator().manual_seed(self.config.seed)
        for _ in range(self.config.epochs):
            order = torch.randperm(len(rows), generator=draw).tolist()
            for part in in_batches(rows, self.config.batch_size):
                yield [rows[i] for i in order[part]]


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
