"""What a causal trace found: summary and table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType

from edit_cli.report import words
from edit_cli.report.comparison import right_aligned
from edit_cli.report.summary import ABOUT_DATA, header
from edit_cli.report.tables.run import prose
from edit_cli.report.tables.texts import Text
from edit_cli.tracing.averages import LOOKUP, effects, peak, propose
from edit_cli.wording import many
from edit_cli.writing import bare

Line = Mapping[str, Any]

ROLE_NAMES = {
    "subject_first": "first subject token",
    "subject_middle": "middle subject tokens",
    "subject_last": "last subject token",
    "after_subject": "first token after it",
    "further": "further tokens",
    "last": "last token",
}
KIND_NAMES = {"hidden": "state", "mlp": "MLP", "attn": "attention"}
TRIVIAL = ("hidden", "last")  # in the top layer this is the whole answer
SHOWN = (("hidden", LOOKUP), ("mlp", LOOKUP), ("attn", LOOKUP), ("attn", "last"))  # columns of the table
END = "subject's end"
FOOTNOTE = (
    "Subject's end: its last token. Indirect effect in points: how much of the answer's probability comes back when a"
    " corrupted run gets the clean state (or the clean outputs of a window of layers). [low, high]: 95 % interval over"
    " facts; ◀ the largest of its column."
)
CAVEAT = (
    "The trace shows where a fact passes through; how well edits at these layers work does not follow it closely (Hase"
    " et al., 2023). Try a few layers around on records that you do not report."
)


def trace_summary(
    manifest: Mapping[str, Any],
    lines: Sequence[Line],
    references: Mapping[str, Sequence[str]] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """summary.json of a trace.

    `trace`: effects, in percent; `peaks`: the largest of each kind; `proposal`: layers to edit, or None.
    """
    about, protocol = manifest["dataset"], manifest["config"]["protocol"]
    traced = [line for line in lines if line["known"]]
    found = effects(traced) if traced else None
    indirect = found["indirect_effect"] if found else {}
    return {
        **header(manifest, lines, seconds),
        "dataset": {key: about[key] for key in ABOUT_DATA},
        "facts": manifest["protocol"]["facts"],
        "n": len(lines),
        "traced": len(traced),
        "not_known": sum(not line["known"] and not line["error"] for line in lines),
        "failed": sum(bool(line["error"]) for line in lines),
        "protocol": {**protocol, "noise_std": traced[0]["noise_std"] if traced else protocol["noise_std"]},
        "trace": found,
        "peaks": {
            kind: max(
                (_at(role, entry) for role, entry in roles.items() if (kind, role) != TRIVIAL),
                key=lambda each: each["mean"],
            )
            for kind, roles in indirect.items()
        },
        "metrics": {},  # lists of runs read these two of every run
        "seconds_per_edit": None,
        "proposal": propose(indirect, protocol["window"], protocol["proposed_layers"]),
    }


def _at(role: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": role, **peak(entry)}


def trace_table(summary: Mapping[str, Any]) -> RenderableType:
    """How many facts were traced, effects layer by layer, peaks, and the proposal with its caveat."""
    parts: list[RenderableType] = [heading(summary)]
    if not summary["traced"]:
        return Group(*parts, Text("\nThe model knows none of these facts, so there is nothing to trace."))
    found, indirect = summary["trace"], summary["trace"]["indirect_effect"]
    parts += [
        Text(
            f"P(answer): {words.with_interval(found['high'])} % clean, {words.with_interval(found['low'])} % with the"
            f" subject corrupted; total effect {words.with_interval(found['total_effect'])} points"
        ),
        Text(),
        _layers(indirect),
        prose(FOOTNOTE),
        Text(),
    ]
    for kind, best in summary["peaks"].items():
        at = f"{ROLE_NAMES[best['role']]}, layer {best['layer']}"
        parts.append(
            Text(
                f"Largest effect of restoring {_what(kind, summary['protocol'])}: {words.with_interval(best)} at the"
                f" {at}"
            )
        )
    return Group(*parts, Text(), *_proposal(summary))


def fact_table(line: Line) -> RenderableType:
    """One traced fact: for each token, the largest indirect effect of each kind and its layer."""
    request = line["request"]
    prompt = request["prompt"].replace("{}", request["subject"] or "", 1)
    title = Text(f"fact {line['case_id']}: {prompt} → {bare(request['target_true'] or '')}", style="bold")
    if line["error"]:
        return Group(title, Text(f"failed: {line['error']}", style="bold red"))
    if not line["known"]:
        return Group(title, Text(f"not traced: the model says {line['says']!r}"))
    told = Text(
        f"P({line['answer'].strip()}): {100 * line['high']:.1f} % clean, {100 * line['low']:.1f} % with the subject"
        " corrupted"
    )
    table = right_aligned("token", *(f"{KIND_NAMES[kind]}: points (layer)" for kind in line["scores"]))
    for index, token in enumerate(line["tokens"]):
        cells = []
        for scores in line["scores"].values():
            best = max(range(len(scores[index])), key=lambda layer: scores[index][layer])
            cells.append(f"{100 * (scores[index][best] - line['low']):.1f} ({best})")
        table.add_row(Text(f"{token}  · {ROLE_NAMES[line['roles'][index]]}"), *cells)
    return Group(title, told, Text(), table)


def heading(summary: Mapping[str, Any]) -> Text:
    """Model, number of facts, records, noise, and what is left out."""
    protocol, dataset = summary["protocol"], summary["dataset"]
    text = Text(f"Causal trace of {summary['model']}: {many(summary['traced'], 'fact')}", style="bold")
    text.append(f"\nData: {dataset['name']} ({dataset['source']}), {words.records(dataset)}", style="not bold")
    if summary["not_known"]:
        left_out = (
            f"{summary['not_known']:,} of {many(summary['facts'], 'fact')} left out: the model's first choice is"
            " another answer"
        )
        text.append(f"\n{left_out}", style="not bold")
    if summary["traced"]:
        level = f"{protocol['noise_std']:.4g}"
        text.append(f"\nNoise: standard deviation {level}, {protocol['copies']} corrupted copies", style="not bold")
    if summary["n"] < summary["facts"]:
        text.append(f"\nUNFINISHED: {summary['n']:,} of {many(summary['facts'], 'fact')} so far", style="bold yellow")
    if summary["failed"]:
        text.append(f"\n{summary['failed']:,} of {many(summary['n'], 'fact')} could not be traced", style="bold red")
    return text


def _layers(indirect: Mapping[str, Any]) -> RenderableType:
    shown = [(kind, role) for kind, role in SHOWN if role in indirect.get(kind, {})]
    table = right_aligned(
        "layer", *(f"{KIND_NAMES[kind]},\n{END if role == LOOKUP else ROLE_NAMES[role]}" for kind, role in shown)
    )
    entries = [indirect[kind][role] for kind, role in shown]
    best = [peak(entry)["layer"] for entry in entries]
    for layer in range(max((len(entry["mean"]) for entry in entries), default=0)):
        cells = []
        for entry, top in zip(entries, best, strict=True):
            value = {"mean": entry["mean"][layer], "ci95": entry["ci95"] and entry["ci95"][layer]}
            cells.append(
                Text(
                    f"{words.with_interval(value)} {'◀' if layer == top else ' '}", style="bold" if layer == top else ""
                )
            )
        table.add_row(str(layer), *cells)
    return table


def _what(kind: str, protocol: Mapping[str, Any]) -> str:
    size = protocol["window"]
    outputs = f"{size} layers' {KIND_NAMES[kind]} outputs" if size > 1 else f"one layer's {KIND_NAMES[kind]} output"
    return "one layer's state" if kind == "hidden" else outputs


def _proposal(summary: Mapping[str, Any]) -> list[RenderableType]:
    proposal = summary["proposal"]
    if proposal is None:
        why = (
            "no MLP was traced"
            if "mlp" not in summary["peaks"]
            else "no MLP effect at the last subject token that differs from zero"
        )
        return [Text(f"No layers are proposed: {why}.")]
    layers = ",".join(map(str, proposal["layers"]))
    return [
        Text("Layers to edit, by the MLP effect at the last subject token:", style="bold"),
        Text(f"  method.layers=[{layers}]    (methods that spread an edit: memit, emmet)"),
        Text(f"  method.layers=[{proposal['layer']}]    (methods that write to one layer: rome)"),
        prose(CAVEAT),
    ]
