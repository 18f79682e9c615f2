"""What `tune` counts as good, from lines of results: the overall score, what the model writes, and a bound on
perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edit_cli.metrics.bootstrap import bootstrap
from edit_cli.metrics.scores import harmonic_mean, perplexity
from edit_cli.metrics.summarize import case_values

BOUND = 1.1  # perplexity may become so many times that of the unedited model before it costs
WRITES = 0.25  # weight of what the model writes by itself
CANDIDATES = {  # the first metric that the data have
    "efficacy": ("efficacy_success", "efficacy_accuracy"),
    "paraphrase": ("paraphrase_success", "paraphrase_accuracy"),
    "neighborhood": (
        "neighborhood_success",
        "locality_unchanged",
        "locality_disagreement",
        "neighborhood_generated_unchanged",
    ),
    "written": ("efficacy_generated_contains", "efficacy_generated_exact"),
}

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Objective:
    """(1 − w) · harmonic mean of efficacy, paraphrase and neighborhood + w · written, in %, divided by how far
    perplexity is beyond its bound.

    metrics: {part: id of the metric}; a part that the data lack is left out.
    """

    metrics: Mapping[str, str]

    @classmethod
    def of(cls, lines: Sequence[Line]) -> Objective:
        """What these lines have values for."""
        known = {metric for case in case_values(lines) for metric in case["after"]}
        found = {part: next((name for name in names if name in known), None) for part, names in CANDIDATES.items()}
        return cls({part: name for part, name in found.items() if name is not None})

    def parts(self, lines: Sequence[Line]) -> list[dict[str, float]]:
        """{part: %} of each line; a fact that failed has 0 everywhere, so that refusing facts never pays."""
        return [
            {part: self._value(name, case["after"]) for part, name in self.metrics.items()}
            for case in case_values(lines)
        ]

    def _value(self, metric: str, values: Mapping[str, float]) -> float:
        if metric == "locality_disagreement":
            return 100.0 - values.get(metric, 100.0)
        return values.get(metric, 0.0)

    def score(self, means: Any) -> Any:
        """The objective before perplexity, of means (…, parts) in the order of `metrics`."""
        columns = dict(zip(self.metrics, np.moveaxis(np.asarray(means, dtype=float), -1, 0), strict=True))
        written = columns.pop("written", None)
        overall = harmonic_mean(*columns.values())
        return overall if written is None else (1 - WRITES) * overall + WRITES * written

    def rows(self, facts: Sequence[Mapping[str, float]]) -> np.ndarray:
        """(facts, parts)"""
        return np.array([[fact[part] for part in self.metrics] for fact in facts], dtype=float)

    def told(self) -> str:
        """The objective in words."""
        shares = [part for part in self.metrics if part != "written"]
        mean = f"the harmonic mean of {', '.join(shares)}"
        text = f"{1 - WRITES:g} × {mean} + {WRITES:g} × share written" if "written" in self.metrics else mean
        return f"{text}; divided by how far perplexity is beyond {BOUND:g} times that of the unedited model"


def penalty(before: float | None, after: float | None) -> float:
    """What the score is multiplied with: 1 within the bound, less the further beyond it, 0 for a wrecked model."""
    if before is None or after is None or after <= BOUND * before:
        return 1.0
    return BOUND * before / after if math.isfinite(after) else 0.0


def perplexities(lines: Sequence[Line]) -> tuple[float | None, float | None]:
    """(before, after), means over the batches; None without a text that it is measured on."""
    found = []
    for side in ("before", "after"):
        by_step = {line["step"]: value for line in lines if (value := perplexity(line, side)) is not None}  # type: ignore[arg-type]
        found.append(math.fsum(by_step.values()) / len(by_step) if by_step else None)
    return found[0], found[1]


def difference(objective: Objective, best: Line, second: Line, seed: int) -> tuple[float, tuple[float, float] | None]:
    """How far one trial is above another, and the 95 % interval of that over facts, both asked about the same ones.

    The interval is None for a single fact.
    """
    one, other = (objective.rows(list(trial["facts"].values())) for trial in (best, second))
    width = one.shape[1]

    def apart(means: np.ndarray) -> np.ndarray:
        return best["penalty"] * objective.score(means[..., :width]) - second["penalty"] * objective.score(
            means[..., width:]
        )

    both = np.concatenate([one, other], axis=1)
    found = float(apart(both.mean(axis=0)))
    if len(both) < 2:
        return found, None
    low, high = bootstrap(both, seed, lambda means: apart(means)[:, None])[:, 0]
    return found, (float(low), float(high))
