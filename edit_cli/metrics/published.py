"""Metrics under the names of the papers on trained editors: MEND, KE, MALMEN, SERAC (meta-and-memory-editors, metrics).

Most are those of `scores` by another name; what papers define by themselves is worked out here. Pure functions over
lines of results.jsonl. They are told of cases with locality prompts (or opinions), which the data sets of trained
editors have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edit_cli.metrics.bleu import bleu
from edit_cli.metrics.scores import Pair, ProbeResult, Side, accuracy, paired_probes
from edit_cli.metrics.text import first_sentence

SAME = {  # published name: the metric that it is
    "es_edit": "efficacy_accuracy",
    "es_outer": "paraphrase_accuracy",
    "modified_accuracy": "efficacy_accuracy",
    "modified_written": "efficacy_generated_exact",
    "malmen_es": "efficacy_token_accuracy",
    "malmen_gs": "paraphrase_token_accuracy",
    "malmen_ls": "locality_token_accuracy",
}


def published_values(line: Mapping[str, Any], side: Side, values: Mapping[str, float]) -> dict[str, float]:
    """{metric id: value} of one case, in the units of the registry. values: what `scores.probe_values` gives for it."""
    pairs: dict[str, list[Pair]] = {}
    for probe, before in paired_probes(line, side):
        pairs.setdefault(probe["kind"], []).append((probe, before))
    found: dict[str, float | None] = {}
    if "locality" in pairs:
        found |= {name: values.get(same) for name, same in SAME.items()}
        found["es"] = _mean([found["es_edit"], found["es_outer"]])
        found |= _ke(pairs)
        found |= _unmodified(pairs["locality"])
        found |= _bleu(pairs["locality"], side)
        found["gradient_steps"] = (line.get("diagnosis") or {}).get("steps") if side == "after" else None
    found |= _convsent(pairs.get("opinion", ()))
    return {name: value for name, value in found.items() if value is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    return None if not values or None in values else math.fsum(values) / len(values)  # type: ignore[arg-type]


def _share(hits: Sequence[bool | None]) -> float | None:
    told = [hit for hit in hits if hit is not None]
    return 100.0 * sum(told) / len(told) if told else None


# --- KE (De Cao et al., 2021): predictions are texts, compared without case, spaces and punctuation
# ---------------------------


def squeezed(text: str) -> str:
    """Lower case, letters and digits only."""
    return "".join(character for character in text.lower() if character.isalnum())


def reply(probe: ProbeResult | None) -> str | None:
    """What the model said to this prompt, squeezed; None if it was not asked to write."""
    text = None if probe is None else probe.get("generated")
    return None if probe is None or text is None else squeezed(first_sentence(text, probe.get("target") or ""))


def is_right(probe: ProbeResult) -> bool | None:
    """Whether the reply is the target or an alias."""
    said = reply(probe)
    if said is None or probe.get("target") is None:
        return None
    return said in {squeezed(answer) for answer in (probe["target"], *probe.get("aliases", ()))}


def _ke(pairs: Mapping[str, Sequence[Pair]]) -> dict[str, float | None]:
    edited = next((said for probe, _ in pairs.get("rewrite", ()) if (said := reply(probe)) is not None), None)
    retained = [(reply(probe), reply(before)) for probe, before in pairs["locality"]]
    return {
        "ke_success": _share([is_right(probe) for probe, _ in pairs.get("rewrite", ())]),
        "ke_retain": _share([now == then for now, then in retained if now is not None and then is not None]),
        "ke_equivalence": _share(
            [said == edited for probe, _ in pairs.get("paraphrase", ()) if (said := reply(probe)) is not None]
        ),
    }


# --- constrained fine-tuning (Zhu et al., 2020): facts that the model knew
# ---------------------------------------------------------------------------------------------------


def _unmodified(pairs: Sequence[Pair]) -> dict[str, float | None]:
    known = [(probe, before or probe) for probe, before in pairs]
    return {
        "unmodified_accuracy": _share([accuracy(now) == 1.0 for now, then in known if accuracy(then) == 1.0]),
        "unmodified_written": _share([is_right(now) for now, then in known if is_right(then)]),
    }


# --- ENN on translation (Sinitsin et al., 2020) ---------------------------------------------------------------------


def _bleu(pairs: Sequence[Pair], side: Side) -> dict[str, float | None]:
    now = bleu([probe for probe, _ in pairs])
    if now is None or side == "before":
        return {"bleu": now}
    then = bleu([before for _, before in pairs])
    return {"bleu": now, "bleu_drawdown": None if then is None else then - now}


# --- ConvSent (SERAC, Mitchell et al., 2022)
# ---------------------------------------------------------------------------------


def _convsent(pairs: Sequence[Pair]) -> dict[str, float | None]:
    """Sentiment and topic. The unedited model is its own baseline."""
    wanted = [pair for pair in pairs if pair[0].get("group") == "wanted"]
    unwanted = [pair for pair in pairs if pair[0].get("group") == "unwanted"]
    if not wanted or not unwanted:
        return {}
    good, bad = (_loglikelihood([probe for probe, _ in some]) for some in (wanted, unwanted))
    before = _loglikelihood([before or probe for probe, before in wanted])
    sentiment = 0.0 if good == -math.inf else 1.0 if bad == -math.inf else _sigmoid(good - bad)
    topic = 0.0 if good == -math.inf else min(1.0, math.exp(min(0.0, good - before)))
    return {
        "convsent_es": 100.0 * sentiment * topic,
        "convsent_sentiment": 100.0 * sentiment,
        "convsent_topic": 100.0 * topic,
    }


def _loglikelihood(probes: Sequence[ProbeResult]) -> float:
    """Mean log-probability of the tokens of all replies together; −∞ if one of them has none."""
    if any(probe.get("target_nll") is None for probe in probes):
        return -math.inf
    tokens = [len(probe["target_hits"]) for probe in probes]
    return -math.fsum(probe["target_nll"] * count for probe, count in zip(probes, tokens, strict=True)) / sum(tokens)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


# --- of all cases together
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aggregate:
    """A metric that is no mean over cases.

    parts: of one line, None if it has none. of: from means of the parts (…, parts) to the metric; NaN where it is not
    defined.
    """

    parts: Callable[[Mapping[str, Any]], tuple[float, ...] | None]
    of: Callable[[np.ndarray], np.ndarray]


def _local_likelihoods(line: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Nats of all target tokens of the case's locality prompts before and after, and how many tokens these are."""
    before: list[float] = []
    after: list[float] = []
    tokens = 0
    for probe, earlier in paired_probes(line, "after"):
        if probe["kind"] == "locality" and probe.get("target_hits") and earlier and earlier.get("target_hits"):
            count = len(probe["target_hits"])
            tokens += count
            for side, told in ((before, earlier), (after, probe)):
                side.append(math.inf if told["target_nll"] is None else count * told["target_nll"])
    return (math.fsum(before), math.fsum(after), float(tokens)) if tokens else None


def _perplexity_drawdown(means: np.ndarray) -> np.ndarray:
    before, after, tokens = means[..., 0], means[..., 1], means[..., 2]
    with np.errstate(over="ignore", invalid="ignore"):
        return np.exp(after / tokens) - np.exp(before / tokens)


def _local_replies(line: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Right replies to the case's locality prompts before and after."""
    pairs = [
        (before, probe) for probe, before in paired_probes(line, "after") if probe["kind"] == "locality" and before
    ]
    told = [
        (then, now)
        for then, now in ((is_right(a), is_right(b)) for a, b in pairs)
        if then is not None and now is not None
    ]
    return tuple(float(sum(side)) / len(told) for side in zip(*told, strict=True)) if told else None


def _deterioration(means: np.ndarray) -> np.ndarray:
    """Percent; NaN where nothing was right before, so that nothing could be lost."""
    before, after = means[..., 0], means[..., 1]
    return np.where(before > 0, 100.0 * (1.0 - after / np.where(before > 0, before, 1.0)), np.nan)


AGGREGATES: dict[str, Aggregate] = {
    "perplexity_drawdown": Aggregate(_local_likelihoods, _perplexity_drawdown),
    "ke_deterioration": Aggregate(_local_replies, _deterioration),
}
