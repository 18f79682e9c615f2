"""The shapes of manifest.json, results.jsonl and summary.json of `inspect`: what the program reads in them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

from edit_cli.files.shapes import Count, Rule, at_least
from edit_cli.runs.manifests import Measuring
from edit_cli.runs.result_lines import Request
from edit_cli.runs.summaries import Summary

Share = Annotated[float, at_least(0, 1.0001)]
Promoted = Annotated[list[tuple[str, Share]], Rule(bool, "tokens and their shares")]


class Reading(TypedDict):
    norm: bool


class InspectConfig(TypedDict):
    protocol: Reading


class Inspected(Measuring):
    config: InspectConfig
    protocol: dict[str, Any]


class Pattern(TypedDict):
    kind: Literal["shallow", "semantic", "none"]
    last: tuple[str, Share]
    bigram: tuple[str, Share]
    words: list[tuple[str, Share]]
    documents: Share


class Removed(TypedDict):
    first: float
    last: float
    random: float


class Example(TypedDict):
    text: str
    last: str
    next: str | None
    coefficient: float
    document: Count


class Value(TypedDict):
    tokens: Promoted
    agrees: bool | None
    ranks: list[Count]


class Key(TypedDict):
    layer: Count
    key: Count
    examples: list[Example]
    pattern: Pattern | None
    removed: Removed | None
    value: Value


KeyLine = Annotated[Key, Rule(lambda line: bool(line["examples"]) == (line["pattern"] is not None), "triggers and"
                              " what they share")]  # fmt: skip


class Composition(TypedDict):
    active: Share
    alone: Share


class Refinement(TypedDict):
    agreement: Share
    residual: Share
    layer: Share
    composition: Share
    final: Share
    settled: Share


class Text(TypedDict):
    documents: Count
    prefixes: Count
    measured: Count


class OfLayer(TypedDict):
    layer: Count
    keys: Count
    silent: Count
    compared: Count
    agreement: Share | None
    chance: Share | None
    top_share: Share
    composition: Composition
    refinement: Refinement


class LayerLine(OfLayer, Text):
    key: None


class Fired(TypedDict):
    key: Count
    before: float
    after: float


class ToldFact(TypedDict):
    request: Request
    token: str
    change_promotes: Promoted


class ReadFact(ToldFact):
    fired: list[Fired]
    promoted_before: Promoted
    promoted_after: Promoted


class Moved(TypedDict):
    key: Count
    moved: float
    before: Promoted
    after: Promoted


class Factor(TypedDict):
    size: float
    tokens: Promoted
    texts: list[tuple[str, float]]


class EditLine(TypedDict):
    layer: Count
    key: None
    size: float
    facts: list[ReadFact]
    values: list[Moved]
    factors: list[Factor]


class ToldLayer(OfLayer):
    looked_at: Count
    shallow: Share | None
    semantic: Share | None
    documents_apart: Share | None
    removed: Removed | None


class ToldEdit(TypedDict):
    layer: Count
    size: float
    facts: list[ToldFact]


class MemoriesSummary(Summary):
    dataset: dict[str, Any]
    norm: bool
    text: Text | None
    layers: list[ToldLayer]
    edited: list[ToldEdit]


def _is_told(summary: Any) -> bool:
    whole = all((layer["agreement"] is None) == (layer["chance"] is None) for layer in summary["layers"])
    return whole and bool(summary["layers"]) == (summary["text"] is not None)


InspectSummary = Annotated[MemoriesSummary, Rule(_is_told, "a summary with the layers that were looked at")]
