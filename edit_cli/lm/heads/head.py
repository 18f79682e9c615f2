"""What every head gives, whatever its kind of model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from edit_cli.lm.fast.edits_by_row import EditsByRow
from edit_cli.lm.heads.answers import Answers, Likelihood
from edit_cli.lm.tokenization import Row
from edit_cli.lm.vocabulary import Vocabulary
from edit_cli.requests import EditRequest

R = TypeVar("R", bound=Row)


class Head(Protocol[R]):
    """How a model answers. Rows are the head's own: what `encode` makes, `answers` of the same head takes.

    So whoever has a head of any kind holds a `Head[Any]`, and hands its rows back to it. For the attributes see
    `BaseHead`; what one kind alone can do stands in its class.
    """

    READS: ClassVar[str]
    has_tokens: ClassVar[bool]
    tokenizer: Any
    batch_tokens: int
    vocabulary: Vocabulary
    pad: int
    done: Callable[[int], None]
    trackers: int
    edits_by_row: EditsByRow | None

    @property
    def kind(self) -> str: ...

    @property
    def max_length(self) -> int: ...

    @property
    def classes(self) -> int: ...

    @property
    def caches_keys(self) -> bool: ...

    @property
    def words(self) -> Tensor: ...

    def encode(self, pairs: Sequence[tuple[str, str | None]], new: int = 0) -> list[R]: ...

    def answers(self, rows: Sequence[R], end: bool = False) -> Answers: ...

    def run(self, ids: Tensor, mask: Tensor) -> None: ...

    def logits_at(
        self,
        ids: Tensor,
        mask: Tensor,
        rows: Tensor,
        columns: Tensor,
        past: Any = None,
        positions: Tensor | None = None,
    ) -> Tensor: ...

    def loglikelihood(
        self, pairs: Sequence[tuple[str, str]], edits: Sequence[int] | None = None
    ) -> list[Likelihood]: ...

    def target_logprobs(
        self, pairs: Sequence[tuple[str, str]], edits: Sequence[int] | None = None
    ) -> list[Tensor | None]: ...

    def token_nlls(self, texts: Sequence[str], window: int, edit: int | None = None) -> tuple[float, int]: ...

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int, edits: Sequence[int] | None = None
    ) -> list[str]: ...

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        max_tokens: int,
        top_k: int,
        edits: Sequence[int] | None = None,
    ) -> list[str]: ...

    def written(self, prompt: str, target: str) -> str: ...

    def refuse_unfit(self, prompts: Sequence[str]) -> None: ...

    def asked(self, words: str) -> str: ...

    def trying(self, request: EditRequest) -> EditRequest: ...

    def told(self) -> list[tuple[str, str]]: ...

    def trial(self) -> dict[str, Any]: ...

    def read(self, template: str, edits: Sequence[tuple[str, str, str]]) -> tuple[Tensor, Tensor]: ...
