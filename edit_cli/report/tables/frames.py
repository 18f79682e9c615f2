"""A run as tables of pandas: `edit_cli.read(RUN)`. docs/reading-results.md tells what stands in the columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edit_cli.errors import MissingError
from edit_cli.files.paths import expanded
from edit_cli.metrics.forms import line_in, other_forms
from edit_cli.metrics.registry import metrics
from edit_cli.metrics.scores import MEASURES, paired_probes
from edit_cli.metrics.summarize import SIDES, case_values
from edit_cli.runs.format import kind_of
from edit_cli.runs.record import RunRecord, read_run

if TYPE_CHECKING:
    import pandas

REMEDY = "tables of runs need pandas (and pyarrow for .to_parquet): pip install 'edit-cli[tables]'"
AFTER_EDIT = "after_edit"

# columns of `cases`: type of pandas
OBSERVED = {
    "case_id": "string", "step": "Int64", "moment": "string", "when": "string", "edits": "Int64",
    "sampled": "boolean", "fold": "Int64",
    "probe": "Int64", "kind": "string", "group": "string", "form": "string", "prompt": "string",
    "target": "string", "foil": "string", "target_nll": "Float64", "foil_nll": "Float64", "target_tokens": "Int64",
    "generated": "string",
    **{measure: "Float64" for measure in MEASURES}, "error": "string",
}  # fmt: skip
VALUES = {
    "case_id": "string", "step": "Int64", "moment": "string", "when": "string", "edits": "Int64",
    "sampled": "boolean", "fold": "Int64", "metric": "string", "value": "Float64",
}  # fmt: skip
MEANS = {
    "metric": "string", "label": "string", "unit": "string", "better": "string", "moment": "string", "edits": "Int64",
    "mean": "Float64", "low": "Float64", "high": "Float64", "n": "Int64",
}  # fmt: skip


@dataclass(frozen=True)
class Frames:
    """A run as it lies on disk.

    Attributes:
        manifest: the content of manifest.json. summary: that of summary.json, None before a run has one.
    """

    record: RunRecord

    @property
    def manifest(self) -> dict[str, Any]:
        return self.record.manifest

    @property
    def summary(self) -> dict[str, Any] | None:
        return self.record.summary

    @cached_property
    def cases(self) -> pandas.DataFrame:
        """A row an observation: one prompt, asked at one moment. Of traces and trainings, a row a line of
        results.jsonl.

        Raises:
            MissingError: pandas is not installed.
        """
        if kind_of(self.manifest) in ("trace", "inspect", "train-editor"):
            return _pandas().json_normalize(self.record.lines)
        return _frame(OBSERVED, [row for line in self.record.lines for row in _observations(line, self._before)])

    @cached_property
    def values(self) -> pandas.DataFrame:
        """A row a case, moment and metric: what a case contributes to the means. Not of traces and trainings.

        Raises:
            MissingError: pandas is not installed.
        """
        lines = [line for line in map(self._with_before, self.record.lines) if "requests" in line and "after" in line]
        rows = [
            {**_place(line), "moment": side, "metric": metric, "value": value}
            for line, sides in zip(lines, case_values(lines), strict=True)
            for side in SIDES
            for metric, value in sides[side].items()
            if side == "after" or line["before"] is not self._before.get(line["case_id"]) or not _is_later(line)
        ]
        return _frame(VALUES, rows)

    @cached_property
    def metrics(self) -> pandas.DataFrame:
        """A row a metric and moment, as in summary.json; of sequential runs those of every checkpoint, too.

        Raises:
            MissingError: pandas is not installed, or the run has no summary yet.
        """
        summary = self.summary
        if summary is None:
            raise MissingError(f"{self.record.path} has no summary yet: the run is {self.record.status}")
        if "best" in summary:
            best = summary["best"]
            return _frame(
                MEANS,
                [
                    {"metric": name, "moment": "best", "edits": None, "mean": value}
                    for name, value in best["metrics"].items()
                ],
            )
        rows = [
            _mean(metric, moment, None, entry)
            for metric, sides in summary["metrics"].items()
            for moment, entry in sides.items()
        ]
        for row in summary.get("checkpoints", ()):
            rows += [_mean(metric, "checkpoint", row["edits"], entry) for metric, entry in row["metrics"].items()]
        return _frame(MEANS, rows)

    @cached_property
    def _before(self) -> dict[str, Any]:
        """{case: what the unedited model said}; lines of later checkpoints do not repeat it."""
        return {
            line["case_id"]: line["before"]
            for line in self.record.lines
            if line.get("when", AFTER_EDIT) == AFTER_EDIT and line.get("before")
        }

    def _with_before(self, line: Mapping[str, Any]) -> Mapping[str, Any]:
        if line.get("before") or not _is_later(line):
            return line
        return {**line, "before": self._before.get(line["case_id"])}


def read(run: str | Path) -> Frames:
    """The run at `run`.

    Raises:
        MissingError: there is no run, or a part of it cannot be read; names the file.
    """
    return Frames(read_run(expanded(run)))


def _is_later(line: Mapping[str, Any]) -> bool:
    return line.get("when", AFTER_EDIT) != AFTER_EDIT


def _place(line: Mapping[str, Any]) -> dict[str, Any]:
    place = {name: line.get(name) for name in ("case_id", "step", "when", "edits", "fold")}
    return {**place, "sampled": line.get("sampled", True)}


def _observations(line: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for side in SIDES:
        seen = line.get(side)
        if not isinstance(seen, Mapping):
            continue
        asked = line if line.get("before") else {**line, "before": before.get(line["case_id"])}
        pairs = [
            (form, number, *pair)
            for form in (None, *other_forms(asked))
            for number, pair in enumerate(paired_probes(line_in(asked, form), side))
        ]
        for form, number, probe, earlier in pairs:
            yield {
                **_place(line),
                "moment": side,
                "probe": number,
                "form": form,
                **{name: probe.get(name) for name in ("kind", "group", "prompt", "target", "foil", "generated")},
                "target_nll": _likelihood(probe, "target"),
                "foil_nll": _likelihood(probe, "foil"),
                "target_tokens": len(probe["target_hits"]) if probe.get("target_hits") else None,
                **{name: measure(probe, earlier) for name, measure in MEASURES.items()},
                "error": line.get("error") or seen.get("error"),
            }
    if line.get("error") and not line.get("before") and not line.get("after"):
        yield {**_place(line), "error": line["error"]}


def _likelihood(probe: Mapping[str, Any], role: str) -> float | None:
    """Nats a token; infinite where the model gave no finite number."""
    if probe.get(role) is None:
        return None
    value = probe.get(f"{role}_nll")
    return math.inf if value is None else value


def _mean(metric: str, moment: str, edits: int | None, entry: Mapping[str, Any]) -> dict[str, Any]:
    told, (low, high) = metrics()[metric], entry["ci95"] or (None, None)
    return {
        "metric": metric, "label": told.label, "unit": told.unit, "better": told.better, "moment": moment,
        "edits": edits, "mean": entry["mean"], "low": low, "high": high, "n": entry["n"],
    }  # fmt: skip


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise MissingError(REMEDY) from None
    return pandas


def _frame(columns: Mapping[str, str], rows: list[dict[str, Any]]) -> pandas.DataFrame:
    """Typed columns, whatever is missing in all rows: tables of several runs can be joined."""
    pd = _pandas()
    return pd.DataFrame({name: pd.array([row.get(name) for row in rows], dtype=kind) for name, kind in columns.items()})
