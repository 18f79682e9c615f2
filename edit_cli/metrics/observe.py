"""Raw observations: a model is asked about every probe of every case once, and what it says is stored as it is."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from annotated_types import Ge

from edit_cli.config.schema import Config, Count, Linked, Natural, Seed
from edit_cli.distributed import SINGLE
from edit_cli.errors import RejectedRequest
from edit_cli.metrics import locality_distribution
from edit_cli.metrics.forms import seen_in
from edit_cli.metrics.judge import JudgeOptions, Question
from edit_cli.monitor import Monitor
from edit_cli.requests import Case, Probe
from edit_cli.writing import bare, spoken

if TYPE_CHECKING:
    from edit_cli.lm.heads.answers import Likelihood

Observation = dict[str, Any]
Asked = tuple[Case, int | None]
"""A case, and the number of the edit that it is asked about with; None: whatever the model has in place."""
Row = tuple[Any, ...]
"""(number of the edit, prompt, …): what is asked of the model."""
# rows a call: between calls progress is told; far above a batch, so that buckets stay full
SCORING_CHUNK, TEXT_CHUNK = 8192, 1024


class Observed(Protocol):
    """What is asked of a model (see lm.LM). Where rows meet edits of their own (`LM.edited_by_row`), every question
    also says by `edits` which.
    """

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]: ...

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]: ...

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], max_tokens: int, top_k: int) -> list[str]: ...

    def token_nlls(self, texts: Sequence[str], window: int) -> tuple[float, int]: ...


@dataclass(frozen=True, kw_only=True)
class ObserveOptions(Config):
    """What is asked of the model before and after an edit."""

    place = "protocol.observe"

    generate: bool = True
    """Let the model continue the prompts by itself (free-running), not only rate given answers."""
    max_new_tokens: Count = 20
    """Tokens of such a continuation at most."""
    sample: bool = True
    """Texts about the subject, for fluency and consistency; only of data sets with generation prompts."""
    sample_tokens: Count = 100
    """Tokens of such a text, its prompt included."""
    sample_top_k: Count = 5
    """Likeliest tokens that each of its tokens is drawn from."""
    seed: Annotated[Seed, Linked("${seed}")] = 0
    """Of the texts."""
    attribute: bool = False
    """Score the attribute prompts too."""
    perplexity: bool = True
    """Perplexity of `model.perplexity_text`, if the model has one."""
    perplexity_window: Annotated[int, Ge(2)] = 2048
    """Tokens that it is measured over at once."""
    top_tokens: Natural = 20
    """At locality answers, keep the log-probabilities of at most so many tokens, for the KL divergence; 0: none."""
    judge: JudgeOptions = field(default_factory=JudgeOptions)
    """A model that judges the continuations, too."""

    def scores(self, probe: Probe) -> bool:
        """Whether this probe's answers are compared and generated (generation probes are only sampled)."""
        return probe.kind != "generation" and (self.attribute or probe.kind != "attribute")

    def continues(self, probe: Probe) -> bool:
        """Whether a greedy continuation of this probe's prompt is wanted."""
        return self.generate and probe.kind not in ("generation", "attribute", "opinion")

    def watches(self, probe: Probe) -> bool:
        """Whether the distributions at this probe's answer are wanted."""
        return self.top_tokens > 0 and probe.kind == "locality" and probe.target is not None


def observe(
    lm: Observed,
    cases: Sequence[Case],
    options: ObserveOptions,
    texts: Sequence[str] = (),
    before: Mapping[str, Observation] | None = None,
    edits: Sequence[int] | None = None,
    unread: Sequence[int] = (),
) -> list[Observation]:
    """One observation a case, in order, as JSON-able dicts (docs/metrics.md describes them).

    Identical (prompt, target) rows and prompts are asked once, over all cases. `texts` is what perplexity is measured
    on; its one value is part of every observation. A case with a probe that the model cannot be asked (say, longer than
    its context) holds no results but an "error" that names the probe; the other cases are not touched by it. Processes
    that share the model's work ask about a part of the cases each. `before` ({case id: observation of the unedited
    model}) tells which tokens to watch at the answers that must stay. `edits`: the number of the edit that each case
    is asked about with, of a model that is edited by row. `unread`: those of them whose perplexity is not wanted.
    """
    process_group = getattr(lm, "process_group", SINGLE)
    asked = list(zip(cases, [None] * len(cases) if edits is None else edits, strict=True))
    return process_group.gather(_observed(lm, process_group.share(asked), options, texts, before or {}, unread))


def _observed(
    lm: Observed,
    asked: Sequence[Asked],
    options: ObserveOptions,
    texts: Sequence[str],
    before: Mapping[str, Observation],
    unread: Sequence[int],
) -> list[Observation]:
    rows = _distinct(
        (edit, probe.text, text)
        for case, edit in asked
        for probe in case.probes
        if options.scores(probe)
        for text in (probe.target, probe.foil)
        if text is not None
    )
    prompts = _distinct((edit, probe.text) for case, edit in asked for probe in case.probes if options.continues(probe))
    draws = _distinct((edit, *draw) for case, edit in asked for draw in _draws(case, options))

    likelihoods = ask_each(
        lm, "scoring", lambda some: lm.loglikelihood(_pairs(some), **_edits(some)), rows, SCORING_CHUNK
    )
    tops = _tops(lm, asked, options, before)
    continuations = ask_each(
        lm,
        "generating",
        lambda some: lm.generate([prompt for _, prompt in some], options.max_new_tokens, **_edits(some)),
        prompts,
        TEXT_CHUNK,
    )
    verdicts = options.judge.verdicts(_questions(asked, options, continuations), _monitor(lm))
    sampled = ask_each(
        lm,
        "sampling",
        lambda some: lm.sample(
            [p for _, p, _ in some],
            [s for *_, s in some],
            options.sample_tokens,
            options.sample_top_k,
            **_edits(some),
        ),
        draws,
        TEXT_CHUNK,
    )
    read = _distinct(edit for _, edit in asked if edit not in unread)
    fixed = dict.fromkeys(unread) | _perplexities(lm, options, texts, read)
    return [
        _observation(case, edit, options, likelihoods, tops, continuations, verdicts, sampled, fixed[edit])
        for case, edit in asked
    ]


def _questions(
    asked: Sequence[Asked], options: ObserveOptions, continuations: Mapping[Row, str | RejectedRequest]
) -> Iterator[Question]:
    """What there is to judge: the replies to prompts whose answer is known."""
    for case, edit in asked:
        for probe in case.probes:
            if options.continues(probe) and probe.target is not None:
                written = continuations[edit, probe.text]
                if isinstance(written, str):
                    yield _question(probe, written)


def _question(probe: Probe, written: str) -> Question:
    """The reply as all metrics read it: without thoughts, up to the end of its first sentence."""
    from edit_cli.metrics.text import first_sentence  # help reads this module, and must not wait for numpy

    wanted = () if probe.target is None else (bare(probe.target), *map(bare, probe.aliases))
    return Question(probe.prompt, wanted, first_sentence(spoken(written), probe.target or ""))


def _pairs(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return [(prompt, target) for _, prompt, target in rows]


def _edits(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Which edit each row meets, for a model that is edited by row; nothing to say to any other."""
    return {} if rows[0][0] is None else {"edits": [number for number, *_ in rows]}


def _tops(
    lm: Observed, asked: Sequence[Asked], options: ObserveOptions, before: Mapping[str, Observation]
) -> dict[Row, locality_distribution.Top]:
    """{(edit, prompt, target): its distributions in short}, of the answers that must stay; a row that is rejected has
    none.
    """
    ask = getattr(lm, "target_logprobs", None)
    wanted = _distinct(
        (edit, probe.text, probe.target) for case, edit in asked for probe in case.probes if options.watches(probe)
    )
    if ask is None or not wanted:
        return {}
    known = {
        (probe.text, probe.target): seen["top"]["ids"]
        for case, _ in asked
        if case.id in before
        for form, probes in _by_form(case, options).items()
        for probe, seen in zip(probes, seen_in(before[case.id], form)["probes"], strict=False)
        if seen.get("top")
    }

    def watch(rows: list[Any]) -> list[locality_distribution.Top | None]:
        return [
            None
            if logprobs is None
            else locality_distribution.watch(logprobs, options.top_tokens, known.get((prompt, target)))
            for (_, prompt, target), logprobs in zip(rows, ask(_pairs(rows), **_edits(rows)), strict=True)
        ]

    seen = ask_each(lm, "comparing", watch, wanted, locality_distribution.CHUNK)
    return {row: top for row, top in seen.items() if isinstance(top, dict)}


class BeforeCache:
    """Observations of the unedited model, asked once a case however often they are wanted.

    They depend on the model and the options only. The caller sees to it that no edit is attached, and uses one cache a
    model.
    """

    def __init__(self, options: ObserveOptions, texts: Sequence[str] = ()) -> None:
        self.options = options
        self.texts = texts
        self.seen: dict[str, Observation] = {}  # by case id
        self._perplexity: dict[str, Any] | None = None

    def observe(self, lm: Observed, cases: Sequence[Case]) -> list[Observation]:
        """Observations of `cases`, in order; only those not seen before run the model."""
        new = [case for case in cases if case.id not in self.seen]
        if new:
            self._perplexity = self._perplexity or _perplexity(lm, self.options, self.texts)
            for case, seen in zip(new, observe(lm, new, self.options), strict=True):
                self.seen[case.id] = seen | {"perplexity": self._perplexity}
        return [self.seen[case.id] for case in cases]


def row_seed(seed: int, case_id: str, index: int, prompt: str) -> int:
    """Seed of one sampled text: the same on every machine, whatever else is sampled, before and after the edit."""
    digest = hashlib.sha256(json.dumps([seed, case_id, index, prompt]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _draws(case: Case, options: ObserveOptions) -> list[tuple[str, int]]:
    """(prompt, seed) of every text to be sampled for the case; equal prompts get different seeds."""
    prompts = [probe.prompt for probe in case.probes if probe.kind == "generation"] if options.sample else []
    seeds = (row_seed(options.seed, case.id, index, prompt.rstrip(" ")) for index, prompt in enumerate(prompts))
    return list(zip(prompts, seeds, strict=True))  # spaces at its end go with what comes after a prompt


def _distinct(rows: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(rows))


def ask_each(
    lm: Observed, task: str, ask: Callable[[list[Any]], Sequence[Any]], rows: list[Any], chunk: int
) -> dict[Any, Any | RejectedRequest]:
    """{row: answer}, with progress by rows. A row that is rejected gets its error as the answer."""
    if not rows:
        return {}
    answers: list[Any] = []
    monitor = _monitor(lm)
    telling = getattr(lm, "telling", None) or (lambda done: nullcontext())
    heard = 0
    with monitor.task(task, len(rows)) as advance:

        def hear(count: int) -> None:
            nonlocal heard
            count = max(min(count, len(rows) - heard), 0)  # whoever answers may ask himself something in between
            heard += count
            advance(count)

        with telling(hear):
            for start in range(0, len(rows), chunk):
                answers += _isolating(ask, rows[start : start + chunk])
                hear(len(answers) - heard)
    return dict(zip(rows, answers, strict=True))


def _monitor(lm: Observed) -> Monitor:
    return getattr(lm, "monitor", None) or Monitor()


def _isolating(ask: Callable[[list[Any]], Sequence[Any]], rows: list[Any]) -> list[Any]:
    """Ask about all rows at once; if one is rejected, halve until it stands alone.

    (Rejection comes before any computing.)
    """
    try:
        return list(ask(rows))
    except RejectedRequest as error:
        if len(rows) > 1:
            middle = len(rows) // 2
            return _isolating(ask, rows[:middle]) + _isolating(ask, rows[middle:])
        return [error]


def _observation(
    case: Case,
    edit: int | None,
    options: ObserveOptions,
    likelihoods: dict[Row, Likelihood | RejectedRequest],
    tops: Mapping[Row, locality_distribution.Top],
    continuations: dict[Row, str | RejectedRequest],
    verdicts: Mapping[Question, bool | None],
    sampled: dict[Row, str | RejectedRequest],
    perplexity: dict[str, Any] | None,
) -> Observation:
    try:
        probes = {
            form: [_probe(probe, edit, options, likelihoods, tops, continuations, verdicts) for probe in asked]
            for form, asked in _by_form(case, options).items()
        }
        texts = [_answered(sampled[edit, *draw], "generation", draw[0]) for draw in _draws(case, options)]
    except RejectedRequest as error:
        return {"probes": [], "texts": [], "perplexity": perplexity, "error": str(error)}
    others = {form: {"probes": seen} for form, seen in probes.items() if form is not None}
    return {"probes": probes[None], "texts": texts, "perplexity": perplexity, **({"forms": others} if others else {})}


def _by_form(case: Case, options: ObserveOptions) -> dict[str | None, list[Probe]]:
    """{form: its probes that are scored}; None: the first form that the case is asked in."""
    found: dict[str | None, list[Probe]] = {None: []}
    for probe in case.probes:
        if options.scores(probe):
            found.setdefault(probe.form, []).append(probe)
    return found


def _probe(
    probe: Probe,
    edit: int | None,
    options: ObserveOptions,
    likelihoods: Mapping[Row, Any],
    tops: Mapping[Row, locality_distribution.Top],
    continuations: Mapping[Row, Any],
    verdicts: Mapping[Question, bool | None],
) -> dict[str, Any]:
    seen: dict[str, Any] = {"kind": probe.kind, "prompt": probe.prompt, "target": probe.target, "foil": probe.foil}
    if probe.group is not None:
        seen["group"] = probe.group
    if probe.aliases:
        seen["aliases"] = list(probe.aliases)
    for role, text in (("target", probe.target), ("foil", probe.foil)):
        likelihood = None if text is None else _answered(likelihoods[edit, probe.text, text], probe.kind, probe.prompt)
        seen[f"{role}_nll"] = likelihood.nll if likelihood and math.isfinite(likelihood.nll) else None
        seen[f"{role}_hits"] = list(likelihood.hits) if likelihood else None
        if role == "target":
            seen["target_predicted"] = list(likelihood.predicted) if likelihood else None
    if options.watches(probe) and (top := tops.get((edit, probe.text, probe.target))):
        seen["top"] = top
    written = _answered(continuations[edit, probe.text], probe.kind, probe.prompt) if options.continues(probe) else None
    seen["generated"] = written and spoken(written)
    if seen["generated"] != written:
        seen["generated_whole"] = written  # with its thoughts
    if verdicts and written is not None and (question := _question(probe, written)) in verdicts:
        seen["judged"] = verdicts[question]
    return seen


def _answered(answer: Any, kind: str, prompt: str) -> Any:
    if isinstance(answer, RejectedRequest):
        raise RejectedRequest(f"{kind} probe {prompt[:80]!r}: {answer}")
    return answer


def _perplexities(
    lm: Observed, options: ObserveOptions, texts: Sequence[str], edits: Sequence[int | None]
) -> dict[int | None, dict[str, Any] | None]:
    """Of the model with each edit, which takes long where there are many: a whole text each."""
    if not options.perplexity or not texts:
        return dict.fromkeys(edits)
    found: dict[int | None, dict[str, Any] | None] = {}
    with _monitor(lm).task("reading plain text", len(edits)) as advance:
        for edit in edits:
            found[edit] = _perplexity(lm, options, texts, edit)
            advance(1)
    return found


def _perplexity(
    lm: Observed, options: ObserveOptions, texts: Sequence[str], edit: int | None = None
) -> dict[str, Any] | None:
    if not options.perplexity or not texts:
        return None
    nll, tokens = lm.token_nlls(texts, options.perplexity_window, **({} if edit is None else {"edit": edit}))
    return {"nll": nll if math.isfinite(nll) else None, "tokens": tokens}
