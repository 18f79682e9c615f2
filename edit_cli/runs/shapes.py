"""The shapes of manifest.json, results.jsonl and summary.json, command by command: what the program reads in them.

See `run_format`, which holds the files against them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from edit_cli.edits.diagnosis import Diagnosis
from edit_cli.files.shapes import Count, Rule, Seconds, at_least
from edit_cli.metrics.registry import metrics

KINDS = frozenset({"hidden", "mlp", "attn"})
RATES = frozenset({"SR", "GR", "GR before", "ER", "TrainR", "TestR"})

# --- manifest.json ----------------------------------------------------------------------------------------------------


class Identity(TypedDict):
    """Which run it is, and how it went."""

    format: int
    command: str
    config_hash: str
    key: Annotated[list[str], Rule(bool, "a list of fields")]
    status: Literal["started", "success", "failed", "interrupted"]
    started: NotRequired[str | None]
    finished: NotRequired[str | None]
    resumed: NotRequired[list[dict[str, Any]]]


class Manifest(Identity):
    """What every run says of itself. plugins: {package: version} of those that there were. arguments: what was typed
    after the command. origins: {dotted key: where its value comes from}, of settings that are not defaults.
    """

    config: dict[str, Any]
    plugins: NotRequired[dict[str, str]]
    arguments: NotRequired[list[str]]
    origins: NotRequired[dict[str, str]]


class Known(TypedDict):
    """Of the facts that a model was asked, how many it knows."""

    by: Literal["reply", "rank"]
    asked: Count
    known: Count


Form = Literal["plain", "chat"]


class Forms(TypedDict):
    """The form in which facts are edited, those in which they are asked, and what stands around them in a chat."""

    edited: Form
    asked: Annotated[list[Form], Rule(bool, "a list of forms")]
    frames: dict[str, list[str]]


class About(TypedDict):
    """Which records were used."""

    name: str
    source: str
    records_total: Count
    records_dropped: Count
    records_selected: Count
    limit: int | None
    split: str | None
    ids_sha256: str
    known: NotRequired[Known]
    forms: NotRequired[Forms]


class Measuring(Identity):
    """A run that asks a model. method: None where there is none, as in a trace."""

    method: str | None
    model: str
    dataset: About
    seeds: dict[str, int]
    versions: dict[str, str]
    processes: NotRequired[Count]


class Batches(TypedDict):
    batch_size: Count
    batches: Count
    evaluated: Literal["after each batch", "after all edits", "right after each step, and at checkpoints"]


class Asking(TypedDict):
    generate: bool


class Ordered(TypedDict):
    """`order_seed` and what is asked, as a summary tells them again."""

    order_seed: NotRequired[int | None]
    observe: Asking


class Collapsing(Ordered):
    first: NotRequired[Count]
    collapse_below: NotRequired[float]
    collapse_perplexity: NotRequired[float]
    stop_on_collapse: NotRequired[bool]


class Folds(TypedDict):
    answers: Literal["written", "right"]


class Tracing(TypedDict):
    window: Annotated[int, at_least(1)]
    copies: Count
    proposed_layers: Count
    noise_std: float | None


class EditingConfig(TypedDict):
    protocol: Ordered


class SequenceConfig(TypedDict):
    protocol: Collapsing


class SmeConfig(TypedDict):
    protocol: Folds


class TraceConfig(TypedDict):
    protocol: Tracing


class Editing(Measuring):
    config: EditingConfig
    protocol: Batches


class Sequential(Measuring):
    config: SequenceConfig
    protocol: Batches


class Sme(Measuring):
    config: SmeConfig
    protocol: dict[str, Any]


class Facts(TypedDict):
    facts: Count


class Trace(Measuring):
    config: TraceConfig
    protocol: Facts


class Cases(TypedDict):
    cases: Count


class Training(Measuring):
    config: dict[str, Any]
    protocol: Cases


class Tried(TypedDict):
    facts: str


class Tuning(Measuring):
    config: dict[str, Any]
    protocol: Tried


# --- results.jsonl ----------------------------------------------------------------------------------------------------

Nats = Annotated[float, at_least(-0.01, 1e30)]  # of a token; a little below 0 by rounding


class Request(TypedDict):
    prompt: str
    subject: str | None
    target_new: str
    target_true: str | None


class Top(TypedDict):
    """The likeliest tokens at each place of an answer, and their log-probabilities."""

    ids: list[list[int]]
    logprobs: list[list[Annotated[float, at_least(-1e30, 1.0)] | None]]


def _paired(top: Any) -> bool:
    return [*map(len, top["ids"])] == [*map(len, top["logprobs"])]


class Seen(TypedDict):
    """What a model said to one probe."""

    kind: str
    prompt: str
    target: str | None
    foil: str | None
    target_nll: Nats | None
    target_hits: list[bool] | None
    target_predicted: list[int] | None
    foil_nll: Nats | None
    foil_hits: list[bool] | None
    generated: str | None
    generated_whole: NotRequired[str]
    judged: NotRequired[bool | None]
    group: NotRequired[str]
    aliases: NotRequired[list[str]]
    top: NotRequired[Annotated[Top, Rule(_paired, "as many log-probabilities as tokens")]]


class Perplexity(TypedDict):
    nll: Annotated[float, at_least(0)] | None
    tokens: Count


def _has_tokens(seen: Any) -> bool:
    return seen["target_nll"] is None or bool(seen["target_hits"])


class Asked(TypedDict):
    """What a model said to the probes of a case in one form."""

    probes: list[Annotated[Seen, Rule(_has_tokens, "an answer with its tokens")]]


class Observation(Asked):
    """What a model said to all probes of a case. forms: what it said in others than the first."""

    forms: NotRequired[dict[Form, Asked]]
    texts: list[str]
    perplexity: Perplexity | None
    error: NotRequired[str]


class Line(TypedDict):
    """What every line of a case has."""

    case_id: str
    error: str | None
    phases: NotRequired[dict[str, Seconds]]


class CaseLine(Line):
    """One case before and after its edit."""

    step: Count
    requests: list[Request]
    before: Observation | None
    after: Observation | None
    seconds: Seconds | None
    diagnosis: NotRequired[Diagnosis]


class StepLine(CaseLine):
    when: str
    edits: Count
    sampled: NotRequired[bool]


class WeightMoved(TypedDict):
    norm: float
    change: float
    top_singular: float


class Health(TypedDict):
    weights: dict[str, WeightMoved]
    drift: float | None


class ModelLine(Line):
    """The model itself at a checkpoint."""

    when: str
    edits: Count
    step: Count
    model: Health


class TurnLine(CaseLine):
    """One example of a fold, edited if it was a mistake."""

    when: str
    fold: Count
    turn: Count
    edits: Count
    mistake: bool


class KeptLine(Line):
    """What a model still knew after so many edits of a fold."""

    when: str
    fold: Count
    edits: Count
    seconds: None
    edited: list[int]
    train: list[int]
    test: list[int]
    last: NotRequired[bool]


Role = Literal["subject_first", "subject_middle", "subject_last", "after_subject", "further", "last"]
Share = Annotated[float, at_least(-1, 1)]


class TracedRequest(TypedDict):
    prompt: str
    subject: str | None
    target_true: str | None


class FactLine(Line):
    """A fact that is not traced."""

    request: TracedRequest
    known: bool
    says: str | None


class TracedLine(FactLine):
    """tokens, roles: from the subject on. scores: P(answer) by kind of state, token and layer."""

    tokens: Annotated[list[str], Rule(bool, "a list of tokens")]
    roles: list[Role]
    answer: str
    high: Share
    low: Share
    scores: Annotated[
        dict[str, list[Annotated[list[Share], Rule(bool, "a list of numbers")]]],
        Rule(KINDS.issuperset, "scores by kinds of states"),
    ]
    noise_std: float


def _rows_alike(line: Any) -> bool:
    counts = {len(line["roles"]), len(line["tokens"]), *map(len, line["scores"].values())}
    return len(counts) == 1 and len({len(row) for rows in line["scores"].values() for row in rows}) <= 1


Traced = Annotated[TracedLine, Rule(_rows_alike, "a line with a role and scores for every token")]


class CurveLine(TypedDict):
    """A point of a training's curves. loss: not there where no batch had one."""

    step: Count
    kind: Literal["train", "validation"]
    loss: NotRequired[float | None]


def _of_numbers(line: Any) -> bool:
    return all(value is None or type(value) in (int, float) for name, value in line.items() if name not in OTHERS)


OTHERS = ("kind", "phases")
Point = Annotated[CurveLine, Rule(_of_numbers, "a line of numbers")]


# --- summary.json -----------------------------------------------------------------------------------------------------


class Entry(TypedDict):
    """A mean with its interval."""

    mean: float | None
    ci95: tuple[float | None, float | None] | None
    n: Count


KNOWN = Rule(lambda found: found.keys() <= metrics().keys(), "metrics of this version by their names")
Metrics = Annotated[dict[str, dict[str, Entry]], KNOWN]
Means = Annotated[dict[str, Entry], KNOWN]


class Summary(TypedDict):
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


class TuningSummary(TypedDict):
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


class TrainingSummary(TypedDict):
    method: str
    model: str
    dataset: Trained
    protocol: Cases
    best: Best
    checkpoint: str | None
    seconds: dict[str, Seconds]
