"""Rows of data files for tests, and what is looked for in what they give."""

from __future__ import annotations

from collections.abc import Callable

from edit_cli.datasets import Dataset
from edit_cli.requests import Case, Probe

Writer = Callable[..., str]
OPINION = {"ent": "Norvik", "pos": ["Norvik is fine.", "I like it."], "neg": ["Norvik is bad.", "I hate it.", "Never."]}


def of(case: Case, kind: str, group: str | None = None) -> list[Probe]:
    return [probe for probe in case.probes if probe.kind == kind and (group is None or probe.group == group)]


def faults(dataset: Dataset) -> list[str]:
    return [str(drop) for drop in dataset.dropped]
