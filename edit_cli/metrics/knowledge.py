"""Which facts a model knows: one rule for all who ask, in the words of the metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edit_cli.metrics.observe import Observed, ObserveOptions, observe
from edit_cli.metrics.scores import accuracy, generated_contains
from edit_cli.requests import Case, Probe

RULES: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "reply": generated_contains,  # the true answer, or an alias, is in the reply that it writes
    "rank": accuracy,  # the true answer is its first choice, token by token
}


def first_choice(hits: Sequence[bool]) -> bool:
    """The rule `rank`, of the tokens of one answer."""
    return bool(accuracy({"target_hits": list(hits)}))


def question(case: Case) -> Case:
    """The case as it is asked whether its true answers are known: each edited prompt, the other right answers as
    aliases. Without a probe where one is not told.
    """
    rights = [case.right or ((request.target_true,) if request.target_true else ()) for request in case.requests]
    asked = [
        Probe("rewrite", request.words, right[0], aliases=right[1:], frame=request.frame)
        for request, right in zip(case.requests, rights, strict=True)
        if right
    ]
    return Case(case.id, (), tuple(asked) if len(asked) == len(rights) else ())


def known(lm: Observed, questions: Sequence[Case], by: str, max_new_tokens: int) -> list[bool]:
    """Whether the model knows all that each of the `question`s asks."""
    options = ObserveOptions(
        generate=by == "reply", max_new_tokens=max_new_tokens, sample=False, perplexity=False, top_tokens=0
    )
    return [
        bool(seen["probes"]) and all(RULES[by](probe) for probe in seen["probes"])
        for seen in observe(lm, questions, options)
    ]
