"""`ls`: what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edit_cli.config import catalog
from edit_cli.config.build import did_you_mean
from edit_cli.config.identity import flatten
from edit_cli.config.schema import shown
from edit_cli.console import Screen
from edit_cli.errors import MissingError, UsageError
from edit_cli.report.tables.listing import metrics_list, named_list, runs_list

if TYPE_CHECKING:
    from edit_cli.runs.record import RunRecord

NAMED = ("command", "method", "model", "dataset", "status")  # what every run is told by


def run(what: str, as_json: bool, runs_dir: Path, wanted: Sequence[str] = (), sort: str | None = None) -> int:
    """Print one list. wanted, sort: of runs, which ones (`KEY=VALUE`), and by which metric."""
    if what not in catalog.LISTS:
        raise UsageError(f"ls {what}: there is no such list{did_you_mean(what, catalog.LISTS)}")
    if what != "runs" and (wanted or sort):
        raise UsageError(f"ls {what}: only runs are chosen by {wanted[0] if wanted else '--sort'}")
    screen = Screen()
    rows = _runs(runs_dir, _conditions(wanted), sort) if what == "runs" else _rows(what)
    if as_json:
        screen.json(rows)
    elif what == "runs" and wanted and not rows:
        screen.line(f"no runs with {' '.join(wanted)}")
    elif what == "runs":
        screen.show(runs_list(rows, sort))
    elif what == "metrics":
        screen.show(metrics_list(rows))
    else:
        screen.show(named_list(catalog.GROUPS[what], rows))
    return 0


def _rows(what: str) -> list[dict[str, Any]]:
    if what == "metrics":
        from edit_cli.metrics.registry import metrics

        return [
            {"id": m.id, "label": m.label, "unit": m.unit, "better": m.better, "definition": m.definition}
            for m in metrics().values()
        ]
    return [{"name": entry.name, "summary": entry.summary} for entry in catalog.entries(catalog.GROUPS[what])]


def _conditions(wanted: Sequence[str]) -> dict[str, list[str]]:
    """{key: patterns of which one must fit} of `KEY=VALUE,VALUE`."""
    found: dict[str, list[str]] = {}
    for text in wanted:
        key, equals, values = text.partition("=")
        if not equals or not key or not values:
            raise UsageError(f"ls runs {text}: write KEY=VALUE, such as method=memit, status=success or model=gpt2*")
        found[key] = values.split(",")
    return found


def _runs(runs_dir: Path, conditions: Mapping[str, Sequence[str]], sort: str | None) -> list[dict[str, Any]]:
    from edit_cli.metrics.registry import metrics
    from edit_cli.runs.record import list_runs

    if sort is not None and sort not in (known := metrics()):
        raise UsageError(
            f"--sort {sort}: there is no such metric{did_you_mean(sort, known, listed_by='edit-cli ls metrics')}"
        )
    records = list_runs(runs_dir)
    settings = [_settings(record) for record in records]
    known_keys = dict.fromkeys([*NAMED, *(key for one in settings for key in one)])
    for key in conditions:
        if key not in known_keys:
            raise UsageError(f"{key}: no run has such a setting{did_you_mean(key, known_keys)}")
    rows = [
        _row(record)
        for record, own in zip(records, settings, strict=True)
        if all(any(fnmatchcase(shown(own.get(key)), each) for each in patterns) for key, patterns in conditions.items())
    ]
    return rows if sort is None else _sorted(rows, sort)


def _settings(record: RunRecord) -> dict[str, Any]:
    """What a run can be chosen by: the names of its parts, and every setting of its configuration."""
    manifest = record.manifest
    about = manifest.get("dataset") or {}
    named = {"command": manifest.get("command"), "status": record.status, "method": manifest.get("method"),
             "model": manifest.get("model"), "dataset": about.get("name")}  # fmt: skip
    return flatten(manifest.get("config", {})) | named


def _row(record: RunRecord) -> dict[str, Any]:
    from edit_cli.runs.record import UNREADABLE

    status = record.status
    try:
        summary = record.summary or {}
    except MissingError:
        summary, status = {}, UNREADABLE
    return {
        "path": str(record.path),
        "command": record.manifest.get("command"),
        "status": status,
        "started": record.manifest.get("started"),
        "n": summary.get("n"),
        "failed": summary.get("failed"),
        "metrics": summary.get("metrics", {}),
    }


def _sorted(rows: Sequence[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The best first; runs that have not measured it come last."""
    from edit_cli.metrics.registry import metrics
    from edit_cli.report.comparison import last_side

    sign = 1 if metrics()[metric].better == "lower" else -1

    def place(row: Mapping[str, Any]) -> tuple[bool, float]:
        entry = last_side(row["metrics"].get(metric, {}))
        mean = entry["mean"] if entry else None
        return mean is None, sign * (mean or 0.0)

    return sorted(rows, key=place)
