"""Every metric that a summary may hold: its id, label, unit, direction and definition, and how tables tell it.

docs/metrics.md tells the same at length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edit_cli.config import registry
from edit_cli.errors import UsageError
from edit_cli.requests import ProbeKind

UNITS = ("%", "points", "bits × 100", "nats", "words", "")
ARROWS = {"higher": "↑", "lower": "↓", "neither": ""}

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Metric:
    """One column of a summary.

    unit: "%" (a share, 0–100), "points" (difference of two shares or probabilities × 100), "bits × 100", "nats",
    "words", or "" (a plain number). better: the direction of a good edit. kind and measure: for metrics that are means
    over a case's probes of one kind, the kind and the function in `scores.MEASURES`; None for the others. group: those
    probes of the kind alone. of: of a plug-in's metric, its value for one case, in its unit, from the case's line of
    results and the side ("before" or "after"); None where the case has none.

    How tables tell it. row: what its row is called. tells: what it says, in a few words beside the row. heading: of its
    column where runs are compared. legend: what stands for the heading below such a table. digits: decimals. What is
    left out is made of label, definition and unit.
    """

    id: str
    label: str
    unit: str
    better: Better
    definition: str
    kind: ProbeKind | None = None
    measure: str | None = None
    group: str | None = None
    of: Callable[[Mapping[str, Any], str], float | None] | None = None
    row: str = ""
    tells: str = ""
    heading: str = ""
    legend: str = ""
    digits: int | None = None

    @property
    def decimals(self) -> int:
        """How many a table shows."""
        return self.digits if self.digits is not None else 3 if self.unit == "nats" else 1

    @property
    def explained(self) -> str:
        """What it says, in a few words where there are some."""
        return self.tells or self.definition

    @property
    def named(self) -> str:
        """`success, % ↑`"""
        name, unit = self.row or self.label, self.unit.replace(" ", "")
        return " ".join(part for part in (f"{name}, {unit}" if unit else name, ARROWS[self.better]) if part)


@dataclass(frozen=True)
class Measure:
    """What is measured of a probe: one metric for each group and part that it is taken on. The rest as `Metric`.

    kept, follows: what it tells of prompts that must keep their answers, and of those whose answer follows from the
    edit.
    """

    label: str
    unit: str
    better: Better
    definition: str
    taken_on: tuple[str, ...]
    tells: str
    row: str = ""
    kept: str = ""
    follows: str = ""

    def told_of(self, group: str) -> str:
        other = self.kept if group in KEPT else self.follows if group == "portability" else ""
        return other or self.tells


GROUPS: dict[str, tuple[ProbeKind, str]] = {
    "efficacy": ("rewrite", "the edited prompts"),
    "paraphrase": ("paraphrase", "rephrased prompts"),
    "neighborhood": ("neighborhood", "prompts about other subjects that have the old object"),
    "attribute": ("attribute", "prompts about other subjects that always had the new object"),
    "locality": ("locality", "prompts that the edit must not touch"),
    "portability": ("portability", "prompts whose answer follows from the edit"),
}

# parts of a group, where a data set tells its probes apart: (the group, the probes' own group, which prompts)
PARTS: dict[str, tuple[str, str, str]] = {
    "paraphrase_seen": ("paraphrase", "seen", "rephrased prompts in wordings that training used"),
    "paraphrase_unseen": ("paraphrase", "unseen", "rephrased prompts in wordings that training never used"),
    "locality_random": ("locality", "random", "prompts about another subject and another matter"),
    "locality_same_relation": ("locality", "same_relation", "prompts that ask the same of another subject"),
    "locality_same_subject": ("locality", "same_subject", "prompts that ask something else of the same subject"),
    "locality_hard": (
        "locality",
        "hard",
        "prompts that are near the edit in wording, or about the same page, and not touched by it",
    ),
    "locality_translation": ("locality", "translation", "other sentences, whose translations must stay"),
    "portability_implied": ("portability", "implied", "questions whose answer the edit implies"),
    "portability_true_false": ("portability", "true_false", "statements to be judged, true or false after the edit"),
}

_LOCAL = ("locality", *(part for part, (group, _, _) in PARTS.items() if group == "locality"))
_ANSWERED = ("efficacy", *(name for name in (*GROUPS, *PARTS) if name.startswith(("paraphrase", "portability"))))

KEPT = ("neighborhood", "locality", "attribute")  # groups of prompts that must keep their answers

_MEASURES: dict[str, Measure] = {
    "success": Measure(
        "success", "%", "higher",
        "nll(target) < nll(foil), strictly; nll is the mean per target token",
        ("efficacy", "paraphrase", "neighborhood", "attribute", "portability", "paraphrase_seen", "paraphrase_unseen",
         "portability_true_false"),
        "new answer likelier", kept="theirs is likelier", follows="right one is likelier",
    ),
    "magnitude": Measure(
        "magnitude", "points", "higher",
        "exp(-nll(target)) - exp(-nll(foil))",
        ("efficacy", "paraphrase", "neighborhood", "attribute"),
        "P(new) − P(old)", kept="P(theirs) − P(new)",
    ),
    "accuracy": Measure(
        "accuracy", "%", "higher",
        "all target tokens are the arg-max given the ones before (teacher forcing)",
        (*GROUPS, *PARTS),
        "new is top choice", kept="still top choice", follows="right is top choice",
    ),
    "token_accuracy": Measure(
        "token accuracy", "%", "higher",
        "share of target tokens that are the arg-max given the ones before (teacher forcing)",
        (*GROUPS, *PARTS),
        "tokens it got right",
    ),
    "unchanged": Measure(
        "unchanged", "%", "higher",
        "share of target positions where the arg-max is the same token as before the edit",
        _LOCAL,
        "same top choices",
    ),
    "drawdown": Measure(
        "drawdown", "points", "lower",
        "accuracy before the edit minus accuracy after it",
        _LOCAL,
        "accuracy lost",
    ),
    "disagreement": Measure(
        "disagreement", "%", "lower",
        "some target position has another arg-max than before the edit (1 − retain)",
        _LOCAL,
        "another top choice",
    ),
    "kl": Measure(
        "KL divergence", "nats", "lower",
        "mean over the target positions of KL(before ‖ after), over the likeliest tokens before and all others as one",
        _LOCAL,
        "how far it moved", row="KL",
    ),
    "generated_exact": Measure(
        "generated, exact", "%", "higher",
        "the first sentence of the greedy continuation equals the target or an alias, both normalized",
        _ANSWERED,
        "just the answer", row="exact match",
    ),
    "generated_contains": Measure(
        "generated, contains", "%", "higher",
        "the first sentence of the greedy continuation contains the target or an alias as whole words, both normalized",
        _ANSWERED,
        "answer is in reply", row="contains",
    ),
    "generated_judged": Measure(
        "generated, judged", "%", "higher",
        "the judge of protocol.observe.judge says that the first sentence of the greedy continuation gives the target",
        (*_ANSWERED, "neighborhood", *_LOCAL),
        "a judge says so", row="judged", kept="judge: still right",
    ),
    "generated_unchanged": Measure(
        "generated, unchanged", "%", "higher",
        "the first sentence of the greedy continuation is the same text as before the edit",
        ("neighborhood", *_LOCAL),
        "it writes the same", row="unchanged",
    ),
    "generated_length": Measure(
        "generated length", "words", "neither",
        "words in the first sentence of the greedy continuation; long answers contain more by chance",
        ("efficacy",),
        "of its reply", row="length",
    ),
}  # fmt: skip
# of those that are compared: (heading of the column, what stands for it below)
_COLUMNS = {
    "efficacy_success": ("efficacy", "the edited prompts"),
    "paraphrase_success": ("para-\nphrase", "the same in other words"),
    "neighborhood_success": ("neighbor-\nhood", "other subjects, which must keep their answers"),
    "efficacy_token_accuracy": ("efficacy", "the edited prompts"),
    "paraphrase_token_accuracy": ("para-\nphrase", "the same in other words"),
    "locality_token_accuracy": ("locality", "unrelated prompts, which must keep their answers"),
    "efficacy_generated_contains": ("writes", "its own reply holds the new answer"),
    "paraphrase_generated_contains": ("writes\npara-\nphrase", "so where it is asked in other words"),
    "neighborhood_generated_unchanged": ("same", "of other subjects it writes what it wrote before"),
    "locality_generated_unchanged": ("same\nlocality", "to unrelated prompts it writes what it wrote before"),
    "locality_random_drawdown": ("DD", "drawdown, points of accuracy lost on other subjects and matters"),
    "locality_same_relation_drawdown": ("DD rel", "on the same relation of other subjects"),
    "locality_same_subject_drawdown": ("DD subj", "on other matters about the same subject"),
}

_OTHERS = (
    Metric(
        "score", "Score S", "%", "higher",
        "harmonic mean of the averages of efficacy_success, paraphrase_success and neighborhood_success; 0 "
        "if one of them is 0",
        row="score S", tells="mean of 3 successes", heading="score", legend="harmonic mean of these",
    ),
    Metric(
        "token_score", "Score S (tokens)", "%", "higher",
        "harmonic mean of the averages of efficacy_token_accuracy, paraphrase_token_accuracy and "
        "locality_token_accuracy",
        row="score S", tells="of 3 token accuracies", heading="score", legend="harmonic mean of these",
    ),
    Metric(
        "generation_entropy", "Generation entropy (fluency)", "bits × 100", "higher",
        "H2/3 + 2·H3/3 over the word n-grams of each sampled text; mean over the texts",
        row="entropy", tells="fluency of texts",
    ),
    Metric(
        "reference_score", "Reference score (consistency)", "%", "higher",
        "cosine between the TF-IDF vectors of the sampled texts and of texts about things that have the new property",
        row="consistency", tells="fits new property",
    ),
    Metric(
        "perplexity", "Perplexity", "", "lower",
        "exp(sum of nll / tokens) of a fixed text; one value a step, not a case",
        row="perplexity", tells="of plain text", heading="ppl", legend="perplexity of plain text, lower is better",
    ),
)  # fmt: skip

# what the two scores are made of
SCORES: dict[str, tuple[str, str, str]] = {
    "score": ("efficacy_success", "paraphrase_success", "neighborhood_success"),
    "token_score": ("efficacy_token_accuracy", "paraphrase_token_accuracy", "locality_token_accuracy"),
}

# names under which papers report trained editors; see `metrics.published`
_LIKEWISE = "case, spaces and punctuation do not count"
_PUBLISHED = (
    Metric("es_edit", "ES, edited prompts (MEND)", "%", "higher", "efficacy_accuracy, on sets with locality prompts",
           row="ES, edited", tells="new is top choice"),
    Metric("es_outer", "ES, rephrased prompts (MEND)", "%", "higher",
           "paraphrase_accuracy, likewise; what MEND's tables show",
           row="ES, paraphrase", tells="same, in other words"),
    Metric("es", "ES (MEND)", "%", "higher", "mean of es_edit and es_outer",
           row="ES, both", tells="mean of these two"),
    Metric(
        "perplexity_drawdown", "Perplexity drawdown (MEND)", "", "lower",
        "perplexity after the edit minus before it; exp(sum of nll / tokens) over the target tokens of all "
        "locality prompts of all cases",
        row="DD perplexity", tells="of locality answers", digits=2,
    ),
    Metric("ke_success", "Success rate (KE)", "%", "higher",
           f"the reply to the edited prompt is the target or an alias; {_LIKEWISE}",
           row="success rate", tells="writes the target"),
    Metric("ke_retain", "Retain accuracy (KE)", "%", "higher",
           f"the reply to a locality prompt is the one before the edit; {_LIKEWISE}",
           row="retain acc.", tells="others unchanged"),
    Metric("ke_equivalence", "Equivalence (KE)", "%", "higher",
           f"the reply to a rephrased prompt is that to the edited one; {_LIKEWISE}",
           row="equiv. acc.", tells="rewordings agree"),
    Metric(
        "ke_deterioration", "Performance deterioration (KE)", "%", "lower",
        "1 − (share of right replies to locality prompts after the edit / before it), over all cases",
        row="perf. det.", tells="right answers lost",
    ),
    Metric("modified_accuracy", "Modified facts", "%", "higher", "efficacy_accuracy, on sets with locality prompts",
           row="modified", tells="new is top choice"),
    Metric("modified_written", "Modified facts, written", "%", "higher", "efficacy_generated_exact, likewise",
           row="modified, writes", tells="just the new answer"),
    Metric(
        "unmodified_accuracy", "Unmodified facts", "%", "higher",
        "accuracy on those locality prompts that were answered right before the edit: facts that the model knew",
        row="unmodified", tells="known, still top choice",
    ),
    Metric(
        "unmodified_written", "Unmodified facts, written", "%", "higher",
        "share of right replies to those locality prompts whose reply was right before the edit",
        row="unmodified, writes", tells="known, still written",
    ),
    Metric("gradient_steps", "Gradient steps (ENN)", "", "lower",
           "steps down the gradient that the edit took, until its loss was small enough or there were no more",
           row="gradient steps", tells="down to the new answer"),
    Metric("bleu", "BLEU", "", "higher",
           "sacrebleu's BLEU (0–100) of what the model writes to all other sentences of a case, by their references",
           row="BLEU", tells="of other sentences"),
    Metric("bleu_drawdown", "BLEU drawdown (ENN)", "", "lower",
           "bleu before the edit minus bleu after it", row="BLEU drawdown", tells="lost on other sentences", digits=2),
    Metric("malmen_es", "ES (MALMEN)", "%", "higher", "efficacy_token_accuracy, on sets with locality prompts",
           row="ES", tells="tokens, edited"),
    Metric("malmen_gs", "GS (MALMEN)", "%", "higher", "paraphrase_token_accuracy, likewise",
           row="GS", tells="tokens, paraphrases"),
    Metric("malmen_ls", "LS (MALMEN)", "%", "higher",
           "locality_token_accuracy: against the answers of the data, right or not before",
           row="LS", tells="tokens, unrelated"),
    Metric("convsent_es", "ES (ConvSent)", "%", "higher", "convsent_sentiment × convsent_topic, each as a share of 1",
           row="ES", tells="product of these", heading="ConvSent", legend="ES of its replies, in %"),
    Metric(
        "convsent_sentiment", "Sentiment (ConvSent)", "%", "higher",
        "σ(m(wanted) − m(unwanted)); m: mean log-probability per token over all replies of that sentiment",
        row="z sentiment", tells="wanted likelier",
    ),
    Metric(
        "convsent_topic", "Topic kept (ConvSent)", "%", "higher",
        "min(1, exp(m(wanted) after − m(wanted) before)): replies on the topic must not become less likely",
        row="z topic", tells="as likely as before",
    ),
)  # fmt: skip
# of protocol=sme (metrics/sme.py): means over folds
SME = {
    metric.id: metric
    for metric in (
        Metric("sme_sr", "SR", "%", "higher",
               "edited prompts answered as wanted right after their edit; mistakes only, mean over folds",
               tells="the edited prompt, right after its edit", legend="mistakes put right, in %"),
        Metric("sme_gr", "GR", "%", "higher", "the same of their other wordings, pooled over the edits of a fold",
               tells="its other wordings, right after its edit, all of them pooled", legend="their other wordings"),
        Metric("sme_er", "ER", "%", "higher", "all edited prompts of a fold, with all its edits in place",
               tells="all edited prompts of the fold, with all its edits in place",
               legend="all edited prompts at the end"),
        Metric("sme_train_r", "TrainR", "%", "higher",
               "accuracy on training records with all edits of a fold, over that before",
               tells="accuracy on training records with all edits, over that before",
               legend="accuracy on training records over that before"),
        Metric("sme_test_r", "TestR", "%", "higher",
               "accuracy on test records with all edits of a fold, over that before",
               tells="accuracy on test records with all edits, over that before", legend="on test records"),
    )
}  # fmt: skip
PUBLISHED: dict[str, tuple[str, ...]] = {
    "MEND": ("es_edit", "es_outer", "es", "perplexity_drawdown"),
    "KE": ("ke_success", "ke_retain", "ke_equivalence", "ke_deterioration"),
    "Constrained fine-tuning": (
        "modified_accuracy",
        "modified_written",
        "unmodified_accuracy",
        "unmodified_written",
    ),
    "ENN": ("gradient_steps", "bleu", "bleu_drawdown"),
    "MALMEN": ("malmen_es", "malmen_gs", "malmen_ls"),
    "SERAC, ConvSent": ("convsent_es", "convsent_sentiment", "convsent_topic"),
}


def _probe_metrics() -> list[Metric]:
    """Means over a case's probes: every group with its parts behind it, in the order of the measures."""
    found = []
    for group, (kind, prompts) in GROUPS.items():
        places = [
            (group, None, prompts),
            *((part, own, which) for part, (whole, own, which) in PARTS.items() if whole == group),
        ]
        for name, own, which in places:
            title = name.replace("_", " ").capitalize()
            for measure, one in _MEASURES.items():
                if name in one.taken_on:
                    told = f"{group}_{measure} on {which}"
                    if own is None:
                        told = f"{one.definition}; on {which}; mean over the case's prompts"
                    heading, legend = _COLUMNS.get(id := f"{name}_{measure}", ("", ""))
                    label, row, tells = f"{title} {one.label}", one.row or one.label, one.told_of(group)
                    about = (id, label, one.unit, one.better, told, kind, measure, own)
                    found.append(Metric(*about, row=row, tells=tells, heading=heading, legend=legend))
    return found


METRICS: dict[str, Metric] = {metric.id: metric for metric in (*_probe_metrics(), *_OTHERS, *_PUBLISHED, *SME.values())}


def metrics() -> dict[str, Metric]:
    """All metrics by their ids: those of this package, then those of plug-ins.

    Raises:
        UsageError: a plug-in's is not fit to be one; says what is wrong with it.
    """
    return METRICS | of_plugins()


def of_plugins() -> dict[str, Metric]:
    """Metrics that plug-ins bring. Raises as `metrics`."""
    found = registry.metrics()
    for name, metric in found.items():
        if wrong := _wrong(name, metric):
            raise UsageError(f"the metric {name} of a plug-in {wrong}")
    return found


def _wrong(name: str, metric: Any) -> str | None:
    """What is wrong with a plug-in's metric."""
    if not isinstance(metric, Metric) or not callable(metric.of):
        return "is no Metric with a function `of`"
    if metric.id != name:
        return f"says that its id is {metric.id}: its entry point and its id must agree"
    if name in METRICS:
        return "has the name of one of this package: give it another"
    if metric.unit not in UNITS:
        return f"has the unit {metric.unit!r}: choose one of {', '.join(map(repr, UNITS))}"
    return None
