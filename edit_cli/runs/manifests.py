"""The shapes of manifest.json, command by command: what the program reads in it.

See `format`, which holds files against them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from edit_cli.files.shapes import Count, Rule, at_least


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
