"""Whether the files of a run can be what the program wrote: a tampered, merged or torn run is told in a line.

Every value is held against its shape (`shapes`), no line may be there twice, and the lines of a run must agree on
what they are about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edit_cli.errors import MissingError
from edit_cli.files.shapes import checked, shown
from edit_cli.metrics.registry import metrics
from edit_cli.runs import inspected, manifests, result_lines, summaries

REMEDY = "delete that line and run again, or start with overwrite=true"
AGAIN = "run again with overwrite=true"
SUMMARIZED = "delete it, and the same command makes it again"

Line = Mapping[str, Any]
Claims = Iterator[tuple[str, Any]]  # (what a line speaks of, what it says of it that all such lines must)


def probes_of(line: Line) -> Claims:
    """The prompts that a case is asked about are the same before and after, and at every checkpoint."""
    for side in ("before", "after"):
        if (seen := line.get(side)) and seen["probes"]:
            asked = tuple((probe["kind"], probe["prompt"], probe["target"], probe["foil"]) for probe in seen["probes"])
            yield f"the probes of case {line['case_id']}", asked


def layers_of(line: Line) -> Claims:
    """All facts are traced through the same layers."""
    if line["known"]:
        yield "the layers", {kind: len(rows[0]) for kind, rows in line["scores"].items()}


def nothing(line: Line) -> Claims:
    yield from ()


@dataclass(frozen=True)
class Form:
    """Shapes of one kind of run. lines: by the value of the field `told_by`, or the only one."""

    manifest: Any
    lines: Mapping[Any, Any]
    summary: Any
    told_by: str | None = None
    claims: Callable[[Line], Claims] = nothing


EDITED = Form(manifests.Editing, {None: result_lines.CaseLine}, summaries.EditingSummary, claims=probes_of)
IN_SEQUENCE = {
    "after_edit": result_lines.StepLine,
    "checkpoint": result_lines.CheckpointLine,
    "held_out": result_lines.StepLine,
    "model": result_lines.ModelLine,
}
OF_MEMORIES = {"key": inspected.KeyLine, "layer": inspected.LayerLine, "edit": inspected.EditLine}
OF_A_FOLD = {"turn": result_lines.TurnLine, "kept": result_lines.KeptLine}
FORMS = {
    "evaluate": EDITED,
    "edit": EDITED,
    "sequential": Form(manifests.Sequential, IN_SEQUENCE, summaries.SequenceSummary, "when", probes_of),
    "sme": Form(manifests.Sme, OF_A_FOLD, summaries.SmeSummary, "when", probes_of),
    "trace": Form(
        manifests.Trace,
        {True: result_lines.Traced, False: result_lines.FactLine},
        summaries.TracesSummary,
        "known",
        layers_of,
    ),
    "inspect": Form(inspected.Inspected, OF_MEMORIES, inspected.InspectSummary, "what"),
    "train-editor": Form(manifests.Training, {None: result_lines.Point}, summaries.TrainingSummary),
    "tune": Form(manifests.Tuning, {None: summaries.TrialLine}, summaries.TuningSummary),
}


def kind_of(manifest: Mapping[str, Any]) -> str:
    """Which kind of run it is: its command, or `sme` for a run of that protocol."""
    protocol = manifest.get("protocol")
    return "sme" if isinstance(protocol, dict) and protocol.get("kind") == "sme" else manifest["command"]


def check_manifest(manifest: Mapping[str, Any], path: Path) -> None:
    """Raises:
    MissingError: a field is missing or of another shape; names file and field.
    """
    checked(manifest, manifests.Manifest, path, AGAIN)
    if (form := FORMS.get(kind_of(manifest))) is not None:
        checked(manifest, form.manifest, path, AGAIN)


def check_lines(manifest: Mapping[str, Any], lines: Sequence[Line], path: Path) -> None:
    """Raises:
    MissingError: a line is of another shape, is there twice, or contradicts another one; names file and line.
    """
    form = FORMS.get(kind_of(manifest))
    seen: dict[Any, int] = {}
    said: dict[str, Any] = {}
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number},"
        identity = identity_of(line, manifest["key"], where)
        if (first := seen.setdefault(identity, number)) != number:
            raise MissingError(f"{where} is there already, as line {first}: delete one of them")
        if form is None:
            continue
        tag = line.get(form.told_by) if form.told_by else None
        shape = form.lines.get(tag) if isinstance(tag, str | bool | None) else None
        if shape is None:
            raise MissingError(f"{where} is damaged: {form.told_by} is {shown(tag)}; {REMEDY}")
        checked(line, shape, where, REMEDY)
        for about, claim in form.claims(line):
            if said.setdefault(about, claim) != claim:
                raise MissingError(f"{where} is damaged: {about} are others than in an earlier line; {REMEDY}")


def identity_of(line: Line, key: Sequence[str], where: str) -> Any:
    """What tells a line from the others: its values of the fields `key`, or of the only one."""
    values = tuple(line.get(name, ...) for name in key)
    for name, value in zip(key, values, strict=True):
        if value is ...:
            raise MissingError(f"{where} is damaged: {name} is missing; {REMEDY}")
        if not isinstance(value, str | int | None):
            raise MissingError(f"{where} is damaged: {name} is {shown(value)}; {REMEDY}")
    return values if len(values) > 1 else values[0]


def check_summary(manifest: Mapping[str, Any], summary: Mapping[str, Any], path: Path) -> None:
    """Raises:
    MissingError: a field is missing or of another shape; names file and field.
    """
    found = summary.get("metrics")
    if isinstance(found, dict) and (unknown := found.keys() - metrics()):
        raise MissingError(
            f"{path} has the metric {shown(min(unknown))}, which neither this version nor a plug-in here brings: name"
            f" the package that does (--plugin PACKAGE), or {SUMMARIZED}"
        )
    if (form := FORMS.get(kind_of(manifest))) is not None:
        checked(summary, form.summary, path, SUMMARIZED)
