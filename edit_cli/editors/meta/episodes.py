"""Episodes that a trained editor learns from: facts to edit (support), prompts on which the edit must work (query), and
prompts whose answers must stay (locality).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from edit_cli.config.schema import Config
from edit_cli.editors.meta.base_model_cache import BaseModelCache
from edit_cli.editors.meta.factored_gradients import DenseShift, Shift, shifted, sparing
from edit_cli.editors.passes import row_losses, rows_right
from edit_cli.errors import UsageError
from edit_cli.lm.heads.answers import Answers
from edit_cli.lm.heads.kinds import require_causal
from edit_cli.lm.model import LM
from edit_cli.requests import Case, Probe

WITHIN, BEYOND = ("paraphrase", "portability"), ("locality", "neighborhood")
Outer = Literal["any", "swapped", "seen", "unseen", "implied", "true_false"]
Locality = Literal["any", "same_answer", "random", "same_relation", "same_subject", "hard", "translation"]
Pair = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class EpisodeConfig(Config):
    """What is sampled for each fact."""

    place = "method.draw"

    outer: Outer = "any"
    """Where the edit must work: any rephrased prompts; those of a group, such as seen, where the data set marks them;
    or swapped: the edit is made in any wording of the fact and has to work in any other, and writes any answer that the
    same relation has for other subjects, so that as many facts make more edits to learn from."""
    locality: list[Locality] = field(default_factory=lambda: ["any"])
    """One prompt whose answer must stay of each of these groups, as data sets name them; any for all; same_answer for
    those of same_relation with the answer that the edit replaces, which are the hardest to spare. Where a fact has none
    of a group, any of its prompts is taken."""
    stays: Literal["answer", "text"] = "answer"
    """What of such a prompt must stay: its answer, or every token of the text that prompt and answer make (MEND for
    continuations; causal models)."""

    def refuse_unfit(self, lm: LM) -> None:
        """Refuse a model whose prompt and answer are not one text, where all of it must stay (UsageError)."""
        if self.stays == "text":
            require_causal(lm, "method.draw.stays=text")


@dataclass(frozen=True)
class Episode:
    """(prompt, answer) pairs of one edit: to write, on which it must work, and which must stay."""

    support: tuple[Pair, ...]
    query: tuple[Pair, ...]
    locality: tuple[Pair, ...]


def spared(cases: Sequence[Case]) -> list[Case]:
    """The cases, each with a prompt whose answer must stay: where the data give none, the next one's edited prompt."""
    completed: list[Case] = []
    others = [*cases[1:], *cases[:1]]
    for case, other in zip(cases, others, strict=True):
        if not _beyond(case) and case.requests and other.requests and other.requests[0].text != case.requests[0].text:
            (request,) = other.requests[:1]
            probe = Probe("locality", request.text, request.target_true or request.target_new)
            case = replace(case, probes=(*case.probes, probe))
        completed.append(case)
    return completed


def sample_episodes(cases: Sequence[Case], per_edit: int, config: EpisodeConfig) -> list[Episode]:
    """Episodes of `per_edit` cases each. What is sampled depends on torch's seed and a case's id alone.

    Raises:
        UsageError: a case of several requests, or without a prompt that must stay; or too few cases for one edit.
    """
    if len(cases) < per_edit:
        raise UsageError(
            f"{per_edit} facts are edited at once (method.edits), and the data set has {len(cases)}: give a lower"
            " number"
        )
    single = [_sample(case, config) for case in cases]
    return [_together(single[first : first + per_edit]) for first in range(0, len(single) - per_edit + 1, per_edit)]


def _together(parts: Sequence[Episode]) -> Episode:
    """One edit of all facts."""
    sides = zip(*((part.support, part.query, part.locality) for part in parts), strict=True)
    return Episode(*(tuple(pair for pairs in side for pair in pairs) for side in sides))


def _sample(case: Case, config: EpisodeConfig) -> Episode:
    if len(case.requests) != 1:
        raise UsageError(
            f"case {case.id} holds {len(case.requests)} requests: editors are trained on data sets with one a record"
        )
    rng = random.Random(f"{torch.initial_seed()}/{case.id}")
    (request,) = case.requests
    new = request.target_new
    within = [probe for probe in case.probes if probe.kind in WITHIN and probe.target]
    if config.outer not in ("any", "swapped"):
        within = [probe for probe in within if probe.group == config.outer] or within
    asked = [(probe.text, probe.target or "") for probe in within] or [(request.text, new)]
    beyond = _beyond(case)
    if config.locality and not beyond:
        raise UsageError(
            f"case {case.id} has no prompt whose answer must stay, nor has the data set another fact to take one from:"
            " give neighbors, or method.draw.locality=[]"
        )
    local = [_local(beyond, group, request.target_true, rng) for group in config.locality]
    if config.stays == "text":  # all that follows the first word is the answer
        local = [(first, rest) for first, _, rest in (f"{text} {answer}".partition(" ") for text, answer in local)]
    support, query = (request.text, new), rng.choice(asked)
    if config.outer == "swapped":
        answers = {probe.target or "" for probe in beyond if probe.group == "same_relation"} - {request.target_true}
        new = rng.choice([new, *sorted(answers - {new})]) if request.target_true else new
        wordings = list(dict.fromkeys([request.text, *(text for text, _ in asked)]))
        edited = rng.choice(wordings)
        support = (edited, new)
        query = (rng.choice([text for text in wordings if text != edited] or [edited]), new)
    return Episode((support,), (query,), tuple(local))


def _beyond(case: Case) -> list[Probe]:
    return [probe for probe in case.probes if probe.kind in BEYOND and probe.target]


def _local(beyond: Sequence[Probe], group: Locality, old: str | None, rng: random.Random) -> Pair:
    hardest = group == "same_answer"
    fitting = [
        probe for probe in beyond if group == "any" or probe.group == ("same_relation" if hardest else group)
    ] or beyond
    if hardest:
        fitting = [probe for probe in fitting if probe.target == old] or fitting
    probe = rng.choice(fitting)
    return probe.text, probe.target or ""


class EpisodeEvaluation:
    """Query and locality prompts of some episodes, asked of the model as it is, and then of as many edited ones in a
    single pass.
    """

    def __init__(self, cache: BaseModelCache, episodes: Sequence[Episode], lowest: int) -> None:
        """lowest: the first layer that an edit changes; blocks below it are run once."""
        self.lm, self.lowest, self.episodes = cache.lm, lowest, len(episodes)
        self.rows = cache.rows([pair for episode in episodes for pair in (*episode.query, *episode.locality)])
        kinds = [kind for episode in episodes for kind in [True] * len(episode.query) + [False] * len(episode.locality)]
        self.query = torch.tensor(kinds, device=self.lm.device)
        self.states, self.base = cache.answers(self.rows, lowest)

    def answers(self, shifts: Mapping[str, Shift | DenseShift]) -> Answers:
        """Each episode's rows, of a model with its own shift of each module."""
        with ExitStack() as stack:
            stack.enter_context(sparing(self.lm, self.rows, range(self.lowest, self.lm.layout.depth), self.episodes))
            if self.states is not None:
                stack.enter_context(self.lm.skipping(self.lowest - 1, self.states))
            stack.enter_context(shifted(self.lm, shifts))
            return self.lm.head.answers(self.rows, end=True)

    def losses(self, shifts: Mapping[str, Shift | DenseShift]) -> tuple[Tensor, Tensor, dict[str, float]]:
        """(mean NLL where the edits must work, mean KL(before ‖ after) where answers must stay, numbers to log)."""
        return losses(self.answers(shifts), self.base, self.query)


def losses(answers: Answers, base: Answers, query: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(NLL, KL, numbers to log) of answers beside those of the model as it is.

    query: (rows,) bool, which rows must have their answers; those of the others must stay.
    """
    count, query = len(query), query.to(answers.logits.device)
    nll = row_losses(answers, count)[query].mean()
    stays = ~query[answers.rows]
    before, after = (each.logits[stays].log_softmax(-1) for each in (base, answers))
    divergences = (before.exp() * (before - after)).sum(-1)
    number = torch.bincount(answers.rows[stays], minlength=count).clamp_min(1)
    kl = (divergences / number[answers.rows[stays]]).sum() / (~query).sum().clamp_min(1)
    right, was = rows_right(answers, count), rows_right(base, count)
    logs = {
        "nll": float(nll.detach()),
        "kl": float(kl.detach()),
        "es": 100.0 * float(right[query].float().mean()),
        "drawdown": (
            100.0 * float((was[~query].float() - right[~query].float()).mean()) if bool((~query).any()) else 0.0
        ),
    }
    return nll, kl, logs
