"""Every metric that a summary may hold: its id, label, unit, direction and definition. docs/metrics.md tells the same at length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edit_cli.requests import ProbeKind


@dataclass(frozen=True)
class Metric:
    """One column of a summary.

    unit: "%" (a share, 0–100), "points" (difference of probabilities × 100), "bits × 100", "words", or "" (a plain number).
    better: the direction of a good edit. kind and measure: for metrics that are means over a case's probes of one kind,
    the kind and the function in `scores.MEASURES`; None for the others.
    """

    id: str
    label: str
    unit: str
    better: Literal["higher", "lower", "neither"]
    definition: str
    kind: ProbeKind | None = None
    measure: str | None = None


GROUPS: dict[str, tuple[ProbeKind, str]] = {
    "efficacy": ("rewrite", "the edited prompts"),
    "paraphrase": ("paraphrase", "rephrased prompts"),
    "neighborhood": ("neighborhood", "prompts about other subjects that have the old object"),
    "attribute": ("attribute", "prompts about other subjects that always had the new object"),
    "locality": ("locality", "prompts that the edit must not touch"),
    "portability": ("portability", "prompts whose answer follows from the edit"),
}

# measure: (label, unit, better, definition, the groups it is taken on)
_MEASURES: dict[str, tuple[str, str, Literal["higher", "neither"], str, tuple[str, ...]]] = {
    "success": (
        "success", "%", "higher",
        "nll(target) < nll(foil), strictly; nll is the mean per target token",
        ("efficacy", "paraphrase", "neighborhood", "attribute"),
    ),
    "magnitude": (
        "magnitude", "points", "higher",
        "exp(-nll(target)) - exp(-nll(foil))",
        ("efficacy", "paraphrase", "neighborhood", "attribute"),
    ),
    "accuracy": (
        "accuracy", "%", "higher",
        "all target tokens are the arg-max given the ones before (teacher forcing)",
        tuple(GROUPS),
    ),
    "token_accuracy": (
        "token accuracy", "%", "higher",
        "share of target tokens that are the arg-max given the ones before (teacher forcing)",
        tuple(GROUPS),
    ),
    "unchanged": (
        "unchanged", "%", "higher",
        "share of target positions where the arg-max is the same token as before the edit",
        ("locality",),
    ),
    "generated_exact": (
        "generated, exact", "%", "higher",
        "the first sentence of the greedy continuation equals the target or an alias, both normalised",
        ("efficacy", "paraphrase", "portability"),
    ),
    "generated_contains": (
        "generated, contains", "%", "higher",
        "the first sentence of the greedy continuation contains the target or an alias as whole words, both normalised",
        ("efficacy", "paraphrase", "portability"),
    ),
    "generated_unchanged": (
        "generated, unchanged", "%", "higher",
        "the first sentence of the greedy continuation is the same text as before the edit",
        ("neighborhood", "locality"),
    ),
    "generated_length": (
        "generated length", "words", "neither",
        "words in the first sentence of the greedy continuation; long answers contain more by chance",
        ("efficacy",),
    ),
}  # fmt: skip

_OTHERS = (
    Metric(
        "score", "Score S", "%", "higher",
        "harmonic mean of the averages of efficacy_success, paraphrase_success and neighborhood_success; 0 if one of them is 0",
    ),
    Metric(
        "token_score", "Score S (tokens)", "%", "higher",
        "harmonic mean of the averages of efficacy_token_accuracy, paraphrase_token_accuracy and locality_token_accuracy",
    ),
    Metric(
        "generation_entropy", "Generation entropy (fluency)", "bits × 100", "higher",
        "H2/3 + 2·H3/3 over the word n-grams of each sampled text; mean over the texts",
    ),
    Metric(
        "reference_score", "Reference score (consistency)", "%", "higher",
        "cosine between the TF-IDF vectors of the sampled texts and of texts about things that have the new property",
    ),
    Metric(
        "perplexity", "Perplexity", "", "lower",
        "exp(sum of nll / tokens) of a fixed text; one value a step, not a case",
    ),
)  # fmt: skip

# what the two scores are made of
SCORES: dict[str, tuple[str, str, str]] = {
    "score": ("efficacy_success", "paraphrase_success", "neighborhood_success"),
    "token_score": ("efficacy_token_accuracy", "paraphrase_token_accuracy", "locality_token_accuracy"),
}

METRICS: dict[str, Metric] = {
    metric.id: metric
    for metric in (
        *(
            Metric(
                f"{group}_{measure}", f"{group.capitalize()} {label}", unit, better,
                f"{definition}; on {prompts}; mean over the case's prompts", kind, measure,
            )
            for group, (kind, prompts) in GROUPS.items()
            for measure, (label, unit, better, definition, groups) in _MEASURES.items()
            if group in groups
        ),
        *_OTHERS,
    )
}  # fmt: skip
