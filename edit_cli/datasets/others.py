"""Records of a set as what must stay when another one of it is edited."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from edit_cli.requests import Case, Probe

TRIES = 4  # candidates that are looked at for each one wanted


def beside(chosen: Sequence[Case], kept: Mapping[str, Probe], count: int, seed: int) -> list[Case]:
    """The chosen cases, each with `count` probes of others that must stay (0: with all of them), by the others' ids.

    Those of chosen cases come last, where some are drawn. What is drawn depends on the seed and the case.
    """
    edited = {case.id for case in chosen}
    return [replace(case, probes=(*case.probes, *_others(case.id, kept, edited, count, seed))) for case in chosen]


def _others(own: str, kept: Mapping[str, Probe], edited: Set[str], count: int, seed: int) -> list[Probe]:
    if not count:
        return [probe for name, probe in kept.items() if name != own]
    drawn = random.Random(f"{seed} others {own}").sample(list(kept), min(TRIES * count, len(kept)))
    drawn.sort(key=lambda name: name in edited)
    return [kept[name] for name in drawn if name != own][:count]
