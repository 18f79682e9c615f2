"""Numbers, metrics and protocols in plain words, for readers who do not know the papers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from edit_cli.metrics.registry import GROUPS, METRICS, PARTS, PUBLISHED, Metric, of_plugins
from edit_cli.metrics.registry import metrics as registered

TEACHER_FORCED = "TEACHER-FORCED: how it rates answers that are put to it"
FREE_RUNNING = "FREE-RUNNING: what it writes by itself"
AS_A_WHOLE = "THE MODEL AS A WHOLE"
FROM_PLUGINS = "OF PLUG-INS"
AS_PUBLISHED = "UNDER THE NAMES OF THE PAPERS: much of the above again"

WHERE = {
    "efficacy": "Edited prompts (efficacy)",
    "paraphrase": "The same in other words (paraphrase)",
    "neighborhood": "Other subjects (neighborhood): they must keep their answers",
    "attribute": "Other subjects that always had the new answer (attribute)",
    "locality": "Unrelated prompts (locality): they must keep their answers",
    "portability": "What follows from the edit (portability)",
    "paraphrase_seen": "The same in wordings of the training (paraphrase, seen)",
    "paraphrase_unseen": "The same in wordings new to it (paraphrase, unseen)",
    "locality_random": "Other subjects, other matters (locality): they must keep their answers",
    "locality_same_relation": "The same asked of other subjects (locality): they must keep their answers",
    "locality_same_subject": "Other matters about the same subject (locality): they must keep their answers",
    "locality_hard": "Near misses (locality): close to the edit, and not touched by it",
    "locality_translation": "Other sentences (locality): they must keep their translations",
    "portability_implied": "What the edit implies (portability)",
    "portability_true_false": "Statements, true or false after the edit (portability)",
}


def sections(metrics: Collection[str]) -> list[tuple[str, list[tuple[str, list[Metric]]]]]:
    """[(section, [(which prompts, metrics)])] for those of `metrics` that a table shows; teacher-forced and
    free-running ones apart.
    """
    known, rated, written = registered(), [], []
    for group in GROUPS:
        for place in parts_of(group, metrics) or [group]:
            own = [known[name] for name in _measured(place, metrics) if not _told_otherwise(name, place, metrics)]
            generated = [metric for metric in own if str(metric.measure).startswith("generated")]
            rated.append((WHERE[place], [metric for metric in own if metric not in generated]))
            written.append((WHERE[place], generated))

    def measured(*names: str) -> list[Metric]:
        return [known[name] for name in names if name in metrics]

    rated.append(("All three together", measured("score", "token_score")))
    whole = [("", measured("generation_entropy", "reference_score", "perplexity"))]
    named = [(paper, measured(*names)) for paper, names in PUBLISHED.items()]
    # not the data of a trained editor
    if not (any(parts_of(group, metrics) for group in GROUPS) or "convsent_es" in metrics):
        named = []
    plugged = [("", measured(*of_plugins()))]
    parts = (
        (TEACHER_FORCED, rated),
        (FREE_RUNNING, written),
        (AS_A_WHOLE, whole),
        (FROM_PLUGINS, plugged),
        (AS_PUBLISHED, named),
    )
    filled = [(title, [(where, rows) for where, rows in groups if rows]) for title, groups in parts]
    return [(title, groups) for title, groups in filled if groups]


def parts_of(group: str, metrics: Collection[str]) -> list[str]:
    """Those parts of a group that were measured; they are then told in its place."""
    return [part for part, (whole, _, _) in PARTS.items() if whole == group and _measured(part, metrics)]


def _measured(place: str, metrics: Collection[str]) -> list[str]:
    """The metrics of a group or a part that were measured, in the registry's order."""
    return [m.id for m in METRICS.values() if m.measure and m.id == f"{place}_{m.measure}" and m.id in metrics]


def _told_otherwise(name: str, place: str, metrics: Collection[str]) -> bool:
    """Whether a table leaves a metric out, for another one that says more."""
    measure = METRICS[name].measure
    if measure == "token_accuracy":  # the accuracies of whole answers say more
        return f"{place}_success" in metrics or place.startswith("locality_")
    return measure == ("unchanged" if place in PARTS else "disagreement")


def number(value: float | None, digits: int = 1) -> str:
    """One decimal, thousands apart; a value that is not finite is told as such."""
    return "not finite" if value is None else f"{value:,.{digits}f}"


def with_interval(entry: Mapping[str, Any] | None, decimals: int = 1) -> str:
    """`98.5 [95, 100]`: mean and 95 % interval, whose ends have decimals only where they are close, or where the
    mean has many.
    """
    if entry is None:
        return "–"
    ends = entry["ci95"]
    if ends is None or None in ends:
        return number(entry["mean"], decimals)
    digits = decimals if decimals > 1 or ends[1] - ends[0] < 2 else 0
    low, high = ("100" if end == 100 else number(end, digits) for end in ends)
    return f"{number(entry['mean'], decimals)} [{low}, {high}]"


def counted(metrics: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """`n = 100`: facts that means are over; `n = 100, at end 20` where the last side has fewer of them. Nothing for no
    metric.

    metrics: {side: entry} of each.
    """
    sizes = [entry["n"] for sides in metrics for entry in sides.values()]
    ends = [sides["at_end"]["n"] for sides in metrics if "at_end" in sides]
    if not sizes:
        return ""
    return f"n = {max(sizes):,}" + (f", at end {max(ends):,}" if ends and max(ends) < max(sizes) else "")


def mean(entry: Mapping[str, Any] | None, decimals: int = 1) -> str:
    """`98.5`: the mean alone."""
    return "–" if entry is None else number(entry["mean"], decimals)


def forms(told: Mapping[str, Any]) -> str:
    """In which forms facts were edited and asked (lm/chat.py)."""
    named = {"plain": "as plain text", "chat": "in the model's chat template"}
    edited, asked = named[told["edited"]], [named[form] for form in told["asked"]]
    if asked == [edited]:
        return f"Edited and asked {edited}."
    told_again = {named["chat"]: "in it"} if edited == named["chat"] else {}
    return f"Edited {edited}, asked {' and '.join(told_again.get(form, form) for form in asked)}."


def records(dataset: Mapping[str, Any]) -> str:
    """Which records were used, and out of how many."""
    if known := dataset.get("known"):
        rule = {"reply": "its reply holds the answer", "rank": "the answer is its first choice"}[known["by"]]
        used = f"{dataset['records_selected']:,} of {dataset['records_total']:,} records"
        return f"{used}: {known['known']:,} of {known['asked']:,} asked are known to the model ({rule})"
    used, total, dropped, limit = (
        dataset[key] for key in ("records_selected", "records_total", "records_dropped", "limit")
    )
    if used == total:
        return f"all {total:,} records" if total > 1 else "1 record"
    why = [f"limit={limit}"] if limit is not None and used == limit else []
    why += [f"{dropped:,} unusable"] if dropped else []
    return f"{used:,} of {total:,} records" + (f" ({', '.join(why)})" if why else "")


def batches(protocol: Mapping[str, Any]) -> str:
    """How many facts were edited together."""
    size, count = protocol["batch_size"], protocol["batches"]
    return "all at once" if count == 1 else "one at a time" if size == 1 else f"in batches of {size:,}"


def asked(protocol: Mapping[str, Any]) -> str:
    """When the model was asked, and what became of the edits. Runs tell it by `evaluated`."""
    return {
        "after each batch": "Asked before, and again with the batch's edit in place, which is then taken back.",
        "after all edits": "Asked before, and again with the edit in place.",
        "right after each step, and at checkpoints": (
            "Nothing is taken back. Asked before all, right after each step, and at checkpoints."
        ),
    }[protocol["evaluated"]]


def answers(protocol: Mapping[str, Any]) -> str:
    """In which order the facts were edited, and what counts as an answer."""
    seed = protocol.get("order_seed")
    order = "that of the data" if seed is None else f"shuffled with seed {seed}"
    kinds = "teacher-forced and free-running" if protocol["observe"]["generate"] else "teacher-forced only"
    return f"Order of the facts: {order}. Answers: {kinds}."


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f} s" if value < 10 else f"{value:,.0f} s"


def phases(spent: Mapping[str, float], shown: int = 6) -> str:
    """`value 11.2, ask after 4.0, …`"""
    told = [f"{phase} {value:.1f}" for phase, value in spent.items() if value >= 0.05]
    rest = sum(list(spent.values())[shown:])
    return ", ".join(told[:shown]) + (f", rest {rest:.1f}" if len(told) > shown else "")
