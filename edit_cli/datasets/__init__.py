"""Data sets: each source maps the rows of a file to cases. Nothing is imported until it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Dataset": "base",
    "Source": "base",
    "Dropped": "records.rows",
    "Fault": "records.rows",
    "Row": "records.rows",
    "Remote": "records.files",
    "CounterFact": "counterfact",
    "TREx": "trex",
    "ZsRE": "zsre",
    "Facts": "facts",
    "KnownFacts": "known_facts",
    "WorldEdits": "world",
    "Fever": "fever",
    "VitaminC": "vitaminc",
    "ZsREQuestions": "zsre_qa",
    "ZsREHard": "zsre_hard",
    "Continuations": "generation",
    "ConvSent": "convsent",
    "WorldTexts": "world_tasks",
    "WorldHard": "world_tasks",
    "WorldOpinions": "world_tasks",
    "Images": "images",
    "ImageFiles": "images",
    "Digits": "digits",
    "Cifar10": "cifar10",
    "Pairs": "pairs",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
