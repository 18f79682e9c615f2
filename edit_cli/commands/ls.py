"""`ls`: what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edit_cli.config import catalog
from edit_cli.config.build import did_you_mean
from edit_cli.console import Screen
from edit_cli.errors import UsageError
from edit_cli.report.tables.listing import metrics_list, named_list, runs_list


def run(what: str, as_json: bool, runs_dir: Path) -> int:
    """Print one list."""
    if what not in catalog.LISTS:
        raise UsageError(f"ls {what}: there is no such list{did_you_mean(what, catalog.LISTS)}")
    screen = Screen()
    rows = _rows(what, runs_dir)
    if as_json:
        screen.json(rows)
    elif what == "runs":
        screen.show(runs_list(rows))
    elif what == "metrics":
        screen.show(metrics_list(rows))
    else:
        screen.show(named_list(catalog.GROUPS[what], rows))
    return 0


def _rows(what: str, runs_dir: Path) -> list[dict[str, Any]]:
    if what == "metrics":
        from edit_cli.metrics.registry import metrics

        return [
            {"id": m.id, "label": m.label, "unit": m.unit, "better": m.better, "definition": m.definition}
            for m in metrics().values()
        ]
    if what == "runs":
        return _runs(runs_dir)
    return [{"name": entry.name, "summary": entry.summary} for entry in catalog.entries(catalog.GROUPS[what])]


def _runs(runs_dir: Path) -> list[dict[str, Any]]:
    from edit_cli.errors import MissingError
    from edit_cli.runs.run import UNREADABLE, list_runs

    rows = []
    for record in list_runs(runs_dir):
        status = record.status
        try:
            summary = record.summary or {}
        except MissingError:
            summary, status = {}, UNREADABLE
        rows.append(
            {
                "path": str(record.path),
                "command": record.manifest.get("command"),
                "status": status,
                "started": record.manifest.get("started"),
                "n": summary.get("n"),
                "failed": summary.get("failed"),
                "metrics": summary.get("metrics", {}),
            }
        )
    return rows
