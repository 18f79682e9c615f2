"""What each kind of run found, as parts of a page: heading, the few numbers that sum it up, tables, cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edit_cli.metrics.registry import Metric
from edit_cli.metrics.registry import metrics as registered
from edit_cli.metrics.sequence import AFTER_EDIT
from edit_cli.metrics.sme import RATES
from edit_cli.report import learning, memories, sme, trace, tuning, words
from edit_cli.report.comparison import in_a_line, last_side, shown_metrics
from edit_cli.report.page import memories as memories_page
from edit_cli.report.page.cases import cases
from edit_cli.report.page.parts import (
    Block,
    Cell,
    Code,
    Grid,
    Item,
    Items,
    Note,
    Rows,
    Section,
    Tile,
    mark,
    pairs,
    value,
)
from edit_cli.report.sequence import NOTE, checkpoint_columns
from edit_cli.report.tables.facts import asked
from edit_cli.report.tables.run import FOOTNOTE, heading
from edit_cli.wording import many
from edit_cli.writing import bare

TILES = 6
SIGNS = "○●◆"  # of before, after and at the end, as the templates draw them
FOUND = "What it found"

Summary = Mapping[str, Any]
Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Found:
    """lines: the heading. items: what can be searched, None where there is nothing of the kind."""

    lines: Sequence[str]
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    items: Items | None = None


def found(kind: str, summary: Summary, lines: Lines) -> Found:
    """What a run of that kind found."""
    return FINDERS[kind](kind, summary, lines)


# --- runs that edit --------------------------------------------------------------------------------------------------


def _edited(kind: str, summary: Summary, lines: Lines) -> Found:
    sides = ("before", AFTER_EDIT, "at_end") if kind == "sequential" else ("before", "after")
    metrics = summary["metrics"]
    blocks: list[Block] = [_took(summary)] if kind == "edit" and "took" in summary else []
    blocks += [_metrics(metrics, sides)] if metrics else [Note("No case went through, so there is nothing to measure.")]
    if summary.get("diagnosis"):
        blocks.append(Note(summary["diagnosis"]))
    sections = [Section(FOUND, blocks)]
    if summary.get("checkpoints"):
        sections.append(Section("With more and more edits", [_course(summary)]))
    return Found(heading(summary).plain.splitlines(), _tiles(summary), sections, cases(kind, lines))


def _took(summary: Summary) -> Note:
    told = summary["took"]
    if told["n"] == told["took"]:
        return Note("It took." if told["n"] == 1 else f"All {told['n']:,} facts took.", "good")
    failed = ", ".join(map(str, told["failed"][:20])) + (", …" if len(told["failed"]) > 20 else "")
    return Note(f"{told['took']:,} of {many(told['n'], 'fact')} took. These did not: {failed}.", "bad")


def _tiles(summary: Summary) -> list[Tile]:
    """The numbers that tell runs apart, as they are at the end."""
    metrics, tiles, known = summary["metrics"], list[Tile](), registered()
    for name in shown_metrics(metrics):
        entry = last_side(metrics[name])
        if entry is not None and len(tiles) < TILES:
            percent = " %" if name != "perplexity" else ""
            low_high = words.with_interval(entry).partition(" ")[2]
            more = " · ".join(filter(None, (low_high, known[name].legend)))
            tiles.append(Tile(in_a_line(name), f"{words.number(entry['mean'])}{percent}", more))
    if summary.get("seconds_per_edit") is not None:
        tiles.append(Tile("time an edit", words.seconds(summary["seconds_per_edit"]), "statistics not counted"))
    return tiles


def _metrics(metrics: Mapping[str, Any], sides: Sequence[str]) -> Grid:
    blocks = []
    for title, groups in words.sections(metrics):
        for number, (where, rows) in enumerate(groups):
            of_cases = [row.id for row in rows if row.id != "perplexity"]  # which is of one model
            n = words.counted([metrics[name] for name in of_cases])
            label = ", ".join([*([where] if where else []), *([n] if n else [])])
            part = "" if number else title
            blocks.append(Rows(label, [_metric(row, metrics[row.id], sides) for row in rows], part))
    named = [side.replace("_", " ") for side in sides]
    scale = f"0 to 100 %: {', '.join(f'{sign} {side}' for sign, side in zip(SIGNS, named, strict=False))}"
    heads = ("", *named, scale, "")
    return Grid(heads, blocks, notes=[FOOTNOTE, *([NOTE] if AFTER_EDIT in sides else [])],
                right=range(1, len(sides) + 1))  # fmt: skip


def _metric(row: Metric, entries: Mapping[str, Any], sides: Sequence[str]) -> list[Cell]:
    digits = row.decimals
    shares = row.unit == "%"
    marks = [m for number, side in enumerate(sides) for m in mark(number, entries.get(side))] if shares else []
    return [
        Cell(row.named),
        *(value(entries.get(side), digits) for side in sides),
        Cell(marks=marks),
        Cell(row.explained, tone="quiet"),
    ]


def _course(summary: Summary) -> Grid:
    heads, rows, notes = checkpoint_columns(summary)
    cells = [[Cell(text) for text in row] for row in rows]
    return Grid(heads, [Rows("", cells)], notes=[notes], right=range(len(heads)))


# --- sequential model editing ----------------------------------------------------------------------------------------


def _sme(kind: str, summary: Summary, lines: Lines) -> Found:
    rates = summary["sme"]["rates"]
    tiles = [Tile(name, f"{rates[name]['mean']:.3f}", sme.TOLD[name]) for name in RATES if name in rates]
    means = [
        [Cell(name), _rate(entry["mean"]), _rate(entry["std"]), Cell(sme.TOLD[name], tone="quiet")]
        for name, entry in rates.items()
    ]
    folds = [
        [
            *(Cell(f"{fold[name]:,}", fold[name]) for name in ("fold", "examples", "edits")),
            *map(_rate, map(fold.get, RATES)),
        ]
        for fold in summary["sme"]["folds"]
    ]
    over = many(len(folds), "fold")
    blocks = [
        Grid(("rate", "mean", "deviation", ""), [Rows("", means)], f"Over {over}", right=(1, 2)),
        Grid(("fold", "examples", "edits", *RATES), [Rows("", folds)], "Fold by fold", right=range(8)),
    ]
    return Found(sme.heading(summary).plain.splitlines(), tiles, [Section(FOUND, blocks)], cases(kind, lines))


def _rate(found: float | None) -> Cell:
    return Cell("–", tone="quiet") if found is None else Cell(f"{found:.3f}", found)


# --- traces ----------------------------------------------------------------------------------------------------------


def _traced(kind: str, summary: Summary, lines: Lines) -> Found:
    effects = summary["trace"]
    tiles = [Tile("facts traced", f"{summary['traced']:,}", f"of {summary['facts']:,}")]
    blocks: list[Block] = []
    if effects is None:
        blocks.append(Note("The model knows none of these facts, so there is nothing to trace."))
    else:
        total, unit = effects["total_effect"], "points"
        tiles.append(Tile("total effect", words.number(total["mean"]), f"{words.with_interval(total)} {unit}"))
        for part, peak in summary["peaks"].items():
            at = f"{unit}, {trace.ROLE_NAMES[peak['role']]}, layer {peak['layer']}"
            name = f"largest effect, {trace.KIND_NAMES[part]}"
            tiles.append(Tile(name, words.number(peak["mean"]), f"{words.with_interval(peak).partition(' ')[2]} {at}"))
        blocks += [
            pairs("Probability of the answer, %", [
                ("clean", words.with_interval(effects["high"])),
                ("subject corrupted", words.with_interval(effects["low"])),
                ("total effect", words.with_interval(total)),
            ]),
            _effects(effects["indirect_effect"]),
            *_proposal(summary),
        ]  # fmt: skip
    heads = ("P clean", "P corrupted", "effect")
    about = "Probability of the answer in %, clean and with the subject corrupted; effect: their difference."
    items = Items("fact", "facts", heads, [_fact(line) for line in lines], [about])
    return Found(trace.heading(summary).plain.splitlines(), tiles, [Section(FOUND, blocks)], items)


def _effects(indirect: Mapping[str, Any]) -> Grid:
    """Every kind of state and token role, layer by layer."""
    columns = [
        (f"{trace.KIND_NAMES[part]}, {trace.ROLE_NAMES[role]}", entry)
        for part, roles in indirect.items()
        for role, entry in roles.items()
    ]
    depth = max((len(entry["mean"]) for _, entry in columns), default=0)
    rows = [
        [Cell(name), *(_effect(entry, layer, max(entry["mean"])) for layer in range(depth))] for name, entry in columns
    ]
    heads = ("restored", *(f"layer {layer}" for layer in range(depth)))
    note = "Average indirect effect, points, with 95 % intervals over facts; the largest of each row stands out."
    return Grid(heads, [Rows("", rows)], "Layer by layer", [note], range(1, depth + 1))


def _effect(entry: Mapping[str, Any], layer: int, best: float) -> Cell:
    one = {"mean": entry["mean"][layer], "ci95": entry["ci95"] and entry["ci95"][layer]}
    return Cell(words.with_interval(one), one["mean"], "good" if one["mean"] == best else "")


def _proposal(summary: Summary) -> list[Block]:
    proposal = summary["proposal"]
    if proposal is None:
        return [Note("No layers are proposed.")]
    several, one = ",".join(map(str, proposal["layers"])), proposal["layer"]
    return [
        Note(
            f"Layers to edit, by the MLP effect at the last subject token: method.layers=[{several}] for methods that"
            f" spread an edit, method.layers=[{one}] for those that write to one layer."
        ),
        Note(trace.CAVEAT),
    ]


def _fact(line: Mapping[str, Any]) -> Item:
    request = line["request"]
    lead = f"{asked(request)} → {bare(request['target_true'] or '')}"
    if line["error"] or not line["known"]:
        told = line["error"] or f"not traced: the model says {line['says']!r}"
        status = Cell("failed", tone="bad") if line["error"] else Cell("not known", tone="quiet")
        return Item(line["case_id"], lead, [Cell("–", tone="quiet")] * 3, status, notes=[Note(told)])
    high, low = 100 * line["high"], 100 * line["low"]
    rows = []
    for index, token in enumerate(line["tokens"]):
        cells = [Cell(token), Cell(trace.ROLE_NAMES[line["roles"][index]])]
        for scores in line["scores"].values():
            best = max(range(len(scores[index])), key=lambda layer: scores[index][layer])
            points = 100 * (scores[index][best] - line["low"])
            cells.append(Cell(f"{points:.1f} (layer {best})", points))
        rows.append(cells)
    heads = ("token", "role", *(trace.KIND_NAMES[part] for part in line["scores"]))
    grid = Grid(heads, [Rows("", rows)], "Largest indirect effect by token, points", right=range(2, len(heads)))
    cells = [Cell(words.number(number), number) for number in (high, low, high - low)]
    return Item(line["case_id"], lead, cells, Cell("traced", tone="good"), high - low, grids=[grid])


# --- trainings and searches ------------------------------------------------------------------------------------------


def _trained(kind: str, summary: Summary, lines: Lines) -> Found:
    best = summary["best"]
    told = [
        [Cell(name), Cell(learning.number(number), number), Cell(learning.MEANING.get(name, ""), tone="quiet")]
        for name, number in best["metrics"].items()
    ]
    tiles = [Tile("best step", f"{best['step']:,}", "by the loss on validation edits")]
    tiles += [
        Tile(name, learning.number(best["metrics"][name]), learning.MEANING[name])
        for name in ("es", "drawdown", "loss")
        if name in best["metrics"]
    ]
    blocks: list[Block] = [
        Grid(("on validation edits", "", ""), [Rows("", told)], "The network that is kept", right=(1,)),
    ]
    for name in ("validation", "train"):
        blocks += _points(name, [line for line in lines if line["kind"] == name])
    return Found(learning.heading(summary).plain.splitlines(), tiles, [Section(FOUND, blocks)])


def _points(name: str, lines: Lines) -> list[Block]:
    """The curves as a table."""
    names = list(dict.fromkeys(key for line in lines for key in line if key not in learning.APART))
    if not lines:
        return []
    rows = [
        [Cell(f"{line['step']:,}", line["step"]), *(_point(line.get(key)) for key in names)]
        for line in sorted(lines, key=lambda line: line["step"])
    ]
    title = f"{name.capitalize()}, step by step"
    return [Grid(("step", *names), [Rows("", rows)], title, right=range(len(names) + 1), folded=True)]


def _point(number: Any) -> Cell:
    return Cell("–", tone="quiet") if number is None else Cell(learning.number(number), number)


def _tuned(kind: str, summary: Summary, lines: Lines) -> Found:
    ranked = summary["ranked"]
    parts = list(ranked[0]["parts"])
    names = [tuning.TITLES[part] for part in parts]
    best = ranked[0]
    tiles = [Tile("best objective", f"{best['objective']:.1f} %", f"trial {best['trial']} of {len(ranked):,}")]
    tiles += [
        Tile(name, f"{best['parts'][part]:.1f} %", "of the best") for name, part in zip(names, parts, strict=True)
    ]
    blocks: list[Block] = [
        Code(tuning.settings(best)), Note(tuning.verdict(summary)), *map(Note, tuning.told(summary))
    ]  # fmt: skip
    by_trial = {line["trial"]: line for line in lines}
    heads = ("objective", *names, "perplexity", "seconds")
    items = [_trial(trial, by_trial.get(trial["trial"], {}), parts, names) for trial in ranked]
    return Found([tuning.title(summary)], tiles, [Section(FOUND, blocks)], Items("trial", "trials", heads, items))


def _trial(trial: Mapping[str, Any], line: Mapping[str, Any], parts: Sequence[str], names: Sequence[str]) -> Item:
    now = trial["perplexity"][1]
    cells = [
        Cell(f"{trial['objective']:.1f}", trial["objective"]),
        *(Cell(f"{trial['parts'][part]:.1f}", trial["parts"][part]) for part in parts),
        Cell("–" if now is None else f"{now:.3g}", now),
        Cell(f"{trial['seconds']:.1f}", trial["seconds"]),
    ]
    rows = [
        [Cell(case), *(Cell(words.number(found.get(part), 0), found.get(part)) for part in parts)]
        for case, found in line.get("facts", {}).items()
    ]
    grids = (
        [Grid(("fact", *names), [Rows("", rows)], "Fact by fact, %", right=range(1, len(parts) + 1))] if rows else []
    )
    status = Cell("some failed", tone="bad") if trial["failed"] else Cell("whole")
    notes = [Note(trial["error"], "bad")] if trial["error"] else []
    return Item(f"trial {trial['trial']}", tuning.settings(trial), cells, status, notes=notes, grids=grids)


def _inspected(kind: str, summary: Summary, lines: Lines) -> Found:
    told, keys = memories_page.sections(summary, lines), memories_page.items(lines)
    return Found(memories.heading(summary).plain.splitlines(), memories_page.tiles(summary), told, keys)


FINDERS: dict[str, Callable[[str, Summary, Lines], Found]] = {
    "evaluate": _edited,
    "edit": _edited,
    "sequential": _edited,
    "sme": _sme,
    "trace": _traced,
    "inspect": _inspected,
    "train-editor": _trained,
    "tune": _tuned,
}
