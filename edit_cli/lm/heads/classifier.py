"""How a sequence classifier answers the two questions: a target is the name of a label, and the answer is the likeliest
label's name.

The prompt is tokenized as any text, with the special tokens around it. A model with a single output z tells two labels
apart: the second one has the probability σ(z), which is the softmax over (0, z).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.lm.fast.edits_by_row import meeting
from edit_cli.lm.heads.answers import Answers
from edit_cli.lm.heads.encoder import EncoderHead
from edit_cli.lm.hooks import exact
from edit_cli.lm.tokenization import Row, by_length, pad_right, told
from edit_cli.requests import EditRequest
from edit_cli.writing import bare


@dataclass(frozen=True)
class Labeled(Row):
    """A text (`ids`) and the number of its label, null where only the text is meant."""

    label: int | None = None

    @property
    def target(self) -> tuple[int, ...]:
        return () if self.label is None else (self.label,)


class ClassifierHead(EncoderHead[Labeled]):
    """Encoding and scoring for models that choose one of several labels."""

    kind = "classifier"
    NAME = "a classifier"
    PADDING: ClassVar[tuple[str, ...]] = ("pad_token_id",)

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        device: torch.device,
        batch_tokens: int,
        labels: Sequence[str] | None = None,
    ) -> None:
        """labels: names in the order of the logits, of a single output what a negative and a positive one mean; None:
        those that the model's configuration gives.

        Raises:
            UsageError: not as many names as there are labels, or a model of one output that gives numbers.
        """
        super().__init__(model, tokenizer, device, batch_tokens)
        config = self.model.config
        self.single = config.num_labels == 1
        if self.single and not labels and getattr(config, "problem_type", None) == "regression":
            raise UsageError(
                "this model has a single output, a number: if a positive one means a label, name both by"
                " model.labels=[NAME,NAME], first that of a negative one"
            )
        own = ["LABEL_0", "LABEL_1"] if self.single else [config.id2label[i] for i in range(config.num_labels)]
        self.labels = list(labels or own)
        if labels and not len({name.casefold() for name in labels}) == len(labels) == len(own):
            raise UsageError(
                f"model.labels={self.labels}: this classifier tells {len(own)} labels apart, so give as many names"
            )

    @property
    def classes(self) -> int:
        return len(self.labels)

    def written(self, prompt: str, target: str) -> str:
        """The target as it comes out of `generate` after the prompt."""
        return self.labels[self._number(target)]

    def encode(self, pairs: Sequence[tuple[str, str | None]], new: int = 0) -> list[Labeled]:
        """(text, label) pairs; a label of None gives the text alone.

        Raises:
            RejectedRequest: a text that is too long or has a token without an embedding, or no label of this model.
        """
        rows = self._prompts([prompt for prompt, _ in pairs])
        labels = [None if target is None else self._number(target) for _, target in pairs]
        return [Labeled(row.ids, row.start, row.offsets, label) for row, label in zip(rows, labels, strict=True)]

    def _number(self, target: str) -> int:
        names = [name.casefold() for name in self.labels]
        name = bare(target)
        if name.casefold() not in names:
            raise RejectedRequest(f"target {name!r} is no label of this classifier, which has {', '.join(self.labels)}")
        return names.index(name.casefold())

    def trying(self, request: EditRequest) -> EditRequest:
        return EditRequest(f"{request.prompt} Paris.", request.subject, self._another(request.text))

    def _another(self, prompt: str) -> str:
        """Another label than the model gives."""
        (says,) = self.generate([prompt], 1)
        return next(label for label in self.labels if label != says)

    def run(self, ids: Tensor, mask: Tensor) -> None:
        """A pass of the texts alone, for those who read states."""
        self.model(input_ids=ids, attention_mask=mask)

    def answers(self, rows: Sequence[Labeled], end: bool = False) -> Answers:
        """Scores of the rows' labels, one position a row; a label has no end."""
        logits = self._scores(rows)
        labels = torch.tensor([row.label for row in rows], device=logits.device)
        return Answers(logits, labels, torch.arange(len(rows), device=logits.device))

    def _inputs(self, rows: Sequence[Labeled]) -> dict[str, Tensor]:
        """What the model is called with."""
        ids, mask = pad_right([row.ids for row in rows], self.pad, self.device)
        return {"input_ids": ids, "attention_mask": mask}

    def _scores(self, rows: Sequence[Labeled]) -> Tensor:
        """(rows, labels), at least float32."""
        logits = exact(self.model(**self._inputs(rows)).logits)
        return torch.cat([torch.zeros_like(logits), logits], -1) if self.single else logits

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], max_new_tokens: int, edits: Sequence[int] | None = None) -> list[str]:
        """The likeliest label's name."""
        rows = self.encode([(prompt, None) for prompt in prompts])
        names = [""] * len(rows)
        for batch in told(by_length([len(row.ids) for row in rows], self.batch_tokens), self.done):
            with meeting(self, edits and [edits[i] for i in batch]):
                logits = self._scores([rows[i] for i in batch])
            for index, best in zip(batch, logits.argmax(-1).tolist(), strict=True):
                names[index] = self.labels[best]
        return names

    @torch.no_grad()
    def alternatives(self, prompts: Sequence[str], count: int, max_new_tokens: int) -> list[list[str]]:
        rows = self.encode([(prompt, None) for prompt in prompts])
        found: list[list[str]] = [[] for _ in rows]
        for batch in told(by_length([len(row.ids) for row in rows], self.batch_tokens), self.done):
            order = self._scores([rows[i] for i in batch]).argsort(stable=True, dim=-1, descending=True)
            for index, best in zip(batch, order[:, :count].tolist(), strict=True):
                found[index] = [self.labels[label] for label in best]
        return found

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        max_tokens: int,
        top_k: int,
        edits: Sequence[int] | None = None,
    ) -> list[str]:
        """Refused."""
        raise UsageError("a classifier writes no texts: protocol.observe.sample=false leaves them out")
