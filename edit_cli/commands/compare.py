"""`compare`: several runs side by side, as a table and as a figure of how metrics go with a setting or with the number
of facts; against a reference run, and beside published numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edit_cli.commands.compare_conditions import conditions
from edit_cli.commands.compare_runs import FACTS, Group, distinct, found, grouped, own_sizes, told_apart
from edit_cli.config.build import did_you_mean
from edit_cli.console import Screen
from edit_cli.errors import UsageError
from edit_cli.files.disk import require_own, require_place, telling
from edit_cli.files.paths import expanded
from edit_cli.metrics.columns import combined, matched
from edit_cli.metrics.paired import TEST, Difference, corrected, paired_difference
from edit_cli.metrics.registry import SME
from edit_cli.report import compare, published
from edit_cli.report.compare import Point
from edit_cli.report.comparison import COMPARED, DISPENSABLE, LOST, legend, short, shown_metrics
from edit_cli.report.measures import TRACED, TRAINED, measures
from edit_cli.report.tables.run import prose
from edit_cli.report.tables.sheets import PREAMBLE, Sheet, latex, markdown, on_screen, width
from edit_cli.report.tables.texts import Text
from edit_cli.runs.format import kind_of
from edit_cli.runs.record import MANIFEST, RunRecord
from edit_cli.wording import many

DRAWN = ("efficacy_success", "paraphrase_success", "neighborhood_success")
FORMATS = {"csv": "csv", "markdown": "md", "latex": "tex"}
FIGURES = ("png", "svg")
OURS = {
    "csv": "run,",
    "md": r"(.*\n\n)?\| run \|",
    "tex": re.escape(PREAMBLE),
}  # how tables begin that are written here


def run(
    places: Sequence[str],
    x: str | None = None,
    metrics: str | None = None,
    by: str | None = None,
    out: Path | None = None,
    against: str | None = None,
    tables: str | None = None,
    form: str | None = None,
    anyway: bool = False,
) -> int:
    """Print a table of the runs, or write it to `out`.

    Args:
        places: directories of runs, folders of them, or patterns.
        x: a key of the configuration, or "facts" for the checkpoints of sequential runs (the default where all are
            sequential).
        metrics: ids with commas.
        by: a key that tells lines apart, beside the method; `tag` names them by itself.
        out: OUT.csv, OUT.md or OUT.tex is that one file; otherwise OUT.csv and OUT.md are written, and OUT.png and
            OUT.svg if there is something for an x-axis.
        against: directory or name of the run that the others are paired with.
        tables: keys of published tables, with commas.
        form: csv, markdown or latex, to be printed instead of the table, or written to OUT.
        anyway: list runs apart that are not alike, instead of refusing them.
    """
    form = _form(form, out)
    beside = [published.read(key) for key in tables.split(",")] if tables else []
    if out is not None:
        require_place(out, f"--out {out}")
        for kind in _kinds(form):
            require_own(_beside(out, kind), f"--out {out}", OURS[kind])
    screen = Screen()
    reference = [against] if against is not None and (expanded(against) / MANIFEST).exists() else []
    records = found([*places, *reference], screen.note)
    done = compared(records, x, metrics, by, against, anyway, beside)
    if done.moving:
        screen.note(f"along {done.x}, the runs differ in {', '.join(done.moving)}, too")
    x, shown, points, told, notes = done.x, done.shown, done.points, done.told, done.notes
    sheets = done.sheets
    texts: dict[str, Callable[[], str]] = {
        "csv": lambda: compare.csv_text(points, x, told, [row for table in beside for row in table.rows(shown)]),
        "md": lambda: markdown([*sheets(points, shown), *_as_sheet(notes)]),
        "tex": lambda: latex([*sheets(points, shown), *_as_sheet(notes)]),
    }
    if form is not None and out is None:
        screen.out.print(Text(texts[FORMATS[form]]()), soft_wrap=True, end="")
        return 0
    _show(screen, lambda names: sheets(done.ends, names, True), shown, metrics is None, notes)
    if out is None:
        return 0
    with telling(f"--out {out}"):
        for kind in _kinds(form):
            path = _beside(out, kind)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(texts[kind](), "utf-8", "backslashreplace", newline="")
            screen.line(str(path))
        if x is not None and form is None:
            for path in compare.draw(points, x, done.drawn, [_beside(out, kind) for kind in FIGURES], done.about):
                screen.line(str(path))
    return 0


@dataclass(frozen=True)
class Compared:
    """Runs side by side.

    x: the key on the axis. shown, drawn: metrics of tables and of figures. points: at every place of the axis; ends:
    those of the end alone, with their differences. told: what the reference is called, or nothing. moving: what else
    differs along the axis.
    """

    groups: Sequence[Group]
    x: str | None
    shown: Sequence[str]
    drawn: Sequence[str]
    points: Sequence[Point]
    ends: Sequence[Point]
    told: str
    notes: Sequence[str]
    moving: Sequence[str]
    beside: Sequence[published.Table]

    def sheets(self, points: Sequence[Point], metrics: Sequence[str], screen: bool = False) -> list[Sheet]:
        """Means, differences, published numbers."""
        edited = [conditions(group.records[0]) | {"cases": group.summaries[0]["n"]} for group in self.groups]
        heads = [compare.heading(name, screen) for name in metrics]
        paired = any(point.difference is not None for point in [*self.points, *self.ends])
        return [
            compare.means(points, self.x, metrics, screen),
            *([compare.differences(points, self.x, metrics, self.told, screen)] if paired else []),
            *(published.sheet(table, metrics, heads, edited) for table in self.beside),
        ]

    @property
    def about(self) -> str:
        """The title of a figure."""
        return _about(self.groups)


def compared(
    records: Sequence[RunRecord],
    x: str | None = None,
    metrics: str | None = None,
    by: str | None = None,
    against: str | None = None,
    anyway: bool = False,
    beside: Sequence[published.Table] = (),
) -> Compared:
    """The runs side by side; arguments as of `run`.

    Raises:
        UsageError: the runs are not alike, or have no such setting or metric.
    """
    sequential = all(record.manifest["command"] == "sequential" for record in records)
    if x == FACTS and not sequential:
        raise UsageError(
            "--x facts needs runs of `sequential`; give a key of the configuration, such as --x protocol.batch_size"
        )
    x = x or (FACTS if sequential else None)
    groups, moving = told_apart(grouped(records, x, by), x, by, anyway)
    groups = distinct(groups, (x, by))
    measured = [
        name
        for name in measures()
        if any(name in summary["metrics"] for group in groups for summary in group.summaries)
    ]
    shown, drawn = _metrics(metrics, measured)
    both = list(dict.fromkeys([*shown, *drawn]))
    chosen = None if against is None else _reference(against, groups, x)
    paired = {} if chosen is None else _paired(chosen, groups, both)
    told = "" if chosen is None else _titled(chosen, x)
    points = [point for group in groups for point in _points(group, x, both, paired)]
    ends = [point for group in groups for point in _ends(group, x, shown, paired)]
    return Compared(groups, x, shown, drawn, points, ends, told, _notes(groups, paired, told), moving, beside)


# --- what is asked for -----------------------------------------------------------------------------------------------


def _form(given: str | None, out: Path | None) -> str | None:
    """The one format that is wanted, by name or by the suffix of the file."""
    if given is not None and given not in FORMATS:
        raise UsageError(f"--format {given}: choose {', '.join(FORMATS)}")
    suffix = next((name for name, kind in FORMATS.items() if out is not None and out.suffix == f".{kind}"), None)
    if given and suffix and given != suffix:
        raise UsageError(f"--format {given} does not go with --out {out}: name it .{FORMATS[given]}")
    return given or suffix


def _kinds(form: str | None) -> Sequence[str]:
    """Suffixes of the tables that are written."""
    return ("csv", "md") if form is None else (FORMATS[form],)


def _beside(out: Path, kind: str) -> Path:
    """OUT.kind, whatever dots are in OUT's name."""
    return out if out.suffix == f".{kind}" else out.with_name(f"{out.name}.{kind}")


def _metrics(given: str | None, measured: Sequence[str]) -> tuple[list[str], list[str]]:
    """(those of tables, those of figures)."""
    shown = [*shown_metrics(measured), *(metric for metric in (*LOST, *TRACED, *TRAINED) if metric in measured)]
    if given is None:
        drawn = [metric for metric in (*DRAWN, *SME, *TRACED, *TRAINED) if metric in measured]
        return shown, drawn or shown[:3]
    wanted = given.split(",")
    for metric in wanted:
        if metric not in measured:
            raise UsageError(f"--metrics {metric}: no run has measured it{did_you_mean(metric, measured)}")
    return wanted, wanted


def _reference(named: str, groups: Sequence[Group], x: str | None) -> Group:
    path = expanded(named).resolve()
    fitting = [group for group in groups if any(record.path.resolve() == path for record in group.records)]
    fitting = fitting or [group for group in groups if named in (group.name, _titled(group, x))]
    if len(fitting) == 1:
        return fitting[0]
    names = list(dict.fromkeys(group.name for group in groups))
    if fitting:
        raise UsageError(f"--against {named} is the name of {len(fitting)} rows: give the directory of the run")
    known = f"there are {', '.join(names)}{did_you_mean(named, names)}"
    raise UsageError(f"--against {named}: no run lies there or is called so; {known}")


# --- numbers ---------------------------------------------------------------------------------------------------------


def _paired(reference: Group, groups: Sequence[Group], metrics: Sequence[str]) -> dict[tuple[int, str], Difference]:
    """{(id of the group, metric): difference from the reference}, over the cases that both have, corrected for their
    number; only where records and all other conditions are those of the reference, and as many facts in place.
    """
    theirs, differences = reference.columns(metrics), {}
    for group in groups:
        if group is reference or _pairable(group) != _pairable(reference):
            continue
        ours = group.columns(metrics)
        for metric in metrics:
            if metric in ours and metric in theirs:
                pair = matched(ours[metric], theirs[metric])
                if (one := paired_difference(*pair, combined(metric))) is not None:
                    differences[id(group), metric] = one
    return dict(zip(differences, corrected(list(differences.values())), strict=True))


def _pairable(group: Group) -> tuple[Any, ...]:
    """What two groups share whose cases are paired."""
    return group.data, group.apart, group.edits


def _points(
    group: Group, x: str | None, metrics: Sequence[str], paired: Mapping[tuple[int, str], Difference]
) -> list[Point]:
    """Of the whole run, or of each of its checkpoints; differences are those at the end."""
    over_facts = x == FACTS
    each: dict[Any, list[Mapping[str, Any]]] = {}
    for summary in group.summaries:
        for place, entries in compare.moments(summary, group.at, over_facts):
            each.setdefault(place, []).append(entries)
    spent = {} if over_facts else compare.cost(group.summaries)
    last = max(each) if over_facts and each else group.at
    return [
        Point(
            group.name, place, metric, compare.pooled([one[metric] for one in several]), spent, group.apart,
            paired.get((id(group), metric)) if place == last else None,
        )
        for place, several in each.items()
        for metric in metrics
        if all(metric in one for one in several)
    ]  # fmt: skip


def _ends(
    group: Group, x: str | None, metrics: Sequence[str], paired: Mapping[tuple[int, str], Difference]
) -> list[Point]:
    """As the screen tells them: only the end, in rows that are named for their places."""
    summaries = group.summaries
    seconds = [one["seconds_per_edit"] for one in summaries if one["seconds_per_edit"] is not None]
    scored, total = (min(one["n"] - one["failed"] for one in summaries), max(one["n"] for one in summaries))
    spent = {
        "s/edit": f"{sum(seconds) / len(seconds):.2f}" if seconds else "–",
        "cases": f"{scored:,}" if scored == total else f"{scored:,}/{total:,}",
    }
    name = _titled(group, x)
    found = _points(group, None, metrics, paired)
    return [replace(point, line=name, x=None, cost=spent) for point in found]


def _titled(group: Group, x: str | None) -> str:
    return group.name if x in (None, FACTS) else f"{group.name} {x.rpartition('.')[2]}={short(group.at)}"


# --- words -----------------------------------------------------------------------------------------------------------


def _show(
    screen: Screen,
    sheets: Callable[[Sequence[str]], list[Sheet]],
    shown: Sequence[str],
    fitting: bool,
    notes: Sequence[str],
) -> None:
    """Columns that do not fit beside the others stand below them. fitting: those that can be spared are left out."""

    def fits(names: Sequence[str]) -> bool:
        return all(width(screen.out, sheet) <= screen.out.width for sheet in sheets(names))

    names, spare = list(shown), [name for name in DISPENSABLE if name in shown]
    while fitting and spare and not fits(names):
        names.remove(spare.pop(0))
    rest = list(names)
    while rest:
        part = next((rest[:count] for count in range(len(rest), 1, -1) if fits(rest[:count])), rest[:1])
        for number, (sheet, whole) in enumerate(zip(sheets(part), sheets(names), strict=True)):
            notes_now = whole.notes if len(rest) == len(part) else ()  # which are of all columns
            if not (sheet.filled or notes_now):
                continue
            if number or len(rest) < len(names):
                screen.line("")
            screen.show(on_screen(sheet))
            for note in notes_now:
                screen.show(prose(note))
        rest = rest[len(part) :]
    known = [name for name in names if name in (*COMPARED, *LOST)]
    told = legend(known, "s/edit", "cases") if known else None
    others = [
        f"{compare.heading(name, True)}: {measures()[name].definition}" for name in names if name in TRACED | TRAINED
    ]
    for text in (told, *map(prose, [". ".join(others) + "."] if others else []), *map(prose, notes)):
        if text is not None:
            screen.show(text)


def _notes(groups: Sequence[Group], paired: Mapping[tuple[int, str], Difference], reference: str) -> list[str]:
    told = ["[low, high]: 95 % interval over cases."]
    listed_apart = len({group.apart for group in groups}) > 1
    if any(len(group.records) > 1 for group in groups):
        told.append(
            "±: standard deviation between runs that differ in their seeds alone; their cases are paired by the mean"
            " over seeds."
        )
    if paired:
        pairs = sorted({one.pairs for one in paired.values()})
        over = f"{pairs[0]:,}" if len(pairs) == 1 else f"{pairs[0]:,} to {pairs[-1]:,}"
        over += " folds" if all(kind_of(group.records[0].manifest) == "sme" for group in groups) else " cases"
        which = ", of runs under its conditions," if listed_apart else ""
        told.append(
            f"Difference from {reference}{which} over the {over} that both have, with the interval of a paired"
            f" bootstrap. p: {TEST}; corrected by Holm's method for the {many(len(paired), 'comparison')} made."
        )
    elif reference:
        told.append(
            f"No other run has the records of {reference} under the same conditions, so there is no difference."
        )
    notes = [" ".join(told), *_shorter(groups)]
    if listed_apart and own_sizes(groups):
        notes.insert(
            0,
            "Listed apart, since some of these methods edit one fact at a time by themselves and others many at once,"
            " which moves every number. Runs with the same protocol.batch_size stand in one table.",
        )
    return notes


def _shorter(groups: Sequence[Group]) -> list[str]:
    """Which sequences ended with fewer facts in place than others, so that their ends are of another state."""
    ends = {group.name: max(group.edits) for group in groups if group.edits}
    most = max(ends.values(), default=0)
    early = [f"{name} ended with {many(count, 'fact')} in place" for name, count in ends.items() if count < most]
    if not early:
        return []
    return [f"{'; '.join(early)}, others with {most:,}: their rows tell of fewer edits and are not paired with those."]


def _as_sheet(notes: Sequence[str]) -> list[Sheet]:
    return [Sheet("", [], [], notes)]


def _models(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(group.records[0].manifest["model"] for group in groups))


def _data(groups: Sequence[Group]) -> list[tuple[str, int]]:
    """(data set, cases) of the runs."""
    return list(dict.fromkeys((one["dataset"]["name"], one["n"]) for group in groups for one in group.summaries))


def _about(groups: Sequence[Group]) -> str:
    """`tiny-gpt2: counterfact, n = 100 facts; bands: 95 % intervals`, of all runs."""
    names = ", ".join(dict.fromkeys(name for name, _ in _data(groups)))
    n = sorted({count for _, count in _data(groups)})
    facts = many(n[0], "fact") if len(n) == 1 else f"{n[0]:,} to {n[-1]:,} facts"
    several = {len(group.records) > 1 for group in groups}
    told = {False: "95 % intervals", True: "± standard deviation between seeds"}
    bands = " or ".join(told[each] for each in sorted(several))
    return f"{', '.join(_models(groups))}: {names}, n = {facts}; bands: {bands}"
