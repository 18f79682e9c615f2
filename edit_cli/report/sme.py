"""Sequential model editing: summary, table and figure of SR, GR, ER, TrainR and TestR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from edit_cli.metrics.registry import SME
from edit_cli.metrics.sme import BEFORE, RATES, TURN, sme_rates
from edit_cli.report import words
from edit_cli.report.comparison import right_aligned
from edit_cli.report.figures import style
from edit_cli.report.summary import header
from edit_cli.report.tables.texts import Text
from edit_cli.wording import many

NAME = "sme"
TOLD = {metric.label: metric.tells for metric in SME.values()} | {BEFORE: "these wordings before the edit"}

Line = Mapping[str, Any]


def sme_summary(
    manifest: Mapping[str, Any],
    lines: Sequence[Line],
    references: Mapping[str, Sequence[str]] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """summary.json of a run with protocol=sme; `sme` holds what `metrics.sme.sme_rates` finds."""
    turns = [line for line in lines if line["when"] == TURN]
    edited = [line for line in turns if line["seconds"] is not None]
    about, found = manifest["dataset"], sme_rates(lines)
    return {
        **header(manifest, lines, seconds),
        "dataset": {**about, "records_scored": len(turns)},
        "n": len(turns),
        "failed": sum(bool(line["error"]) for line in turns),
        "edits": len(edited),
        "protocol": {**manifest["config"]["protocol"], **manifest["protocol"]},
        "metrics": {metric: {"at_end": entry} for metric, entry in _as_metrics(found["rates"]).items()},
        "checkpoints": [{"edits": row["edits"], "metrics": _as_metrics(row)} for row in found["course"]],
        "sme": found,
        "seconds_per_edit": sum(line["seconds"] for line in edited) / len(edited) if edited else None,
    }


def _as_metrics(rates: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Entries of metrics, in %, for comparisons with other runs; n counts folds."""
    named = {metric.label: metric.id for metric in SME.values()}
    return {
        named[name]: {"mean": 100 * rates[name]["mean"], "ci95": None, "n": rates[name]["folds"]}
        for name in RATES
        if name in rates
    }


def sme_table(summary: Mapping[str, Any]) -> RenderableType:
    """The rates over folds, and each fold's own."""
    found = summary["sme"]
    table = right_aligned("rate", "mean", "deviation")
    table.add_column("", style="dim")
    for name, entry in found["rates"].items():
        table.add_row(name, _number(entry["mean"]), _number(entry["std"]), TOLD[name])
    each = right_aligned("fold", "examples", "edits", *RATES)
    for fold in found["folds"]:
        each.add_row(
            str(fold["fold"]), str(fold["examples"]), str(fold["edits"]), *(_number(fold.get(name)) for name in RATES)
        )
    spent = f"Time per edit {words.seconds(summary['seconds_per_edit'])}. Seconds: {words.phases(summary['seconds'])}."
    return Group(heading(summary), Text(), table, Text(), each, Text(), Text(spent))


def heading(summary: Mapping[str, Any]) -> Text:
    """Method, model, number of mistakes, records, what is unfinished."""
    dataset = summary["dataset"]
    text = Text(
        f"{summary['method']} on {summary['model']}: {many(summary['edits'], 'mistake')} of"
        f" {many(summary['n'], 'example')} edited, one at a time",
        style="bold",
    )
    wanted = "answer to be written" if summary["protocol"]["answers"] == "written" else "true answer"
    text.append(f"\nData: {dataset['name']} ({dataset['source']}); right is the {wanted}", style="not bold")
    unfinished = [str(fold["fold"]) for fold in summary["sme"]["folds"] if not fold["finished"]]
    if unfinished:
        text.append(f"\nUNFINISHED: fold {', '.join(unfinished)} is left out of the means", style="bold yellow")
    return text


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def draw(summary: Mapping[str, Any], directory: Path) -> list[str]:
    """sme.png and sme.svg: the five rates over the number of edits, mean over folds with bands of one deviation."""
    folds = many(len(summary["sme"]["folds"]), "fold")
    title = f"{summary['method']} on {summary['model']}: {summary['dataset']['name']}"
    about = f"{title}, {many(summary['n'], 'example')} in {folds}; bands: ± 1 standard deviation over folds"
    figure = style.new(6.4, 4.2, about)
    plot = figure.subplots()
    for number, name in enumerate(RATES):
        points = [(row["edits"], row[name]) for row in summary["sme"]["course"] if name in row]
        if not points:
            continue
        counts, means = [edits for edits, _ in points], [entry["mean"] for _, entry in points]
        (line,) = plot.plot(counts, means, label=name, **style.style(number, len(RATES)))
        deviations = [entry["std"] or 0.0 for _, entry in points]
        low, high = ([m + sign * d for m, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
        plot.fill_between(counts, low, high, alpha=0.12, color=line.get_color(), linewidth=0)
    style.legend_beside(plot)
    style.whole_numbers(plot.xaxis)
    style.from_zero(plot)
    plot.grid(alpha=0.3)
    plot.set(xlabel="mistakes edited in a fold", ylabel="rate (TrainR, TestR: over before)")
    style.save(figure, directory, NAME)
    return [NAME]
