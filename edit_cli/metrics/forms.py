"""Runs that ask in several forms (lm/chat.py): what was seen in the first stands where it stands in all runs, what was
seen in the others under `forms`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def other_forms(line: Mapping[str, Any]) -> list[str]:
    """The forms beside the first one in which a case was asked."""
    return list(dict.fromkeys(form for side in ("before", "after") for form in (line.get(side) or {}).get("forms", ())))


def seen_in(seen: Mapping[str, Any], form: str | None) -> dict[str, Any]:
    """What was seen in one form; None for the first. Texts are written, and perplexity measured, beside the first."""
    if form is None:
        return dict(seen)
    error = {"error": seen["error"]} if seen.get("error") else {}
    return {"texts": [], "perplexity": None, **(seen.get("forms") or {}).get(form, {"probes": []}), **error}


def line_in(line: Mapping[str, Any], form: str | None) -> dict[str, Any]:
    """A line of results as if its case had been asked in that form alone."""
    sides = {side: line[side] and seen_in(line[side], form) for side in ("before", "after")}
    return {**line, **sides}
