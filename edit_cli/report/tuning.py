"""What a search for settings found: trials as a table, as CSV and as a figure, and how sure the best one is."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from edit_cli.config.schema import shown
from edit_cli.report.comparison import right_aligned
from edit_cli.report.figures import style
from edit_cli.report.tables.run import prose
from edit_cli.report.tables.texts import Text
from edit_cli.tuning.objective import Objective, difference
from edit_cli.wording import many

TRIALS, FIGURE = "trials.csv", "tradeoff"
SHOWN = 15  # trials in the table; the file has all
NAMED = 6  # trials at one place of the figure
TITLES = {"efficacy": "efficacy", "paraphrase": "paraphrase", "neighborhood": "neighborhood", "written": "writes"}

RANKED = ("trial", "settings", "objective", "parts", "perplexity", "seconds", "failed", "error")

Trial = Mapping[str, Any]


def summary_of(manifest: Mapping[str, Any], trials: Sequence[Trial], *_: Any) -> dict[str, Any]:
    """What a search tells: its trials, best first, and how far the best is from the second best."""
    ranked = best_first(trials)
    objective = Objective(ranked[0]["metrics"])
    apart = difference(objective, ranked[0], ranked[1], manifest["config"]["seed"]) if len(ranked) > 1 else None
    return {
        "method": manifest["method"],
        "model": manifest["model"],
        "dataset": manifest["dataset"],
        "facts": manifest["protocol"]["facts"],
        "objective": objective.told(),
        "n": len(ranked[0]["facts"]),
        "trials": len(ranked),
        "ranked": [{key: trial[key] for key in RANKED} for trial in ranked],
        "difference": None if apart is None else {"mean": apart[0], "ci95": apart[1]},
    }


def best_first(trials: Sequence[Trial]) -> list[Trial]:
    """By objective; of equals the one with fewer failed facts comes first, then the earlier."""
    return sorted(trials, key=lambda trial: (-trial["objective"], trial["failed"]))


def table(summary: Mapping[str, Any]) -> RenderableType:
    """One line a trial, best first."""
    trials = summary["ranked"]
    parts = list(trials[0]["parts"])
    found = right_aligned("trial", "objective", *(TITLES[part] for part in parts), "ppl", "s")
    found.add_column("settings", justify="left", overflow="fold")
    for trial in trials[:SHOWN]:
        now = trial["perplexity"][1]
        found.add_row(
            str(trial["trial"]),
            f"{trial['objective']:.1f}",
            *(f"{trial['parts'][part]:.1f}" for part in parts),
            "–" if now is None else f"{now:.3g}",
            f"{trial['seconds']:.1f}",
            trial["error"] if trial["failed"] == summary["n"] else settings(trial),
        )
    more = [f"{len(trials) - SHOWN} more trials are in {TRIALS}."] if len(trials) > SHOWN else []
    notes = prose(" ".join([*told(summary), *more]))
    return Group(Text(title(summary), style="bold"), Text(), found, Text(), notes, Text(), prose(verdict(summary)))


def title(summary: Mapping[str, Any]) -> str:
    """Method, model, number of trials."""
    count = many(len(summary["ranked"]), "trial")
    return f"Settings of {summary['method']} for {summary['model']}: {count}, best first"


def told(summary: Mapping[str, Any]) -> list[str]:
    """Which facts were tried, and what was sought."""
    before = summary["ranked"][0]["perplexity"][0]
    return [
        f"Facts: {summary['n']} of {summary['dataset']['name']}, {summary['facts']}.",
        f"Objective, %: {summary['objective']}.",
        "Perplexity is not bounded, because the model has no text for it (model.perplexity_text=FILE)."
        if before is None
        else f"Perplexity of the unedited model: {before:.3g}.",
    ]


def verdict(summary: Mapping[str, Any]) -> str:
    """How far the best is from the second best, in a sentence that promises no more than the facts tell."""
    best, apart = summary["ranked"][0], summary["difference"]
    if apart is None:
        return f"Trial {best['trial']} is the only one: nothing says that its settings are good ones."
    second = summary["ranked"][1]["trial"]
    ahead = f"Trial {best['trial']} is {apart['mean']:.1f} points above trial {second}, the second best"
    if apart["ci95"] is None:
        return f"{ahead}, on a single fact."
    low, high = apart["ci95"]
    over = f"{ahead} (95 % interval over {many(summary['n'], 'fact')}: {low:.1f} to {high:.1f})"
    if low > 0:
        return f"{over}; the best of many looks better than it is, so measure it on other facts."
    return f"{over}: these facts do not tell the two apart."


def settings(trial: Trial) -> str:
    """Settings as they are typed."""
    return " ".join(
        f"{key}={shown(value)}".replace(" ", "").replace("'", "") for key, value in trial["settings"].items()
    )


def comment(summary: Mapping[str, Any]) -> str:
    """What a file of settings says of where they come from."""
    best = summary["ranked"][0]
    parts = ", ".join(f"{part} {value:.1f}" for part, value in best["parts"].items())
    return (
        f"Found by edit-cli tune: the best of {many(summary['trials'], 'trial')} on {summary['n']} facts of"
        f" {summary['dataset']['name']}.\nObjective {best['objective']:.1f} ({parts}).\n{verdict(summary)}"
    )


def as_csv(trials: Sequence[Trial]) -> str:
    """One row a trial, best first."""
    text = io.StringIO()
    writer = csv.writer(text)
    parts, keys = list(trials[0]["parts"]), list(trials[0]["settings"])
    writer.writerow(["trial", "objective", *parts, "perplexity", "seconds", "failed", *keys, "error"])
    for trial in trials:
        writer.writerow(
            [
                trial["trial"],
                trial["objective"],
                *(trial["parts"][part] for part in parts),
                trial["perplexity"][1],
                round(trial["seconds"], 3),
                trial["failed"],
                *(trial["settings"][key] for key in keys),
                trial["error"],
            ]
        )
    return text.getvalue()


def draw(summary: Mapping[str, Any], directory: Path) -> list[str]:
    """tradeoff.png and tradeoff.svg: what is edited (efficacy · paraphrase) against what stays (neighborhood), the best
    trial marked.
    """
    trials = summary["ranked"]
    data = f"{many(len(trials), 'trial')} on {many(summary['n'], 'fact')} of {summary['dataset']['name']}"
    figure = style.new(6, 4.4, f"{summary['method']} on {summary['model']}: {data}")
    plot = figure.subplots()
    points = [(trial["parts"]["neighborhood"], _edited(trial["parts"])) for trial in trials]
    marks = plot.scatter(*zip(*points, strict=True), c=[trial["objective"] for trial in trials], cmap="viridis", s=36)
    plot.scatter(
        *points[0],
        s=160,
        facecolors="none",
        edgecolors=style.COLORS[1],
        linewidths=2,
        label=f"best: trial {trials[0]['trial']}",
    )
    near: dict[tuple[float, ...], list[int]] = {}
    for number, point in enumerate(points):
        near.setdefault(tuple(round(part / 5) for part in point), []).append(number)
    for group in near.values():  # what lies close together is named together
        names = [str(trials[number]["trial"]) for number in group]
        text = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
        beside = {"textcoords": "offset points", "xytext": (9, -3), "fontsize": "x-small", "annotation_clip": False}
        plot.annotate(text, points[group[0]], **beside)
    both = "efficacy · paraphrase" if "paraphrase" in trials[0]["parts"] else "efficacy"
    left = min(others for others, _ in points)
    plot.set(xlim=(max(left - 5, -2), 104), ylim=(-4, 104))
    plot.set(xlabel="others that stay (neighborhood), %", ylabel=f"{both}, %")
    plot.grid(alpha=0.3)
    figure.legend(loc="outside lower right", fontsize="x-small", frameon=False)
    figure.colorbar(marks, ax=plot, label="objective, %")
    style.save(figure, directory, FIGURE)
    return [FIGURE]


def _edited(parts: Mapping[str, float]) -> float:
    return parts["efficacy"] * parts.get("paraphrase", 100.0) / 100.0
