"""Which configuration a run belongs to: its hash, and the keys in which two configurations differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

UNSET = "(unset)"


def plain(config: Any) -> Any:
    """Plain containers as JSON reads them back, so that a configuration equals the one that was stored."""
    return json.loads(json.dumps(config, default=str))


def config_hash(config: Mapping[str, Any], ignore: Sequence[str] = ()) -> str:
    """sha256 over the flattened configuration without the ignored keys."""
    return hashlib.sha256(json.dumps(flatten(plain(config), ignore), sort_keys=True).encode()).hexdigest()


def flatten(config: Mapping[str, Any], ignore: Sequence[str] = (), prefix: str = "") -> dict[str, Any]:
    """{"method.layers": [3, 4], …}: one entry a leaf, keys dotted. Lists and empty mappings are leaves."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name in ignore:
            continue
        flat |= flatten(value, ignore, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], ignore: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old value, new value)} where two configurations differ; UNSET where one lacks the key."""
    was, now = flatten(plain(old), ignore), flatten(plain(new), ignore)
    pairs = {name: (was.get(name, UNSET), now.get(name, UNSET)) for name in sorted(was.keys() | now.keys())}
    # 1 is not 1.0 or true
    return {name: pair for name, pair in pairs.items() if json.dumps(pair[0]) != json.dumps(pair[1])}
