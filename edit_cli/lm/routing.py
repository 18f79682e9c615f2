"""Routes stand in front of a model: for some prompts another answerer, or another text, gives the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

if TYPE_CHECKING:
    from torch import Tensor

    from edit_cli.lm.edit import Edit
    from edit_cli.lm.heads.answers import Likelihood


class Answerer(Protocol):
    """Whatever can be asked the two questions (and sampled from). target_logprobs: as `LM.target_logprobs`; None from
    those that have no distribution, such as a stored text.
    """

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]: ...

    def target_logprobs(self, pairs: Sequence[tuple[str, str]]) -> Sequence[Tensor | None]: ...

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]: ...

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], max_tokens: int, top_k: int) -> list[str]: ...


@dataclass(frozen=True)
class Destination:
    """Who answers, and the prompt that is put to them."""

    answerer: Answerer
    prompt: str


class Router(Protocol):
    def destinations(self, below: Answerer, prompts: Sequence[str]) -> list[Destination | None]: ...


class AttachedRouter(Router, Protocol):
    """An edit that says who answers; covered: a later one answers for it, too."""

    @property
    def covered(self) -> bool: ...


def is_route(edit: Edit) -> TypeGuard[AttachedRouter]:
    """Does this edit say who answers?"""
    return edit.kind == "route"


@dataclass
class Routed:
    """An answerer with one route in front of it; prompts that the route does not claim pass through to `below`."""

    below: Answerer
    route: Router

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        def ask(who: Answerer, which: list[int], prompts: list[str]) -> list[Likelihood]:
            return who.loglikelihood([(prompt, pairs[i][1]) for i, prompt in zip(which, prompts, strict=True)])

        return self._dispatch([prompt for prompt, _ in pairs], ask)

    def target_logprobs(self, pairs: Sequence[tuple[str, str]]) -> list[Tensor | None]:
        def ask(who: Answerer, which: list[int], prompts: list[str]) -> Sequence[Tensor | None]:
            return who.target_logprobs([(prompt, pairs[i][1]) for i, prompt in zip(which, prompts, strict=True)])

        return self._dispatch([prompt for prompt, _ in pairs], ask)

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        return self._dispatch(prompts, lambda who, _, texts: who.generate(texts, max_new_tokens))

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], max_tokens: int, top_k: int) -> list[str]:
        return self._dispatch(
            prompts, lambda who, which, texts: who.sample(texts, [seeds[i] for i in which], max_tokens, top_k)
        )

    def _dispatch(
        self, prompts: Sequence[str], ask: Callable[[Answerer, list[int], list[str]], Sequence[Any]]
    ) -> list[Any]:
        found = self.route.destinations(self.below, prompts)
        groups: dict[int, tuple[Answerer, list[int], list[str]]] = {}
        for index, (prompt, to) in enumerate(zip(prompts, found, strict=True)):
            to = to or Destination(self.below, prompt)
            _, which, texts = groups.setdefault(id(to.answerer), (to.answerer, [], []))
            which.append(index)
            texts.append(to.prompt)
        answers: list[Any] = [None] * len(prompts)
        for who, which, texts in groups.values():
            for index, result in zip(which, ask(who, which, texts), strict=True):
                answers[index] = result
        return answers
