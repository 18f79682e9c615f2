"""BLEU of translations (Papineni et al., 2002), by sacrebleu where it is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

GROUP = "translation"  # of the probes that are sentences to translate


@cache
def _meter() -> Any:
    """sacrebleu's meter with its defaults (13a, four-grams, exponential smoothing), or None."""
    if find_spec("sacrebleu") is None:
        return None
    from sacrebleu.metrics.bleu import BLEU

    return BLEU()


def bleu(probes: Sequence[Mapping[str, Any] | None]) -> float | None:
    """BLEU (0–100) of what the model wrote to all these sentences together; None where there are none, or no
    sacrebleu.
    """
    asked = [probe for probe in probes if probe is not None and probe.get("group") == GROUP]
    written = [probe["generated"] for probe in asked if probe.get("generated") is not None]
    meter = _meter()
    if not written or len(written) < len(asked) or meter is None:
        return None
    references = [probe["target"].strip() for probe in asked]
    return float(meter.corpus_score([text.strip() for text in written], [references]).score)
