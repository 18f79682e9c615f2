"""The shapes of the lines of results.jsonl, command by command: what the program reads in them.

See `format`, which holds files against them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from edit_cli.edits.diagnosis import Diagnosis
from edit_cli.files.shapes import Count, Rule, Seconds, at_least
from edit_cli.runs.manifests import Form

KINDS = frozenset({"hidden", "mlp", "attn"})


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


class EditedLine(Line):
    """A case and its edit."""

    step: Count
    requests: list[Request]
    after: Observation | None
    seconds: Seconds | None
    diagnosis: NotRequired[Diagnosis]


class BeforeAndAfter(EditedLine):
    """One case before and after its edit."""

    before: Observation


def _is_told(line: Any) -> bool:
    return line["after"] is not None or line["error"] is not None


TOLD = Rule(_is_told, "a line with what was said after the edit, or with its error")
CaseLine = Annotated[BeforeAndAfter, TOLD]


class InSequence(TypedDict):
    when: str
    edits: Count
    sampled: NotRequired[bool]


class OfStep(BeforeAndAfter, InSequence):
    """A case of a sequence right after its edit, or one that is not edited at a checkpoint."""


class AskedAgain(EditedLine, InSequence):
    """An edited case at a checkpoint; what was said before is in the line of its edit."""

    before: None


StepLine = Annotated[OfStep, TOLD]
CheckpointLine = Annotated[AskedAgain, TOLD]


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


class OfTurn(BeforeAndAfter):
    """One example of a fold, edited if it was a mistake."""

    when: str
    fold: Count
    turn: Count
    edits: Count
    mistake: bool


TurnLine = Annotated[OfTurn, Rule(lambda line: not line["mistake"] or _is_told(line), TOLD.wanted)]


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
