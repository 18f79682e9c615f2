"""One pass over the text: Σ k kᵀ of the keys of several layers at once (specification of locate-then-edit methods,
second moments).

A key is what enters the MLP output projection at one token. The float64 sums grow chunk by chunk, and what a chunk adds
depends on its documents alone: a pass that was cut off and continued gives the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edit_cli.distributed import ProcessGroup
from edit_cli.errors import MissingError
from edit_cli.files.described import Damaged
from edit_cli.files.shapes import checked
from edit_cli.lm.precision import exact_matmul
from edit_cli.monitor import Advance
from edit_cli.statistics import files
from edit_cli.statistics.chunk import Chunk, Document
from edit_cli.wording import many

if TYPE_CHECKING:
    from edit_cli.lm.model import LM
    from edit_cli.statistics.corpora import Corpus

CHUNK_BATCHES = 8  # documents of so many batches are sorted by length together
SAVE_SECONDS = 60.0  # partial sums are written no more often than that


@dataclass(frozen=True)
class Plan:
    """How far to read, and how. `documents` and `tokens`: stop at whichever comes first; None is no limit."""

    documents: int | None
    tokens: int | None
    max_length: int
    include_bos: bool
    seed: int
    batch_tokens: int


@dataclass
class Progress:
    """How far a pass has come.

    `text`: sha256 of the documents read, because a continued pass must come past the same ones.
    """

    tokens: int = 0
    documents: int = 0
    text: str = ""
    seconds: float = 0.0
    first: dict[str, float] = field(default_factory=dict)  # Σ ‖k‖² over the tokens at position 0, by layer


@dataclass
class Sums:
    """Running sums: Σ k kᵀ by layer, (m, m) float64 in host memory."""

    total: dict[int, Tensor]
    so_far: Progress

    @classmethod
    def zero(cls, lm: LM, layers: Sequence[int]) -> Sums:
        total = {layer: torch.zeros(lm.key_width(layer), lm.key_width(layer), dtype=torch.float64) for layer in layers}
        return cls(total, Progress(first={str(layer): 0.0 for layer in layers}))

    def continues(self, zero: Sums) -> bool:
        """Whether these can be sums that began as `zero`."""
        same = (self.total[layer].shape == total.shape for layer, total in zero.total.items())
        finite = all(total.dtype == torch.float64 and bool(total.isfinite().all()) for total in self.total.values())
        return all(same) and finite and self.so_far.first.keys() >= zero.so_far.first.keys()

    def add(self, chunk: Chunk, process_group: ProcessGroup) -> None:
        """Add this process's chunk, and those that the other processes have at the same time."""
        for layer, total in self.total.items():
            total += process_group.sum(chunk.total.get(layer, torch.zeros_like(total)).to("cpu", torch.float64))
            self.so_far.first[str(layer)] += process_group.sum(
                chunk.first.get(layer, torch.zeros(())).to("cpu", torch.float64)
            ).item()
        self.so_far.tokens += int(process_group.sum(torch.tensor(chunk.tokens)))


@dataclass
class Partial:
    """The file with the sums of an unfinished pass. Writing it takes at most about a tenth of the time."""

    path: Path
    _due: float = field(default_factory=lambda: time.monotonic() + SAVE_SECONDS)

    def load(self, layers: Sequence[int]) -> Sums | None:
        """The sums of `layers`, if they are all there."""
        try:
            tensors, about = files.read(self.path)
            so_far = Progress(**checked(about.get("so_far"), Progress, self.path))
            return Sums({layer: tensors[str(layer)] for layer in layers}, so_far)
        except (FileNotFoundError, Damaged, KeyError, MissingError):
            return None

    def save_if_due(self, sums: Sums) -> None:
        begin = time.monotonic()
        if begin < self._due:
            return
        files.write(
            self.path, {str(layer): total for layer, total in sums.total.items()}, {"so_far": asdict(sums.so_far)}
        )
        end = time.monotonic()
        self._due = end + max(SAVE_SECONDS, 10 * (end - begin))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


@torch.no_grad()
def sum_outer_products(lm: LM, layers: Sequence[int], corpus: Corpus, plan: Plan, unfinished: Partial) -> Sums:
    """Read the corpus once and return the sums of all `layers` of the model as it is, continuing what `unfinished`
    holds.

    Raises:
        MissingError: the corpus cannot be read, or has no text that becomes tokens.
        UsageError: keys are not finite in the model's dtype. OutOfMemory: a batch does not fit the device.
    """
    texts, sums, seen = _start(lm, layers, corpus, plan, unfinished)
    so_far, (unit, goal) = sums.so_far, _goal(corpus, plan)
    with (
        exact_matmul(),
        lm.monitor.task(f"second moments, layers {', '.join(map(str, layers))} ({unit})", goal) as advance,
    ):
        advance(getattr(so_far, unit))
        begin = time.perf_counter()
        stream = _chunks(lm, texts, plan, so_far)
        while chunks := list(islice(stream, lm.process_group.size)):
            chunk = Chunk(lm, layers, plan.batch_tokens)
            for documents in lm.process_group.share(chunks):  # one, or none at the very end
                chunk.read(documents, partial(_advance, advance, unit, len(chunks)))
            sums.add(chunk, lm.process_group)
            documents = list(chain.from_iterable(chunks))
            _hash(seen, (document.text for document in documents))
            so_far.documents, so_far.text = so_far.documents + len(documents), seen.hexdigest()
            now = time.perf_counter()
            so_far.seconds, begin = so_far.seconds + now - begin, now
            if lm.process_group.is_main:
                unfinished.save_if_due(sums)
    if not so_far.tokens:
        raise MissingError(f"corpus {corpus.label} gave no token: nothing to compute second moments from")
    if so_far.documents < (plan.documents or math.inf) and so_far.tokens < (plan.tokens or math.inf):
        read = f"{many(so_far.documents, 'document')}, {many(so_far.tokens, 'token')}"
        lm.monitor.note(f"{corpus.label} was read whole: {read}")
    return sums


def _start(
    lm: LM, layers: Sequence[int], corpus: Corpus, plan: Plan, unfinished: Partial
) -> tuple[Iterator[str], Sums, Any]:
    """(texts still to read, sums so far, running hash of the texts read)."""
    sums, texts, seen = unfinished.load(layers), corpus.documents(plan.seed), hashlib.sha256()
    zero = Sums.zero(lm, layers)
    if sums is None or not sums.continues(zero):
        return texts, zero, seen
    _hash(seen, islice(texts, sums.so_far.documents))
    if seen.hexdigest() == sums.so_far.text:
        lm.monitor.note(
            f"continuing the second moments after {many(sums.so_far.documents, 'document')}"
            f" ({many(sums.so_far.tokens, 'token')})"
        )
        return texts, sums, seen
    lm.monitor.note(f"{corpus.label} no longer gives the same documents: the second moments are started over")
    return corpus.documents(plan.seed), zero, hashlib.sha256()


def _hash(digest: Any, texts: Iterator[str]) -> None:
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")


def _goal(corpus: Corpus, plan: Plan) -> tuple[str, int | None]:
    """(what is counted, how many there will be)."""
    if plan.tokens:
        return "tokens", plan.tokens
    return "documents", min((n for n in (plan.documents, corpus.size()) if n), default=None)


def _advance(advance: Advance, unit: str, processes: int, tokens: int, documents: int) -> None:
    """The others read as much meanwhile."""
    advance((tokens if unit == "tokens" else documents) * processes)


def _chunks(lm: LM, texts: Iterator[str], plan: Plan, so_far: Progress) -> Iterator[list[Document]]:
    """The documents in groups of some batches, up to the plan's limits; the last one is cut to meet a limit of
    tokens.
    """
    if plan.documents:
        texts = islice(texts, plan.documents - so_far.documents)
    left = plan.tokens - so_far.tokens if plan.tokens else None
    chunk: list[Document] = []
    size = 0
    for document in _tokenized(lm, texts, plan):
        if left is not None:
            if left <= 0:
                break
            document = Document(document.text, document.ids[: left + document.skip], document.skip)
            left -= document.tokens
        chunk.append(document)
        size += len(document.ids)
        if size >= CHUNK_BATCHES * plan.batch_tokens:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _tokenized(lm: LM, texts: Iterator[str], plan: Plan) -> Iterator[Document]:
    bos = None if plan.include_bos else lm.tokenizer.bos_token_id
    while group := list(islice(texts, 64)):
        encoded = lm.tokenizer(group, truncation=True, max_length=plan.max_length)["input_ids"]
        for text, ids in zip(group, encoded, strict=True):
            ids = lm.head.vocabulary.readable(ids)
            yield Document(text, ids, skip=int(bos is not None and ids[:1] == [bos]))
