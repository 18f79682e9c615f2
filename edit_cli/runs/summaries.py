"""The shapes of summary.json, command by command: what the program reads in it.

See `format`, which holds files against them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from edit_cli.files.shapes import Count, Rule, Seconds, at_least
from edit_cli.metrics.registry import metrics
from edit_cli.runs.manifests import About, Asking, Batches, Cases, Folds, Form, Tracing
from edit_cli.runs.result_lines import KINDS, Role

RATES = frozenset({"SR", "GR", "GR before", "ER", "TrainR", "TestR"})


class Entry(TypedDict):
    """A mean with its interval."""

    mean: float | None
    ci95: tuple[float | None, float | None] | None
    n: Count


KNOWN = Rule(lambda found: found.keys() <= metrics().keys(), "metrics of this version by their names")
Metrics = Annotated[dict[str, dict[str, Entry]], KNOWN]
Means = Annotated[dict[str, Entry], KNOWN]


class Counted(TypedDict):
    """lines: of results.jsonl, of which the summary was made."""

    lines: NotRequired[Count]


class Summary(Counted):
    """What lists and comparisons read of every run."""

    model: str
    n: Count
    failed: Count
    metrics: Metrics
    seconds: dict[str, Seconds]
    seconds_per_edit: Seconds | None
    peak_memory_bytes: dict[str, int | None]
    processes: NotRequired[Count]


class Told(Batches):
    """The protocol of a summary."""

    order_seed: NotRequired[int | None]
    observe: Asking


class Flips(TypedDict):
    """A downstream task by one metric, before and after. share: an item is right or not; means are in % then."""

    n: Count
    share: bool
    before: float
    after: float
    change: float | None
    ci95: tuple[float, float] | None
    p: float | None
    lost: int | None
    gained: int | None


class Downstream(TypedDict):
    edits: Count
    tasks: dict[str, dict[str, Flips]]


class EditingSummary(Summary):
    method: str
    dataset: About
    edits: Count
    protocol: Told
    downstream: NotRequired[list[Downstream]]
    asked: NotRequired[dict[Form, Metrics]]


class Moved(TypedDict):
    drift: NotRequired[float | None]


class Checkpoint(TypedDict):
    edits: Count
    metrics: Means
    first: Means
    held_out: dict[str, dict[str, Entry]]
    model: Moved


class Collapse(TypedDict):
    edits: Count
    reason: str


class SequenceSummary(EditingSummary):
    checkpoints: list[Checkpoint]
    collapse: Collapse | None
    stopped: bool


class Spread(TypedDict):
    mean: float
    std: float | None
    folds: Count


class Fold(TypedDict):
    fold: Count
    finished: bool
    examples: Count
    edits: Count
    SR: NotRequired[float]
    GR: NotRequired[float]
    ER: NotRequired[float]
    TrainR: NotRequired[float | None]
    TestR: NotRequired[float | None]


Rates = Annotated[dict[str, Spread], Rule(RATES.issuperset, "the rates of this protocol")]


class Rated(TypedDict):
    rates: Rates
    folds: list[Fold]


class Course(TypedDict):
    edits: Count
    metrics: Means


class SmeSummary(Summary):
    method: str
    dataset: About
    edits: Count
    protocol: Folds
    checkpoints: list[Course]
    sme: Rated


class Effect(TypedDict):
    """Of each layer."""

    mean: Annotated[list[float], Rule(bool, "a list of numbers")]
    ci95: list[tuple[float, float]] | None


def _layers_alike(indirect: Any) -> bool:
    entries = [entry for roles in indirect.values() for entry in roles.values()]
    intervals = all(entry["ci95"] is None or len(entry["ci95"]) == len(entry["mean"]) for entry in entries)
    return intervals and KINDS.issuperset(indirect) and len({len(entry["mean"]) for entry in entries}) <= 1


class Effects(TypedDict):
    high: Entry
    low: Entry
    total_effect: Entry
    indirect_effect: Annotated[
        dict[str, dict[str, Effect]], Rule(_layers_alike, "an effect and its interval for every layer")
    ]


class Peak(TypedDict):
    role: Role
    layer: Count
    mean: float
    ci95: tuple[float, float] | None


class Proposal(TypedDict):
    layers: list[int]
    layer: Count


class TraceSummary(Summary):
    dataset: About
    facts: Count
    traced: Count
    not_known: Count
    protocol: Tracing
    trace: Effects | None
    peaks: Annotated[dict[str, Peak], Rule(KINDS.issuperset, "the largest effects by kind of state")]
    proposal: Proposal | None


def _is_told(summary: Any) -> bool:
    return not summary["traced"] or (summary["trace"] is not None and summary["protocol"]["noise_std"] is not None)


TracesSummary = Annotated[TraceSummary, Rule(_is_told, "a summary with the effects of what was traced")]


class Best(TypedDict):
    step: Count
    metrics: dict[str, float]


class Trained(TypedDict):
    name: str


Percent = Annotated[float, at_least(0, 100)]
Parts = dict[Literal["efficacy", "paraphrase", "neighborhood", "written"], Percent]


class RankedTrial(TypedDict):
    """What a search for settings tells of one trial. perplexity: before and after. failed: facts that came to
    nothing.
    """

    trial: Count
    settings: dict[str, Any]
    objective: Percent
    parts: Parts
    perplexity: tuple[float | None, float | None]
    seconds: Seconds
    failed: Count
    error: str | None


class TrialLine(RankedTrial):
    """parameters: what Optuna proposed. spent: seconds of the search so far. facts: {case id: its parts}."""

    parameters: dict[str, float | int]
    penalty: Annotated[float, at_least(0, 1)]
    facts: Annotated[dict[str, Parts], Rule(bool, "what each fact came to")]
    metrics: dict[str, str]
    spent: Seconds


class Apart(TypedDict):
    mean: float
    ci95: tuple[float, float] | None


class TuningSummary(Counted):
    """ranked: best first. difference: between the first two."""

    method: str
    model: str
    dataset: About
    facts: str
    objective: str
    n: Count
    trials: Count
    ranked: Annotated[list[RankedTrial], Rule(bool, "the trials")]
    difference: Apart | None


class TrainingSummary(Counted):
    method: str
    model: str
    dataset: Trained
    protocol: Cases
    best: Best
    checkpoint: str | None
    seconds: dict[str, Seconds]
