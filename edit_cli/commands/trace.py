"""`trace`: causal tracing of the facts that the model knows, and the layers that the trace speaks for."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from edit_cli.console import ConsoleMonitor, duration
from edit_cli.datasets import Dataset
from edit_cli.datasets.base import WINDOW
from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.experiment.base import Experiment
from edit_cli.experiment.cost import Work
from edit_cli.experiment.job import Job, Outcome
from edit_cli.experiment.plan import Plan
from edit_cli.experiment.records import traceable
from edit_cli.experiment.run_directory import run_path
from edit_cli.experiment.setup import refuse_missing
from edit_cli.lm.heads.answers import Likelihood
from edit_cli.lm.heads.kinds import require_causal
from edit_cli.lm.model import LM
from edit_cli.metrics.knowledge import first_choice
from edit_cli.requests import EditRequest
from edit_cli.runs.run import SharedRun
from edit_cli.tracing.facts import Fact, embedding_deviation, tokenized
from edit_cli.tracing.restore import Trace, Tracer
from edit_cli.tracing.settings import TraceOptions
from edit_cli.wording import many

FEW = 20  # facts that a trace should be of at least
DIGITS = 7  # of probabilities in results.jsonl

Facts = dict[str, EditRequest]


def run(job: Job, monitor: ConsoleMonitor) -> Outcome:
    return CausalTrace(job, monitor).conduct()


class CausalTrace(Experiment):
    COMPLETE = "all facts are there already, so nothing is traced again (overwrite=true would)"
    SHOWN_IN_SWEEPS = True  # traces cannot be told in a line

    def __init__(self, job: Job, monitor: ConsoleMonitor) -> None:
        refuse = partial(refuse_missing, job, job.config.model, dense="tracing")
        records = traceable(job, monitor, refuse)
        super().__init__(job, monitor, records.dataset, records=records)
        self.facts = named(self.dataset)
        if (count := min(len(self.facts), self.settings.limit or FEW)) < FEW:
            monitor.note(f"{many(count, 'fact')} at most: averages over fewer than {FEW} say little of a model")

    def path(self) -> Path:
        return run_path(self.job, self.job.choices["dataset"], self.job.model_name, leaf="trace")

    def details(self) -> dict[str, Any]:
        return {"facts": len(self.facts)}

    def belongs(self) -> Callable[[Any], bool]:
        return self.facts.__contains__

    def is_complete(self) -> bool:
        return self.run.finished.issuperset(self.facts)

    def check(self) -> None:
        refuse_missing(self.job, self.model, dense="tracing")

    def refuse_unfit(self, lm: LM) -> None:
        require_causal(lm, "tracing")

    def work(self, lm: LM) -> None:
        lines = traced(lm, self.protocol, self.facts, self.run, partial(self._tell_cost, lm))
        self.write_all(lines, "facts", len(self.facts))

    def _tell_cost(self, lm: LM, known: Facts) -> None:
        """Each known fact is worth thousands of passes, which nobody expects of a question about twenty facts."""
        model = self.job.config.model
        if known and model.outline is not None and model.target is not None:
            work = Work(model.outline, lm.tokenizer, model.target, model.batch_tokens)
            told, seconds = cost(work, known, self.protocol)
            self.monitor.note(f"{many(len(known), 'known fact')}: {told}; about {duration(seconds)}")


def named(dataset: Dataset) -> Facts:
    """Every request of every case, by an id of its own.

    Raises:
        UsageError: a data set that says of no fact what the model should say.
    """
    facts = {
        case.id if len(case.requests) == 1 else f"{case.id}/{number}": request
        for case in dataset.cases
        for number, request in enumerate(case.requests)
    }
    if all(request.target_true is None for request in facts.values()):
        raise UsageError(
            f"dataset={dataset.name} names no true answers (target_true), so it cannot be told which facts the model"
            " knows: trace counterfact, known_facts, zsre_alt, or facts of yours with target_true"
        )
    return facts


def traced(
    lm: LM, options: TraceOptions, facts: Facts, run: SharedRun, begins: Callable[[Facts], None] = lambda known: None
) -> Iterator[dict[str, Any]]:
    """A line for each fact that `run` has not finished. begins: hears which known facts are going to be traced.

    The noise level is that of all facts, whatever is finished, and so is the company in which a fact is asked about and
    traced: in another one its numbers would differ in their last digits.
    """
    usable: dict[str, Fact] = {}
    rejected: dict[str, str] = {}
    for name, request in facts.items():
        try:
            usable[name] = tokenized(lm, request)
        except RejectedRequest as error:
            rejected[name] = str(error)
    deviation = embedding_deviation(lm, list(usable.values())) if options.noise_std is None and usable else None
    tracer = Tracer(lm, options, options.noise * deviation if deviation is not None else options.noise_std or 0.0)
    mine = lm.process_group.share(list(facts))
    parts = [
        _lines(lm, tracer, facts, mine[start : start + WINDOW], usable, rejected, run.finished, begins)
        for start in range(0, len(mine), WINDOW)
    ]
    return (line for line in lm.process_group.merge(chain.from_iterable(parts), len(facts)) if line is not None)


def _lines(
    lm: LM,
    tracer: Tracer,
    facts: Facts,
    names: Sequence[str],
    usable: Mapping[str, Fact],
    rejected: Mapping[str, str],
    finished: Container[str],
    begins: Callable[[Facts], None],
) -> Iterator[dict[str, Any] | None]:
    """A line for each of these facts, first those that cannot be traced; None for one that is finished."""
    left = {name for name in names if name not in finished}
    if not left:
        yield from [None] * len(names)
        return
    able = [name for name in names if name in usable]
    with lm.monitor.phase("ask"):
        asked = [(facts[name].text, facts[name].target_true or "") for name in able]  # without one none is usable
        answers = dict(zip(able, lm.loglikelihood(asked), strict=True))
    known = [name for name in able if first_choice(answers[name].hits)]
    for name in names:
        if name in rejected or name not in known:
            error = rejected.get(name)
            says = lm.tokenizer.decode(_said(answers[name])) if error is None else None
            yield _line(name, facts[name], says, error) if name in left else None
    begins({name: facts[name] for name in known if name in left})
    waiting = iter(known)
    for group in tracer.groups([usable[name] for name in known]):
        mine = list(islice(waiting, len(group)))
        with lm.monitor.phase("trace"):
            traces = tracer.trace(group) if left.intersection(mine) else []
        found = dict(zip(mine, traces, strict=False))
        for name, fact in zip(mine, group, strict=True):
            yield (
                {**_line(name, facts[name]), **_numbers(lm, fact, found[name]), "noise_std": tracer.noise_std}
                if name in left
                else None
            )


def _said(answer: Likelihood) -> tuple[int, ...]:
    """The model's own first choices up to the first wrong one; later ones go on from what it would not have said."""
    return answer.predicted[: answer.hits.index(False) + 1]


def _line(name: str, request: EditRequest, says: str | None = None, error: str | None = None) -> dict[str, Any]:
    """says: the wrong answer of a model that does not know the fact."""
    about = {"prompt": request.prompt, "subject": request.subject, "target_true": request.target_true}
    return {"case_id": name, "request": about, "known": error is None and says is None, "says": says, "error": error}


def _numbers(lm: LM, fact: Fact, trace: Trace) -> dict[str, Any]:
    """Tokens from the subject on with their roles; probabilities of the answer's first token."""
    return {
        "tokens": [lm.tokenizer.decode([fact.ids[token]]) for token in fact.traced],
        "roles": list(fact.roles),
        "answer": lm.tokenizer.decode([fact.answer]),
        "high": round(trace.high, DIGITS),
        "low": round(trace.low, DIGITS),
        "scores": {kind: scores.astype(float).round(DIGITS).tolist() for kind, scores in trace.scores.items()},
    }


def cost(work: Work, facts: Facts, options: TraceOptions) -> tuple[str, float]:
    """What is to be restored, in words, and the seconds that it takes at most."""
    depth = work.outline.depth
    lengths = [work.length(request.text) for request in facts.values()]
    runs = sum(length * depth * len(options.kinds) for length in lengths)
    # of a row, the tokens before the restored one and half of the blocks are not run again
    tokens = sum(length * length * depth * len(options.kinds) * options.copies / 4 for length in lengths)
    seconds = work.passes(tokens, runs * options.copies, tokens / options.batch_tokens)
    return f"up to {runs:,} restored states, each in {many(options.copies, 'corrupted run')}", seconds


def plan(job: Job, monitor: ConsoleMonitor) -> Plan:
    """What `run` would do, before it costs anything."""
    whole, options = CausalTrace(job, monitor), job.config.protocol
    plan = Plan.of(whole)
    if (work := plan.work) is not None:
        told, seconds = cost(work, whole.facts, options)
        plan.say("traced", told)
        work.add("traces", seconds, work.states(options.batch_tokens))
    plan.unknown.append("how many of the facts the model knows: only those are traced, so this is the most it takes")
    return plan
