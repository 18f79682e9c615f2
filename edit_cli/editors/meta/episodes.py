"""What a trained editor learns from: edits with prompts on which they must work and prompts whose answers must stay."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from edit_cli.editors.meta.base_model_cache import Memory, base_answers
from edit_cli.editors.meta.factored_gradients import DenseShift, Shift, shifted, sparing
from edit_cli.editors.passes import row_losses, rows_right
from edit_cli.errors import UsageError
from edit_cli.lm.answers import Answers
from edit_cli.lm.kinds import require_causal
from edit_cli.lm.model import LM
from edit_cli.metrics.registry import PARTS
from edit_cli.requests import Case, Probe

WITHIN, BEYOND = ("paraphrase", "portability"), ("locality", "neighborhood")
ANY, SWAPPED, SAME_RELATION, SAME_ANSWER = "any", "swapped", "same_relation", "same_answer"
ANSWER, TEXT = "answer", "text"
Pair = tuple[str, str]


@dataclass
class DrawOptions:
    """What is drawn for each case: keys of `method.draw`.

    outer: prompts on which the edit must work: "any" rephrased ones; "seen" (only those that the data set marks so,
    where it does); or "swapped": the edit is made in any wording of the fact and has to work in any other, and writes
    any answer that the same relation has for other subjects, so that as many facts make more edits to learn from.
    locality: for each prompt whose answer must stay, the group that it is drawn from, as data sets name them (random,
    same_relation, same_subject, …); "any" for all; "same_answer" for those of same_relation with the answer that the
    edit replaces, which are the hardest to spare (any of same_relation, where a case has none). Where a case has none
    of a group, any of its prompts is taken (`spared` sees to it that there is one).
    stays: what of such a prompt must stay: its "answer", given the prompt, or every token of the "text" that the two
    make (MEND for continuations; causal models).
    """

    outer: str = ANY
    locality: list[str] = field(default_factory=lambda: [ANY])
    stays: str = ANSWER

    def __post_init__(self) -> None:
        outer, locality = ([name for whole, name, _ in PARTS.values() if whole in kinds] for kinds in (WITHIN, BEYOND))
        for key, names, known in (
            ("outer", [self.outer], [ANY, SWAPPED, *outer]),
            ("locality", self.locality, [ANY, SAME_ANSWER, *locality]),
        ):
            for name in names:
                if name not in known:
                    raise UsageError(f"method.draw.{key}={name}: choose {', '.join(known[:-1])} or {known[-1]}")
        if self.stays not in (ANSWER, TEXT):
            raise UsageError(f"method.draw.stays={self.stays}: choose {ANSWER} or {TEXT}")

    def fits(self, lm: LM) -> None:
        """Refuse a model whose prompt and answer are not one text, where all of it must stay (UsageError)."""
        if self.stays == TEXT:
            require_causal(lm, f"method.draw.stays={TEXT}")


@dataclass(frozen=True)
class Lesson:
    """One edit of some requests: (prompt, answer) pairs to write, on which it must work, and which must stay."""

    inner: tuple[Pair, ...]
    outer: tuple[Pair, ...]
    local: tuple[Pair, ...]


def spared(cases: Sequence[Case]) -> list[Case]:
    """The cases, each with a prompt whose answer must stay: where the data give none, the next one's edited prompt."""
    found: list[Case] = []
    others = [*cases[1:], *cases[:1]]
    for case, other in zip(cases, others, strict=True):
        if not _beyond(case) and case.requests and other.requests and other.requests[0].text != case.requests[0].text:
            (request,) = other.requests[:1]
            probe = Probe("locality", request.text, request.target_true or request.target_new)
            case = replace(case, probes=(*case.probes, probe))
        found.append(case)
    return found


def draw(cases: Sequence[Case], per_edit: int, options: DrawOptions) -> list[Lesson]:
    """Lessons of `per_edit` cases each. What is drawn hangs on torch's seed and a case's id alone.

    Raises:
        UsageError: a case of several requests, or without a prompt that must stay; or too few cases for one edit.
    """
    if len(cases) < per_edit:
        raise UsageError(
            f"{per_edit} facts are edited at once (method.edits), and the data set has {len(cases)}: give a lower"
            " number"
        )
    drawn = [_drawn(case, options) for case in cases]
    lessons = []
    for first in range(0, len(drawn) - per_edit + 1, per_edit):
        parts = drawn[first : first + per_edit]
        lessons.append(Lesson(*(tuple(pair for part in parts for pair in part[field]) for field in range(3))))
    return lessons


def _drawn(case: Case, options: DrawOptions) -> tuple[list[Pair], list[Pair], list[Pair]]:
    if len(case.requests) != 1:
        raise UsageError(
            f"case {case.id} holds {len(case.requests)} requests: editors are trained on data sets with one a record"
        )
    rng = random.Random(f"{torch.initial_seed()}/{case.id}")
    (request,) = case.requests
    new = request.target_new
    within = [probe for probe in case.probes if probe.kind in WITHIN and probe.target]
    if options.outer not in (ANY, SWAPPED):
        within = [probe for probe in within if probe.group == options.outer] or within
    asked = [(probe.prompt, probe.target) for probe in within] or [(request.text, new)]
    beyond = _beyond(case)
    if options.locality and not beyond:
        raise UsageError(
            f"case {case.id} has no prompt whose answer must stay, nor has the data set another fact to take one from:"
            " give neighbors, or method.draw.locality=[]"
        )
    local = [_local(beyond, group, request.target_true, rng) for group in options.locality]
    if options.stays == TEXT:  # all that follows the first word is the answer
        local = [(first, rest) for first, _, rest in (f"{text} {answer}".partition(" ") for text, answer in local)]
    inner, outer = (request.text, new), rng.choice(asked)
    if options.outer == SWAPPED:
        answers = {probe.target for probe in beyond if probe.group == SAME_RELATION} - {request.target_true}
        new = rng.choice([new, *sorted(answers - {new})]) if request.target_true else new
        wordings = list(dict.fromkeys([request.text, *(text for text, _ in asked)]))
        edited = rng.choice(wordings)
        inner, outer = (edited, new), (rng.choice([text for text in wordings if text != edited] or [edited]), new)
    return [inner], [outer], local


def _beyond(case: Case) -> list[Probe]:
    return [probe for probe in case.probes if probe.kind in BEYOND and probe.target]


def _local(beyond: Sequence[Probe], group: str, old: str | None, rng: random.Random) -> Pair:
    hardest = group == SAME_ANSWER
    fitting = [
        probe for probe in beyond if group == ANY or probe.group == (SAME_RELATION if hardest else group)
    ] or beyond
    if hardest:
        fitting = [probe for probe in fitting if probe.target == old] or fitting
    probe = rng.choice(fitting)
    return probe.prompt, probe.target


class Trial:
    """The prompts of some lessons, asked of the model as it is, and then of as many edited ones in a single pass."""

    def __init__(self, lm: LM, lessons: Sequence[Lesson], lowest: int, memory: Memory | None = None) -> None:
        """lowest: the first layer that an edit changes; blocks below it are run once."""
        self.lm, self.lowest, self.lessons = lm, lowest, len(lessons)
        pairs = [pair for lesson in lessons for pair in (*lesson.outer, *lesson.local)]
        self.rows = lm.head.encode(pairs) if memory is None else memory.rows(lm, pairs)
        kinds = [kind for lesson in lessons for kind in [True] * len(lesson.outer) + [False] * len(lesson.local)]
        self.outer = torch.tensor(kinds, device=lm.device)
        ask = memory.answers if memory is not None and memory.works(lm) else base_answers
        self.states, self.base = ask(lm, self.rows, lowest)

    def answers(self, shifts: Mapping[str, Shift | DenseShift]) -> Answers:
        """Each lesson's rows, of a model with its own shift of each module."""
        with ExitStack() as stack:
            stack.enter_context(sparing(self.lm, self.rows, range(self.lowest, self.lm.layout.depth), self.lessons))
            if self.states is not None:
                stack.enter_context(self.lm.skipping(self.lowest - 1, self.states))
            stack.enter_context(shifted(self.lm, shifts))
            return self.lm.head.answers(self.rows, end=True)

    def losses(self, shifts: Mapping[str, Shift | DenseShift]) -> tuple[Tensor, Tensor, dict[str, float]]:
        """(mean NLL where the edits must work, mean KL(before ‖ after) where answers must stay, what to show)."""
        found = self.answers(shifts)
        nll, kl, told = judged(found, self.base, self.outer)
        return nll, kl, told


def judged(found: Answers, base: Answers, outer: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(NLL, KL, numbers) of answers beside those of the model as it is; outer: which rows must have their answers."""
    count, outer = len(outer), outer.to(found.logits.device)
    nll = row_losses(found, count)[outer].mean()
    stays = ~outer[found.rows]
    before, after = (answers.logits[stays].log_softmax(-1) for answers in (base, found))
    each = (before.exp() * (before - after)).sum(-1)
    number = torch.bincount(found.rows[stays], minlength=count).clamp_min(1)
    kl = (each / number[found.rows[stays]]).sum() / (~outer).sum().clamp_min(1)
    right, was = rows_right(found, count), rows_right(base, count)
    told = {
        "nll": float(nll.detach()),
        "kl": float(kl.detach()),
        "es": 100.0 * float(right[outer].float().mean()),
        "drawdown": (
            100.0 * float((was[~outer].float() - right[~outer].float()).mean()) if bool((~outer).any()) else 0.0
        ),
    }
    return nll, kl, told
