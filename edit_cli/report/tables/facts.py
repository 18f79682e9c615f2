"""What a model said of single facts before and after an edit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from edit_cli.metrics.forms import line_in, other_forms
from edit_cli.metrics.sequence import CHECKPOINT
from edit_cli.metrics.verdict import edited, of_probe, verdicts
from edit_cli.report import words
from edit_cli.report.tables.run import footer, heading, metrics_of, prose
from edit_cli.report.tables.texts import Text
from edit_cli.wording import many
from edit_cli.writing import bare

SHOWN = 10  # facts that are shown one by one
WIDEST = 60  # characters of a continuation
LEGEND = (
    "writes: how it goes on by itself. P(…): probability of that answer (geometric mean of its tokens'). A fact took if"
    " its new answer is likelier than the old one (the top choice, where none is given) and is in the model's reply."
)
NAMED = 10  # facts that did not take, named one by one


def before_and_after(summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Every edited fact with the answers before and after; for several facts, the means too."""
    shown = [line for line in lines if not line["error"]]
    parts: list[RenderableType] = [
        heading(summary),
        *_verdict(lines),
        Text(),
        probes(shown[:SHOWN], kinds=("rewrite",)),
    ]
    if len(shown) > SHOWN:
        parts.append(Text(f"… and {len(shown) - SHOWN:,} more facts: edit-cli show RUN --case ID", style="dim"))
    parts.append(prose(LEGEND))
    if len(shown) > 1:
        parts += [Text(), *metrics_of(summary), Text(), *footer(summary)]
    elif summary.get("diagnosis"):
        parts.append(prose(summary["diagnosis"]))
    return Group(*parts)


def _verdict(lines: Sequence[Mapping[str, Any]]) -> list[Text]:
    """How many facts took, and which did not."""
    found = verdicts(lines)
    if not found["failed"]:
        return [
            Text("It took." if found["n"] == 1 else f"{found['n']:,} of {found['n']:,} facts took.", style="bold green")
        ]
    said = "It DID NOT TAKE" if found["n"] == 1 else f"{found['took']:,} of {found['n']:,} facts took"
    told = [Text(f"{said}:" if found["n"] == 1 else f"{said}. These DID NOT:", style="bold red")]
    wrong = [line for line in lines if line["case_id"] in found["failed"]]
    for line in wrong[:NAMED]:
        why = line["error"] or "; ".join(str(v) for v in map(of_probe, edited(line)) if not v.took)
        told.append(Text(f"  {line['case_id']}: {'; '.join(map(arrow, line['requests']))} ({why})"))
    if len(wrong) > NAMED:
        told.append(Text(f"  … and {len(wrong) - NAMED:,} more: took.failed in summary.json names all"))
    return told


def asked(request: Mapping[str, Any]) -> str:
    """`Ada Lund plays the`"""
    subject, prompt = request["subject"], request["prompt"]
    return prompt if subject is None else prompt.replace("{}", subject, 1)


def arrow(request: Mapping[str, Any]) -> str:
    """`Ada Lund plays the → violin`"""
    return f"{asked(request)} → {bare(request['target_new'])}"


def case(line: Mapping[str, Any], most: int = 0) -> RenderableType:
    """Everything that one case holds: its requests, every prompt with the answers before and after, sampled texts.

    most: of a sequence, facts in place at its last checkpoint.
    """
    parts: list[RenderableType] = [Text(f"case {line['case_id']}", style="bold")]
    for request in line["requests"]:
        old = f" instead of {bare(request['target_true'])}" if request["target_true"] else ""
        parts.append(Text(f"edited: {arrow(request)}{old}"))
    if line["error"]:
        parts.append(Text(f"failed: {line['error']}", style="bold red"))
    if most:
        then = f"with {many(line['edits'], 'fact')} of {most:,} edited"
        told = then if line["when"] == CHECKPOINT else "right after its own edit"
        parts.append(Text(f"after: as it was last asked, {told}", style="dim"))
    if line["before"] or line["after"]:
        parts += [Text(), probes([line]), prose(LEGEND)]
    for side in ("before", "after"):
        for text in (line.get(side) or {}).get("texts") or []:
            parts += [Text(), Text(f"text {side}", style="bold"), Text(text)]
    return Group(*parts)


def probes(lines: Sequence[Mapping[str, Any]], kinds: Sequence[str] | None = None) -> RenderableType:
    """A block for each prompt: what the model writes, and the probability of the answers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("prompt", ratio=4, overflow="fold")
    table.add_column("", style="dim")
    table.add_column("before", ratio=3, overflow="fold")
    table.add_column("after", ratio=3, overflow="fold", style="bold")
    asked = [(form, line_in(line, form)) for line in lines for form in (None, *other_forms(line))]
    for form, line in asked:
        before, after = ((line[side] or {}).get("probes") or [] for side in ("before", "after"))
        for then, now in zip(before or [None] * len(after), after or [None] * len(before), strict=True):
            known = then or now
            if kinds is not None and known["kind"] not in kinds:
                continue
            named = f"{known['prompt']} …" if kinds else f"{known['kind']}: {known['prompt']} …"
            if form is not None:
                named = f"as {form}: {named}"
            for index, row in enumerate(_rows(known, then, now)):
                table.add_row("" if index else Text(named), *map(Text, row))
            table.add_section()
    return table


def _rows(
    known: Mapping[str, Any], then: Mapping[str, Any] | None, now: Mapping[str, Any] | None
) -> list[tuple[str, str, str]]:
    rows = []
    if known.get("generated") is not None:
        rows.append(("writes", _cut(then), _cut(now)))
    for role in ("target", "foil"):
        if known.get(role) is not None:
            rows.append((f"P({bare(known[role])})", _probability(then, role), _probability(now, role)))
    if known["kind"] == "rewrite" and now is not None:
        rows.append(("verdict", "", str(of_probe(now))))
    return rows


def _cut(probe: Mapping[str, Any] | None) -> str:
    text = ((probe or {}).get("generated") or "").strip()
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


def _probability(probe: Mapping[str, Any] | None, role: str) -> str:
    if probe is None:
        return "–"
    nll = probe.get(f"{role}_nll")
    return words.number(None) if nll is None else f"{100 * math.exp(-nll):.1f} %"
