"""Metrics of one case, from one line of results.jsonl.

Pure functions: no model is needed, so runs can be scored again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from edit_cli.metrics.locality_distribution import divergence
from edit_cli.metrics.registry import METRICS
from edit_cli.metrics.text import EntropyMeter, contains_any, first_sentence, matches_exactly

Side = Literal["before", "after"]
ProbeResult = Mapping[str, Any]
Pair = tuple[ProbeResult, "ProbeResult | None"]  # of one side, and before the edit
Measure = Callable[[ProbeResult, "ProbeResult | None"], "float | None"]


def _nll(probe: ProbeResult, role: str) -> float | None:
    """Nats per token.

    None without such a text; infinite where the model gave no finite number, as wrecked models do.
    """
    if probe.get(role) is None:
        return None
    nll = probe.get(f"{role}_nll")
    return math.inf if nll is None or not math.isfinite(nll) else nll


def success(probe: ProbeResult, before: ProbeResult | None = None) -> float | None:
    """1[nll(target) < nll(foil)]; a tie is a failure."""
    target, foil = _nll(probe, "target"), _nll(probe, "foil")
    return None if target is None or foil is None else float(target < foil)


def magnitude(probe: ProbeResult, before: ProbeResult | None = None) -> float | None:
    """exp(-nll(target)) - exp(-nll(foil)), in [-1, 1]: geometric-mean token probabilities."""
    target, foil = _nll(probe, "target"), _nll(probe, "foil")
    return None if target is None or foil is None else math.exp(-target) - math.exp(-foil)


def accuracy(probe: ProbeResult, before: ProbeResult | None = None) -> float | None:
    """1 if every target token is the arg-max, else 0."""
    hits = probe.get("target_hits")
    return float(all(hits)) if hits else None


def token_accuracy(probe: ProbeResult, before: ProbeResult | None = None) -> float | None:
    """Share of target tokens that are the arg-max."""
    hits = probe.get("target_hits")
    return sum(hits) / len(hits) if hits else None


def unchanged(probe: ProbeResult, before: ProbeResult | None = None) -> float | None:
    """Share of target positions whose arg-max is the token id that it was before the edit."""
    now, then = probe.get("target_predicted"), before and before.get("target_predicted")
    if not now or not then or len(now) != len(then):
        return None
    return sum(a == b for a, b in zip(now, then, strict=True)) / len(now)


def drawdown(probe: ProbeResult, before: ProbeResult | None = None) -> float | None:
    """Accuracy before minus accuracy after, in [-1, 1] (MEND's drawdown where the target is the right answer)."""
    now, then = accuracy(probe), accuracy(before) if before else None
    return None if now is None or then is None else then - now


def disagreement(probe: ProbeResult, before: ProbeResult | None = None) -> float | None:
    """1 if the arg-max of any target position is another one than before the edit (SERAC's drawdown; no right answer is
    used).

    Where no answer is known, the replies are compared.
    """
    if probe.get("target") is None:
        same = generated_unchanged(probe, before)
        return None if same is None else 1.0 - same
    now, then = probe.get("target_predicted"), before and before.get("target_predicted")
    return None if not now or not then or len(now) != len(then) else float(list(now) != list(then))


def kl(probe: ProbeResult, before: ProbeResult | None = None) -> float | None:
    """KL(before ‖ after) at the target positions, mean over them, nats; see `locality_distribution.divergence`."""
    now, then = probe.get("top"), before and before.get("top")
    return divergence(then, now) if now and then else None


def generated_exact(probe: ProbeResult, before: ProbeResult | None = None) -> float | None:
    """Normalized exact match of the reply with the target or an alias."""
    return _on_answers(matches_exactly, probe)


def generated_contains(probe: ProbeResult, before: ProbeResult | None = None) -> float | None:
    """The reply holds the target or an alias as whole words."""
    return _on_answers(contains_any, probe)


def _on_answers(match: Callable[[str, Sequence[str]], bool], probe: ProbeResult) -> float | None:
    text, target = probe.get("generated"), probe.get("target")
    return None if text is None or target is None else float(match(text, (target, *probe.get("aliases", ()))))


def generated_unchanged(probe: ProbeResult, before: ProbeResult | None = None) -> float | None:
    """1 if the reply is, character by character, what it was before the edit.

    What follows the reply is other sentences.
    """
    now, then = probe.get("generated"), before and before.get("generated")
    if now is None or then is None:
        return None
    return float(first_sentence(now, probe.get("target") or "") == first_sentence(then, probe.get("target") or ""))


def generated_judged(probe: ProbeResult, before: ProbeResult | None = None) -> float | None:
    """1 if a judge has said that the reply gives the target; None where none was asked, or it did not decide."""
    judged = probe.get("judged")
    return None if judged is None else float(judged)


def generated_length(probe: ProbeResult, before: ProbeResult | None = None) -> float | None:
    """Words of the reply."""
    text = probe.get("generated")
    return None if text is None else float(len(first_sentence(text, probe.get("target") or "").split()))


MEASURES: dict[str, Measure] = {
    measure.__name__: measure
    for measure in (
        success, magnitude, accuracy, token_accuracy, unchanged, drawdown, disagreement, kl,
        generated_exact, generated_contains, generated_unchanged, generated_judged, generated_length,
    )
}  # fmt: skip


def is_scored(line: Mapping[str, Any]) -> bool:
    """Whether a line of results.jsonl holds a case that went through; failed ones are counted, not averaged."""
    return not line.get("error") and line.get("after") is not None and not line["after"].get("error")


def paired_probes(line: Mapping[str, Any], side: Side) -> list[Pair]:
    """The probes of one side, those of "after" with what was said before the edit (None where that is unknown)."""
    probes = (line.get(side) or {}).get("probes", [])
    earlier = ((line.get("before") or {}).get("probes", []) if side == "after" else []) or [None] * len(probes)
    return list(zip(probes, earlier, strict=True))


def probe_values(line: Mapping[str, Any], side: Side) -> dict[str, float]:
    """{metric id: value} of one case, for the metrics that are means over its probes; shares and probabilities ×
    100.
    """
    pairs: dict[tuple[str | None, str | None], list[Pair]] = {}
    for probe, before in paired_probes(line, side):
        for group in {None, probe.get("group")}:  # all of a kind together, and those of its group
            pairs.setdefault((probe["kind"], group), []).append((probe, before))
    values = {}
    for metric in METRICS.values():
        if metric.measure is None:
            continue
        measure = MEASURES[metric.measure]
        found = [value for pair in pairs.get((metric.kind, metric.group), ()) if (value := measure(*pair)) is not None]
        if found:
            values[metric.id] = math.fsum(found) / len(found) * (1.0 if metric.unit in ("words", "nats") else 100.0)
    return values


def generation_entropy(line: Mapping[str, Any], side: Side, meter: EntropyMeter) -> float | None:
    """Mean entropy of the case's sampled texts, bits × 100."""
    texts = (line.get(side) or {}).get("texts")
    return 100.0 * math.fsum(map(meter, texts)) / len(texts) if texts else None


def perplexity(line: Mapping[str, Any], side: Side) -> float | None:
    """exp(Σ nll / tokens); infinite for a model that gives no finite likelihoods."""
    seen = (line.get(side) or {}).get("perplexity")
    if not seen or not seen["tokens"]:
        return None
    mean = math.inf if seen["nll"] is None else seen["nll"] / seen["tokens"]
    return math.exp(mean) if mean < 700 else math.inf


def harmonic_mean(*values: Any) -> Any:
    """Harmonic mean, element by element of numbers or arrays; 0 where one of the values is 0 (or below)."""
    stacked = np.stack([np.asarray(value, dtype=float) for value in values])
    smallest = stacked.min(axis=0)
    safe = np.where(smallest > 0, stacked, 1.0)
    return np.where(smallest > 0, len(values) / (1.0 / safe).sum(axis=0), 0.0)
