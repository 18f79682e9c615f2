"""What heads of all kinds have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from edit_cli.errors import UsageError
from edit_cli.lm.fast.edits_by_row import EditsByRow
from edit_cli.lm.heads.answers import Answers, Likelihood
from edit_cli.lm.tokenization import Row, pad_right
from edit_cli.lm.vocabulary import Vocabulary
from edit_cli.requests import EditRequest

R = TypeVar("R", bound=Row)


class Head(ABC, Generic[R]):
    """How a model answers: the model with its tokenizer. Every batch is built by length within a token budget.

    Rows (R) are the head's own: what `encode` makes, `answers` of the same head takes. So whoever has a head of any
    kind holds a `Head[Any]`, and hands its rows back to it.

    Attributes:
        kind: a key of `kinds.NAMES`. READS: what a prompt is.
        has_tokens: whether a row's `ids` are tokens, with a state each.
        PADDING: names of the tokenizer's tokens that rows are padded with, the first that the model can read.
        done: hears how far an answer has come (see `LM.telling`).
        trackers: number of modules that look at whole prompts.
        edits_by_row: what rows of a question that names `edits` meet.
    """

    kind: ClassVar[str]
    READS: ClassVar[str] = "texts"
    has_tokens: ClassVar[bool] = True
    PADDING: ClassVar[tuple[str, ...]] = ("pad_token_id", "eos_token_id")

    def __init__(self, model: nn.Module, tokenizer: Any, device: torch.device, batch_tokens: int) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.device = device
        self.batch_tokens = batch_tokens
        self.vocabulary = self._vocabulary()
        self.pad = self.vocabulary.pad(*(getattr(tokenizer, name) for name in self.PADDING))
        self.done: Callable[[int], None] = lambda rows: None
        self.trackers = 0
        self.edits_by_row: EditsByRow | None = None

    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self.model, self.tokenizer)

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Tokens that the model has positions for."""

    @property
    @abstractmethod
    def classes(self) -> int:
        """What could stand at each token of an answer: words, or labels."""

    @property
    @abstractmethod
    def caches_keys(self) -> bool:
        """Whether rows can share keys and values of their earlier tokens."""

    @abstractmethod
    def encode(self, pairs: Sequence[tuple[str, str | None]], new: int = 0) -> list[R]:
        """Rows of (prompt, target) pairs that leave room for `new` tokens."""

    @abstractmethod
    def answers(self, rows: Sequence[R], end: bool = False) -> Answers:
        """Scores of the rows' targets, differentiable. end: of the token after them, too."""

    @abstractmethod
    def run(self, ids: Tensor, mask: Tensor) -> None:
        """One pass over (rows, tokens), for whoever listens to modules."""

    @abstractmethod
    def logits_at(
        self,
        ids: Tensor,
        mask: Tensor,
        rows: Tensor,
        columns: Tensor,
        past: Any = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits (places, classes) at chosen tokens of a batch."""

    @abstractmethod
    def loglikelihood(self, pairs: Sequence[tuple[str, str]], edits: Sequence[int] | None = None) -> list[Likelihood]:
        """See `LM.loglikelihood`; so with all questions."""

    @abstractmethod
    def target_logprobs(
        self, pairs: Sequence[tuple[str, str]], edits: Sequence[int] | None = None
    ) -> list[Tensor | None]: ...

    @abstractmethod
    def token_nlls(self, texts: Sequence[str], window: int, edit: int | None = None) -> tuple[float, int]: ...

    @abstractmethod
    def generate(
        self, prompts: Sequence[str], max_new_tokens: int, edits: Sequence[int] | None = None
    ) -> list[str]: ...

    def reply_by_beams(self, count: int) -> None:
        """Replies are looked for by so many beams from now on (UsageError: not by this model's)."""
        raise UsageError(f"model.beams={count}: only replies of encoder-decoder models are looked for by beams")

    @abstractmethod
    def alternatives(self, prompts: Sequence[str], count: int, max_new_tokens: int) -> list[list[str]]:
        """See `LM.alternatives`."""

    @abstractmethod
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        max_tokens: int,
        top_k: int,
        edits: Sequence[int] | None = None,
    ) -> list[str]: ...

    @abstractmethod
    def written(self, prompt: str, target: str) -> str:
        """The target as the model writes it after the prompt."""

    def refuse_unfit(self, prompts: Sequence[str]) -> None:
        """Refuse prompts of which none can be put to this model, before it is asked anything (UsageError)."""

    def asked(self, words: str) -> str:
        """What a user types, as a prompt."""
        return words

    def trying(self, request: EditRequest) -> EditRequest:
        """An edit to try the model with, made of one that suits a language model."""
        return request

    def told(self) -> list[tuple[str, str]]:
        """(topic, sentence) pairs: how the model reads, in words."""
        tokenizer = self.tokenizer
        start = tokenizer("")["input_ids"]
        before = repr(tokenizer.decode(start)) if start else "nothing"
        spaced, joined = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" Paris", "Paris"))
        space = "the same tokens" if spaced == joined else "different tokens"
        chat = "has a chat template" if getattr(tokenizer, "chat_template", None) else "has no chat template"
        context = f"context of {self.max_length:,} tokens"
        return [("text", f"{before} is put before every text; ' Paris' and 'Paris' are {space}; {chat}; {context}")]

    def trial(self) -> dict[str, Any]:
        """What the model can be called with, to see what its modules do."""
        ids = torch.arange(1, 5, device=self.device)[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    # --- for networks that read edits (KE) ----------------------------------------------------------------------------

    @property
    def words(self) -> Tensor:
        """(vocabulary, width): embeddings that such a network begins with."""
        return self.model.get_input_embeddings().weight

    def read(self, template: str, edits: Sequence[tuple[str, str, str]]) -> tuple[Tensor, Tensor]:
        """(ids, mask), both (edits, tokens), of (old answer, new answer, prompt) as `template` puts them together."""
        texts = [template.format(old=old, new=new, prompt=prompt) for old, new, prompt in edits]
        return pad_right(self.tokenizer(texts)["input_ids"], self.pad, self.device)

    # ------------------------------------------------------------------------------------------------------------------

    def _stop_ids(self) -> list[int] | None:
        """Tokens after which a text that is written is over."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured, self.tokenizer.eos_token_id]
        return sorted({i for i in ids if i is not None}) or None

    def _decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text of `ids` up to the token that ends it, and of what stands before them."""
        stops = set(self._stop_ids() or ())
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        return self.tokenizer.decode([*after, *ids[:end]], skip_special_tokens=True, clean_up_tokenization_spaces=False)
