"""Which runs a comparison is of: where they lie, which belong together, and which are not alike."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edit_cli.commands.compare_conditions import DATA, SIZE, conditions, identity, protocol_of, seeds, setting
from edit_cli.errors import MissingError, UsageError
from edit_cli.files.paths import expanded
from edit_cli.metrics.columns import Column, case_columns, over_seeds
from edit_cli.report.comparison import short
from edit_cli.report.measures import measured
from edit_cli.runs.format import kind_of
from edit_cli.runs.record import MANIFEST, RunRecord, list_runs, read_run

COMPARED = ("evaluate", "edit", "sequential", "trace", "train-editor")
TAG, FACTS = "tag", "facts"
NAMED = 2  # runs that are named for one value of what differs, and values
TOLD = 3  # settings by which lines of one name are told apart


# --- where they lie --------------------------------------------------------------------------------------------------


def found(places: Sequence[str], note: Callable[[str], None]) -> list[RunRecord]:
    """The runs that are named, each by its directory, a folder above it, or a pattern such as `'runs/*/memit*'`.

    Those that are named themselves must be finished and measure something; others are left out with a note.
    """
    records: list[RunRecord] = []
    for run, named in places_of_runs(places).items():
        try:
            records.append(finished(run))
        except (MissingError, UsageError) as error:
            if named:
                raise
            note(f"left out: {error}")
    if not records:
        raise MissingError(f"{', '.join(places)}: no finished run of {_either(COMPARED)}")
    return records


def places_of_runs(places: Sequence[str]) -> dict[Path, bool]:
    """{directory of a run: whether it is named itself}, each once, in the order of the places.

    Raises:
        MissingError: there is no run at a place.
    """
    found: dict[Path, tuple[Path, bool]] = {}
    for place in places:
        path = expanded(place)
        named = (path / MANIFEST).exists()
        matches = [Path(match) for match in sorted(glob.glob(str(path)))] if not path.exists() else [path]
        if not matches and glob.has_magic(str(path)):
            raise MissingError(f"{place} matches nothing")
        inside = [record.path for match in matches if match.is_dir() for record in list_runs(match)]
        if not inside:
            raise MissingError(f"{place} holds no run: {MANIFEST} is missing")
        for run in inside:
            before, whole = found.get(run.resolve(), (run, False))
            found[run.resolve()] = (before, whole or named)
    return dict(found.values())


def finished(path: Path) -> RunRecord:
    """The run at `path`.

    Raises:
        UsageError: it is of a command that measures nothing. MissingError: it has no summary yet.
    """
    record = read_run(path)
    if record.manifest["command"] not in COMPARED:
        raise UsageError(f"{path} is a run of `{record.manifest['command']}`: compare runs of {_either(COMPARED)}")
    if not record.summary:
        raise MissingError(f"{path} has no summary yet: the run is {record.status}")
    return record


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


# --- which belong together -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """One row: a run, or several that differ in their seeds alone. name: what its line is called. at: its place on the
    x-axis, None where there is none. apart: the conditions that set it apart from unlike runs.
    """

    records: tuple[RunRecord, ...]
    name: str
    at: Any = None
    apart: str = ""

    @property
    def summaries(self) -> list[Mapping[str, Any]]:
        """Of each run, with what it measured under "metrics"."""
        return [measured(kind_of(record.manifest), record.summary) for record in self.records if record.summary]

    @property
    def edits(self) -> set[int]:
        """Of sequences, how many facts were in place when the end was asked about."""
        summaries = [record.summary or {} for record in self.records]
        return {rows[-1]["edits"] for summary in summaries if (rows := summary.get("checkpoints"))}

    @property
    def data(self) -> tuple[Any, ...]:
        """The record set, so that cases of one name are the same."""
        told = conditions(self.records[0])
        return tuple(told[key] for key in DATA)

    def columns(self, metrics: Sequence[str]) -> dict[str, Column]:
        """What each case contributes to the metrics, as the mean over the seeds."""
        each = [
            case_columns(kind_of(record.manifest), record.lines, metrics, protocol_of(record.manifest).get("fold_seed"))
            for record in self.records
        ]
        return {
            metric: over_seeds([found[metric] for found in each])
            for metric in metrics
            if all(metric in found for found in each)
        }


def grouped(records: Sequence[RunRecord], x: str | None, by: str | None) -> list[Group]:
    """The rows, along the axis where that is a number."""
    alike: dict[Any, list[RunRecord]] = {}
    for record in records:
        told = [None if x in (None, FACTS) else setting(record, x), None if by is None else setting(record, by)]
        alike.setdefault(json.dumps([identity(record), told], default=str), []).append(record)
    together = [
        part
        for same in alike.values()
        for part in ([same] if len({json.dumps(seeds(one)) for one in same}) == len(same) else [[one] for one in same])
    ]
    groups = [
        Group(tuple(same), _name(same, by, x, together), None if x in (None, FACTS) else setting(same[0], x))
        for same in together
    ]
    return _in_order(groups)


def distinct(groups: Sequence[Group], declared: Sequence[str | None]) -> list[Group]:
    """Lines that share name, place and conditions are called by the settings in which they differ, too, or by where
    they lie.

    declared: keys that the axis or the names tell already.
    """
    names = {group.name for group in _sharing(groups)}
    told = {name: [_settings(group, declared) for group in groups if group.name == name] for name in names}
    moving = {name: _differing(mine) for name, mine in told.items()}
    named = [replace(group, name=_with_settings(group, moving.get(group.name, ()))) for group in groups]
    paths = _briefly([record.path for group in groups for record in group.records])
    alike = {id(group) for group in _sharing(named)}
    return _in_order(
        [
            replace(group, name=f"{group.name} ({paths[group.records[0].path]})") if id(group) in alike else group
            for group in named
        ]
    )


def _in_order(groups: Sequence[Group]) -> list[Group]:
    """Line by line along the axis, where there is one; else as they come."""
    if all(group.at is None for group in groups):
        return list(groups)
    return sorted(groups, key=lambda group: (group.name, float(group.at) if isinstance(group.at, int | float) else 0.0))


def _sharing(groups: Sequence[Group]) -> list[Group]:
    """Those whose name, place and conditions others have, too."""
    places = [(group.name, json.dumps(group.at, default=str), group.apart) for group in groups]
    return [group for group, place in zip(groups, places, strict=True) if places.count(place) > 1]


def _settings(group: Group, declared: Sequence[str | None]) -> dict[str, Any]:
    return {key: value for key, value in identity(group.records[0]).items() if key not in declared}


def _with_settings(group: Group, keys: Sequence[str]) -> str:
    """`ft steps=25`; the bare name where more settings differ than a line can tell."""
    if not keys or len(keys) > TOLD:
        return group.name
    settings = identity(group.records[0])
    return " ".join([group.name, *(f"{key.rpartition('.')[2]}={short(settings.get(key))}" for key in keys)])


def _name(same: Sequence[RunRecord], by: str | None, x: str | None, groups: Sequence[Sequence[RunRecord]]) -> str:
    """What a line of the figure is called."""
    record, method = same[0], _method(same[0])
    if by == TAG:
        return str(setting(record, TAG) or method)
    if by is not None:
        return f"{method} {by.rpartition('.')[2]}={short(setting(record, by))}"
    if x is not None and x != FACTS:
        return method
    if sum(_method(group[0]) == method for group in groups) == 1:
        return method
    place = record.path.name
    if len(same) > 1:
        place = os.path.commonprefix([one.path.name for one in same]).rstrip("-_=.") or place  # noqa: RUF071 - of names
    return place if place.startswith(method) else f"{method} {place}"


def _method(record: RunRecord) -> str:
    return record.manifest["method"] or record.manifest["command"]


# --- which are not alike ---------------------------------------------------------------------------------------------


def told_apart(groups: Sequence[Group], x: str | None, by: str | None, anyway: bool) -> tuple[list[Group], list[str]]:
    """(the groups with what sets them apart, what else differs along the x-axis).

    Methods that edit as many facts together as they are made for are listed apart, as papers do.

    Raises:
        UsageError: other unlike runs would stand in one column, and nobody has said `anyway`.
    """
    declared = [key for key in (x, by) if key is not None]
    told = [_left(conditions(group.records[0]), declared) for group in groups]
    unlike = [key for key in dict.fromkeys(key for one in told for key in one) if _differs(key, groups, told)]
    moving = [key for key in _differing(told) if key not in unlike]
    if not unlike:
        return list(groups), moving
    if not anyway and not (unlike == [SIZE] and own_sizes(groups)):
        complaint = "; ".join(_complaint(key, groups, told) for key in _informative(unlike)[:3])
        more = f" and {len(_informative(unlike)) - 3} more" if len(_informative(unlike)) > 3 else ""
        axis = f"put it on the axis (--x {SIZE}), " if unlike == [SIZE] else ""
        raise UsageError(
            f"these runs are not alike: {complaint}{more}. Compare those that are, {axis}or list them apart (--anyway)"
        )
    labels = [
        ", ".join(f"{key.removeprefix('protocol.')} {_value(one.get(key))}" for key in _informative(unlike))
        for one in told
    ]
    return [replace(group, apart=label) for group, label in zip(groups, labels, strict=True)], moving


def own_sizes(groups: Sequence[Group]) -> bool:
    """Whether every method has edited as many facts together as it does by itself."""
    return all(protocol_of(record.manifest).get("batch_size") == "auto" for group in groups for record in group.records)


def _left(told: Mapping[str, Any], declared: Sequence[str]) -> dict[str, Any]:
    """Conditions without those that the axis or the names of the lines tell already."""
    hidden = set(declared)
    if any(key == "limit" or key.startswith("dataset") for key in declared):
        hidden |= {*DATA, *(key for key in told if key.startswith("dataset."))}
    if any(key.startswith("model") for key in declared):
        hidden |= {key for key in told if key.startswith("model")}
    return {key: value for key, value in told.items() if key not in hidden}


def _differs(key: str, groups: Sequence[Group], told: Sequence[Mapping[str, Any]]) -> bool:
    """Whether runs at one place of the axis have several values."""
    seen: dict[str, set[str]] = {}
    for group, one in zip(groups, told, strict=True):
        seen.setdefault(json.dumps(group.at, default=str), set()).add(json.dumps(one.get(key), default=str))
    return any(len(values) > 1 for values in seen.values())


def _differing(told: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for one in told for key in one)
    return [key for key in keys if len({json.dumps(one.get(key), default=str) for one in told}) > 1]


def _informative(keys: Sequence[str]) -> list[str]:
    """Without those that follow from others."""
    if "data set" in keys:  # each has settings of its own
        keys = [key for key in keys if not key.startswith("dataset.")]
    follows = {"model.name": "model", "model.id": "model", "model.perplexity_text": "model", "data file": "data set",
               "record ids": "data set"}  # fmt: skip
    if "command" in keys:  # each has keys of its own
        keys = [key for key in keys if not key.startswith("protocol.") or key == SIZE]
    return [key for key in keys if follows.get(key) not in keys]


def _complaint(key: str, groups: Sequence[Group], told: Sequence[Mapping[str, Any]]) -> str:
    paths = _briefly([record.path for group in groups for record in group.records])
    values: dict[str, list[str]] = {}
    for group, one in zip(groups, told, strict=True):
        values.setdefault(_value(one.get(key)), []).extend(paths[record.path] for record in group.records)
    shown = [
        f"{value} ({', '.join(names[:NAMED])}{f' and {len(names) - NAMED} more' if len(names) > NAMED else ''})"
        for value, names in list(values.items())[:NAMED]
    ]
    return f"{key} is {' and '.join(shown)}{' and …' if len(values) > NAMED else ''}"


def _briefly(paths: Sequence[Path]) -> dict[Path, str]:
    """{directory of a run: its path below the folder that all of them share}."""
    parents = [path.absolute().parent for path in paths]
    shared = os.path.commonpath(parents)
    return {path: str(path.absolute().relative_to(shared)) for path in paths}


def _value(value: Any) -> str:
    text = "null" if value is None else short(value)
    return f"{text[:8]}…" if len(text) == 64 else text
