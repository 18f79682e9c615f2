"""Published numbers beside one's own, from `edit_cli/published/*.yaml`: one file a table, with what its protocol and
metrics have in common with those of this program and what not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import yaml

import edit_cli
from edit_cli.config.build import did_you_mean
from edit_cli.errors import UsageError
from edit_cli.files.shapes import Rule, at_least, checked
from edit_cli.metrics.registry import METRICS
from edit_cli.report import words
from edit_cli.report.tables.sheets import Block, Sheet

FOLDER = Path(edit_cli.__file__).parent / "published"
BOUND = re.compile(r"([<>])(\d*\.?\d+)")  # "<0.001", as some tables print it

Same = Literal[True] | str  # true, or what differs
Value = (
    float
    | tuple[float, float]
    | Annotated[str, Rule(lambda text: bool(BOUND.fullmatch(text)), "a bound such as <0.001")]
)


class Measured(TypedDict):
    """One column. ours: the metric of this program that it is nearest to, null if there is none. scale: what a printed
    value is multiplied by to have that metric's unit. computed: how it was measured there. same: true, or what is
    different here.
    """

    ours: Annotated[str | None, Rule(lambda name: name is None or name in METRICS, "a metric of this program")]
    scale: Annotated[float, at_least(1)]
    computed: str
    same: Same


class Row(TypedDict):
    """One line. model: by its name in conf/model. cases: records asked about, null where that is not told. values: as
    printed, or [value, half of its interval], by column.
    """

    model: str
    method: str
    cases: int | None
    values: dict[str, Value]


def _columns_named(table: Any) -> bool:
    return all(row["values"] and row["values"].keys() <= table["metrics"].keys() for row in table["rows"])


class Columns(TypedDict):
    """A table of a paper. data_sets: its data by the names of this program. protocol: what was done there; ours: what
    comes nearest to it here; like: the conditions that a run of it has; same: true, or what is different. interval:
    what stands behind a value, null for nothing. source: where the numbers were read.
    """

    paper: str
    authors: str
    year: Annotated[int, at_least(2000, 2100)]
    table: str
    data: str
    data_sets: list[str]
    protocol: str
    ours: str
    like: dict[str, str | int]
    same: Same
    interval: str | None
    source: Literal["paper", "quoted by a later publication"]
    metrics: Annotated[dict[str, Measured], Rule(bool, "columns")]
    rows: Annotated[list[Row], Rule(bool, "rows")]


Shape = Annotated[Columns, Rule(_columns_named, "a table whose rows have values of its own columns")]


@dataclass(frozen=True)
class Printed:
    """A value in the unit of the metric. bound: "<" or ">" where the table only says so. half: of its interval."""

    value: float
    half: float | None = None
    bound: str = ""

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """Of its interval; of a bound only that one."""
        if self.bound:
            return (None, self.value) if self.bound == "<" else (self.value, None)
        return (
            (None, None) if self.half is None else (round(self.value - self.half, 9), round(self.value + self.half, 9))
        )

    def told(self, decimals: int) -> str:
        value = f"{self.bound}{words.number(self.value, decimals)}"
        if self.half is None:
            return value
        return f"{value} [{', '.join(words.number(end, decimals) for end in self.ends)}]"


@dataclass(frozen=True)
class Table:
    """One file. key: its name."""

    key: str
    told: Columns

    @property
    def citation(self) -> str:
        return _cited(self.told)

    def columns(self, metrics: Collection[str]) -> dict[str, str]:
        """{metric: column} of those that the table has."""
        named = {column["ours"]: name for name, column in self.told["metrics"].items()}
        return {metric: named[metric] for metric in metrics if metric in named}

    def printed(self, row: Row, column: str) -> Printed | None:
        value, scale = row["values"].get(column), self.told["metrics"][column]["scale"]
        if value is None:
            return None
        if isinstance(value, str):
            sign, number = BOUND.fullmatch(value).groups()  # type: ignore[union-attr]
            return Printed(scale * float(number), bound=sign)
        value, half = (value, None) if isinstance(value, int | float) else value
        return Printed(scale * value, half if half is None else scale * half)

    def rows(self, metrics: Sequence[str]) -> list[tuple[str, str, float | None, float | None, float | None, str]]:
        """(name, metric, value, low, high, citation) of all its numbers; of "<0.001" there is only the high end."""
        found = []
        for row in self.told["rows"]:
            for metric, column in self.columns(metrics).items():
                if (one := self.printed(row, column)) is None:
                    continue
                mean = None if one.bound else one.value
                found.append((f"{row['method']} on {row['model']}", metric, mean, *one.ends, self.citation))
        return found


def _cited(told: Columns) -> str:
    return f"{told['authors']} ({told['year']}), {told['paper']}: {told['table']}"


def keys() -> list[str]:
    """The tables that there are."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


@cache
def read(key: str) -> Table:
    """A table by its key.

    Raises:
        UsageError: there is none of that name. MissingError: its file has another shape; names the field.
    """
    if key not in keys():
        raise UsageError(f"--published {key}: there is no such table{did_you_mean(key, keys())}")
    path = FOLDER / f"{key}.yaml"
    return Table(key, checked(yaml.safe_load(path.read_text(encoding="utf-8")), Shape, path))


def sheet(table: Table, metrics: Sequence[str], headings: Sequence[str], edited: Sequence[Mapping[str, Any]]) -> Sheet:
    """The rows of the models that were edited here (all, if there are none of them), in those columns of `metrics` that
    the table has; the notes say what differs. edited: of each run, its conditions by key: "command", "model",
    "data set", "cases", "protocol.…".
    """
    columns = table.columns(metrics)
    models = {one["model"] for one in edited}
    rows = [row for row in table.told["rows"] if row["model"] in models] or table.told["rows"]
    body = []
    for row in rows:
        found = {metric: table.printed(row, column) for metric, column in columns.items()}
        cells = [one.told(METRICS[metric].decimals) if one else "–" for metric, one in found.items()]
        if any(found.values()):
            body.append([f"{row['method']} on {row['model']}", *cells])
    notes = [_told(table.told), *_unlike(table.told, rows, edited), *_measured_otherwise(table.told, columns)]
    heads = [heading for metric, heading in zip(metrics, headings, strict=True) if metric in columns]
    return Sheet(f"Published ({table.key})", ["run", *heads], [Block("", body)], notes)


def _told(told: Columns) -> str:
    read_in = "" if told["source"] == "paper" else f" Numbers {told['source']}."
    nearest = f"the same as edit-cli {told['ours']}" if told["same"] is True else f"nearest: edit-cli {told['ours']}"
    differs = "" if told["same"] is True else f", but {told['same']}"
    interval = f" [low, high]: {told['interval']}." if told["interval"] else ""
    return f"{_cited(told)}.{read_in} Data: {told['data']}. Protocol: {told['protocol']}; {nearest}{differs}.{interval}"


def _unlike(told: Columns, rows: Sequence[Row], edited: Sequence[Mapping[str, Any]]) -> list[str]:
    """In what the runs are not what was published."""
    wanted: dict[str, Collection[Any]] = {
        "model": {row["model"] for row in rows},
        "data set": told["data_sets"],
        "cases": {row["cases"] for row in rows if row["cases"]},
        **{key: [value] for key, value in told["like"].items()},
    }
    differing = []
    for key, there in wanted.items():
        here = dict.fromkeys(one.get(key) for one in edited if one.get(key) not in there)
        if here and (there or key == "data set"):
            named = ", ".join(map(_shown, there)) or "another"
            differing.append(f"{key} ({', '.join(map(_shown, here))} here, {named} there)")
    return [f"NOT COMPARABLE as they stand; these runs differ in {'; '.join(differing)}."] if differing else []


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _measured_otherwise(told: Columns, columns: Mapping[str, str]) -> list[str]:
    differing = [
        f"{name} ({METRICS[metric].label}): {told['metrics'][name]['same']}"
        for metric, name in columns.items()
        if told["metrics"][name]["same"] is not True
    ]
    if not columns:
        return ["It has none of these metrics."]
    return [f"Measured otherwise: {'; '.join(differing)}."] if differing else []
