"""TRANSITION, for editors that are no `Config` yet; goes with editors/old.py. Which numbers a setting may have. A name means the same wherever it occurs, so the last part of a key tells."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

LARGEST = 2**63 - 1  # whole number that a tensor holds
LARGEST_SEED = 2**32 - 1  # that NumPy's generators take
# Of most numbers 0 says "none of it". Of these it would leave nothing to be done, or nothing to be measured.
ABOVE_ZERO = set(
    "batch_size batch_tokens buffer chunk clamp_norm_factor collapse_perplexity decay_every default_limit documents"
    " epochs every head hidden inner last limit lr max_edits max_length merge_every mpes norm_constraint oversample"
    " passage_words patches per_start prompts rank replies row_tokens scale shard_every steps top_activation top_k"
    " top_memory width words".split()
)
BELOW_ZERO = {"alpha", "beta", "gamma", "threshold"}  # margins and scores, which may lie there
UNLIMITED = {"clip", "collapse_perplexity", "radius"}  # inf switches these off
SHARES = {"density", "dropout", "mask_ratio", "smoothing", "vary"}
# Lists that choose: nothing is chosen twice
CHOICES = {"checkpoints", "ids", "kinds", "layers", "lora_layers", "lora_modules", "modules", "only_folds", "trackers"}


def fault(name: str, value: Any) -> str | None:
    """What to give instead of `value` for a key that ends in `name`; None where it can stand."""
    if isinstance(value, list):
        if name in CHOICES and (twice := [part for part, times in Counter(map(str, value)).items() if times > 1]):
            return f"{twice[0]} occurs twice; name it once"
        return next((found for part in value if (found := fault(name, part))), None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    kind = "a whole number" if isinstance(value, int) else "a number"
    if math.isnan(value) or (math.isinf(value) and name not in UNLIMITED):
        return "give a number that is finite"
    if name in ABOVE_ZERO and value <= 0:
        return f"give {kind} {'from 1 up' if isinstance(value, int) else 'above 0'}"
    if value < 0 and name not in BELOW_ZERO:
        return f"give {kind} from 0 up"
    if name in SHARES and value > 1:
        return "give a share, from 0 to 1"
    largest = LARGEST_SEED if name.endswith("seed") else LARGEST
    if isinstance(value, int) and abs(value) > largest:
        return f"give {kind} up to {largest:,}"
    return None
