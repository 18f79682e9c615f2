"""`compare`: several runs side by side: one table, and a figure of how metrics go with a setting or with the number
of facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edit_cli.config.build import did_you_mean
from edit_cli.config.identity import flatten
from edit_cli.console import Screen
from edit_cli.errors import MissingError, UsageError
from edit_cli.files.disk import require_place, telling
from edit_cli.metrics.registry import SME
from edit_cli.metrics.registry import metrics as registered
from edit_cli.report.compare import FACTS, Point, cost, draw, moments, write_markdown, write_table
from edit_cli.report.comparison import Comparison, shown_metrics
from edit_cli.runs.run import RunRecord, read_run
from edit_cli.wording import many

COMPARED = ("evaluate", "sequential")
TAG = "tag"
DEFAULT = ("efficacy_success", "paraphrase_success", "neighborhood_success")


def run(paths: Sequence[Path], x: str | None, metrics: str | None, by: str | None, out: Path | None) -> int:
    """Print a table of the runs; with `out`, write OUT.csv and OUT.md, and OUT.png and OUT.svg if there is something
    for an x-axis.

    x: a key of the configuration, or "facts" for the checkpoints of sequential runs (the default where all are
    sequential).
    by: a key that tells lines apart, beside the method; `tag` names them by itself. metrics: ids with commas.
    """
    if out is not None:
        require_place(out, f"--out {out}")
    records = [_finished(path) for path in paths]
    sequential = all(record.manifest["command"] == "sequential" for record in records)
    if x == FACTS and not sequential:
        raise UsageError(
            "--x facts needs runs of `sequential`; give a key of the configuration, such as --x protocol.batch_size"
        )
    x = x or (FACTS if sequential else None)
    wanted = _metrics(metrics, records)
    names = [_name(record, by, x, records) for record in records]
    records, names = _in_order(records, names, x)
    screen = Screen()
    screen.show(
        Comparison([(_titled(record, name, x), record.summary) for record, name in zip(records, names, strict=True)])
    )
    if out is None:
        return 0
    points = [point for record, name in zip(records, names, strict=True) for point in _points(record, name, x, wanted)]
    with telling(f"--out {out}"):
        screen.line(str(write_table(points, x, _beside(out, "csv"))))
        screen.line(str(write_markdown(points, x, wanted, _beside(out, "md"))))
        if x is not None:
            for path in draw(points, x, wanted, [_beside(out, kind) for kind in ("png", "svg")], _about(records)):
                screen.line(str(path))
    return 0


def _about(records: Sequence[RunRecord]) -> str:
    """`tiny-gpt2: counterfact, n = 100 facts`, of all runs."""

    def among(values: Sequence[Any]) -> str:
        return ", ".join(map(str, dict.fromkeys(values)))

    models = among([record.manifest["model"] for record in records])
    data = among([record.summary["dataset"]["name"] for record in records if record.summary])
    n = sorted({record.summary["n"] for record in records if record.summary})
    facts = many(n[0], "fact") if len(n) == 1 else f"{n[0]:,} to {n[-1]:,} facts"
    return f"{models}: {data}, n = {facts}; bands: 95 %"


def _beside(out: Path, kind: str) -> Path:
    """OUT.kind, whatever dots are in OUT's name."""
    return out.with_name(f"{out.name}.{kind}")


def _finished(path: Path) -> RunRecord:
    record = read_run(path)
    if record.manifest["command"] not in COMPARED:
        raise UsageError(f"{path} is a run of `{record.manifest['command']}`: compare runs of {' or '.join(COMPARED)}")
    if not record.summary or "metrics" not in record.summary:
        raise MissingError(f"{path} has no summary yet: the run is {record.status}")
    return record


def _metrics(given: str | None, records: Sequence[RunRecord]) -> list[str]:
    measured = [metric for metric in registered() if any(metric in record.summary["metrics"] for record in records)]
    wanted = (
        given.split(",")
        if given
        else [metric for metric in (*DEFAULT, *SME) if metric in measured] or shown_metrics(measured)[:3]
    )
    for metric in wanted:
        if metric not in measured:
            raise UsageError(f"--metrics {metric}: no run has measured it{did_you_mean(metric, measured)}")
    return wanted


def setting(record: RunRecord, key: str) -> Any:
    """The value of a key in the run's configuration.

    Raises:
        UsageError: it has none of that name.
    """
    config = record.manifest["config"]
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise UsageError(f"{record.path} has no setting {key}{did_you_mean(key, list(flatten(config)))}")
        value = value[part]
    if key == "protocol.batch_size" and not isinstance(value, int):
        return record.summary["protocol"]["batch_size"]  # what auto or all came to
    return value


def _name(record: RunRecord, by: str | None, x: str | None, records: Sequence[RunRecord]) -> str:
    """What a line of the figure is called."""
    method = record.manifest["method"]
    if by == TAG:
        return str(setting(record, TAG) or method)
    if by is not None:
        return f"{method} {by.rpartition('.')[2]}={_short(setting(record, by))}"
    if x is not None and x != FACTS:
        return method
    same = [other for other in records if other.manifest["method"] == method]
    if len(same) == 1:
        return method
    return record.path.name if record.path.name.startswith(method) else f"{method} {record.path.name}"


def _in_order(records: Sequence[RunRecord], names: Sequence[str], x: str | None) -> tuple[list[RunRecord], list[str]]:
    """Runs of one name beside each other, along the axis where that is a number."""

    def place(pair: tuple[RunRecord, str]) -> tuple[str, float]:
        value = None if x in (None, FACTS) else setting(pair[0], x)
        return pair[1], float(value) if isinstance(value, int | float) else 0.0

    pairs = list(zip(records, names, strict=True))
    if x not in (None, FACTS):
        pairs.sort(key=place)
    return [record for record, _ in pairs], [name for _, name in pairs]


def _titled(record: RunRecord, name: str, x: str | None) -> str:
    return name if x in (None, FACTS) else f"{name} {x.rpartition('.')[2]}={_short(setting(record, x))}"


def _short(value: Any) -> str:
    return (
        f"{value[0]}–{value[-1]}"
        if isinstance(value, list) and len(value) > 1
        else str(value[0] if isinstance(value, list) and value else value)
    )


def _points(record: RunRecord, name: str, x: str | None, metrics: Sequence[str]) -> list[Point]:
    at = None if x in (None, FACTS) else setting(record, x)
    spent = {} if x == FACTS else cost(record.summary)
    return [
        Point(name, place, metric, entry, spent)
        for place, found in moments(record.summary, at, x == FACTS)
        for metric in metrics
        if (entry := found.get(metric))
    ]
