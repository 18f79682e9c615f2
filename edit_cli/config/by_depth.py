"""Layers to begin with on a model for which nobody has chosen any: where a method was published on others, by relative
depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from edit_cli.config import catalog

KEYS = ("layers", "layer", "lora_layers")  # of methods, that name layers
TRANSFERRED = "transferred"  # in the comment of settings that were themselves made so
EMBEDDED = "embedded:"


def first_layers(method: str, depth: int) -> dict[str, Any]:
    """{key of the method: its layers, or the one} for a model of `depth` blocks; none where nothing published tells."""
    found: dict[str, Any] = {}
    for key in KEYS:
        places = [
            (max(layers) / max(blocks - 1, 1), len(layers), isinstance(value, list))
            for settings, blocks in _published(method)
            if (value := settings.get(key)) is not None and (layers := _numbers(value)) and max(layers) < blocks
        ]
        if not places:
            continue
        last = round(median(share for share, _, _ in places) * (depth - 1))
        count = round(median(number for _, number, _ in places))
        chosen = list(range(max(last - count + 1, 0), last + 1))
        found[key] = chosen if places[0][2] else chosen[-1]
    for low, high in permutations(found, 2):
        top = max(_numbers(found[low]))
        if _stands_above(method, low, high) and top + 1 < depth:
            found[high] = [layer for layer in found[high] if layer > top] or [top + 1]
    return found


def _stands_above(method: str, low: str, high: str) -> bool:
    """Whether all that `high` lists lies above what `low` names, wherever the method was published."""
    both = [settings for settings, _ in _published(method) if low in settings and isinstance(settings.get(high), list)]
    return bool(both) and all(max(_numbers(one[low])) < min(_numbers(one[high])) for one in both)


def _numbers(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else [number for number in value if isinstance(number, int)]


def _published(method: str) -> Iterator[tuple[Mapping[str, Any], int]]:
    """(settings, number of blocks) of every model that the method was published on."""
    for file in sorted((catalog.conf_dir() / "tuned" / method).glob("*.yaml")):
        model = _read(catalog.conf_dir() / "model" / file.name)
        blocks = (model.get("made_for") or {}).get("num_hidden_layers")
        known = not str(model.get("id", EMBEDDED)).startswith(EMBEDDED)
        if known and blocks and TRANSFERRED not in file.read_text(encoding="utf-8").partition("\nlayer")[0]:
            yield _read(file), blocks


def _read(file: Path) -> Mapping[str, Any]:
    return (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}
