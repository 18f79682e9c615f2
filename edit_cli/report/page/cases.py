"""Cases of runs that edit: what was asked of each, and what the model said before and after."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edit_cli.metrics.registry import metrics as registered
from edit_cli.metrics.scores import MEASURES, is_scored, probe_values
from edit_cli.metrics.sequence import AFTER_EDIT, CHECKPOINT, HELD_OUT
from edit_cli.metrics.sme import TURN
from edit_cli.metrics.verdict import edited, of_probe, took
from edit_cli.report import words
from edit_cli.report.comparison import in_a_line, shown_metrics
from edit_cli.report.page.parts import Asked, Cell, Item, Items, Note, Said, Tone
from edit_cli.report.tables.facts import arrow
from edit_cli.wording import many
from edit_cli.writing import bare

TOOK, DID_NOT, FAILED, KEPT_OUT, RIGHT = "took", "did not take", "failed", "never edited", "right already"
TONES: dict[str, Tone] = {TOOK: "good", DID_NOT: "bad", FAILED: "bad", KEPT_OUT: "quiet", RIGHT: "quiet"}
STAYS = ("neighborhood", "locality", "attribute")  # kinds of prompts whose answers must stay
KINDS = {
    "rewrite": "edited",
    "paraphrase": "paraphrase",
    "neighborhood": "neighborhood",
    "attribute": "other subject that always had the new answer",
    "locality": "locality",
    "portability": "portability",
}
END = "at the end"
NOT_OF_A_CASE = ("score", "token_score", "perplexity")

Line = Mapping[str, Any]
Moment = tuple[str, Any]  # a name, and what the model said then


def cases(kind: str, lines: Sequence[Line]) -> Items:
    """Every case of a run of that kind, with its own numbers at the end."""
    told, known = list(_told(kind, lines)), registered()
    ended = any(moments[-1][0] == END for _, moments in told)
    values = [
        _values({**line, "before": moments[0][1], "after": moments[-1][1]})
        if not ended or moments[-1][0] == END
        else {}
        for line, moments in told
    ]
    measured = {name for one in values for name in one}
    shown = [name for name in shown_metrics(measured) if name not in NOT_OF_A_CASE]
    items = [_item(kind, line, moments, shown, own) for (line, moments), own in zip(told, values, strict=True)]
    heads = [in_a_line(name) for name in shown]
    notes = [f"{in_a_line(name)}: {known[name].legend or known[name].definition}, in %" for name in shown]
    last = " with all edits in place, where the last checkpoint asked about it" if ended else ""
    about = [f"Numbers of each case{last}. {'; '.join(notes)}."] if notes else []
    return Items("case", "cases", heads, items, about)


def _values(line: Line) -> dict[str, float]:
    """What the case's prompts come to after the edit."""
    return probe_values(line, "after") if is_scored(line) else {}


def _told(kind: str, lines: Sequence[Line]) -> Iterator[tuple[Line, list[Moment]]]:
    """(its line, what was said at which moments) of every case, once."""
    if kind == "sme":
        for line in lines:
            if line["when"] == TURN:
                yield line, [("before", line["before"]), ("after", line["after"])]
        return
    if kind != "sequential":
        for line in lines:
            yield line, [("before", line["before"]), ("after", line["after"])]
        return
    later = {line["case_id"]: line for line in lines if line.get("when") == CHECKPOINT}
    most = max((line["edits"] for line in later.values()), default=0)
    for line in lines:
        if line["when"] == AFTER_EDIT:
            last = later.get(line["case_id"])
            end = [] if last is None else [(_moment(last["edits"], most), last["after"])]
            yield line, [("before", line["before"]), ("right after", line["after"]), *end]
    for line in {line["case_id"]: line for line in lines if line["when"] == HELD_OUT}.values():
        yield line, [("before", line["before"]), (END, line["after"])]


def _moment(edits: int, most: int) -> str:
    """What the checkpoint after so many facts, of so many in all, is called."""
    return END if edits == most else f"after {many(edits, 'fact')}"


def _item(kind: str, line: Line, moments: Sequence[Moment], shown: Sequence[str], values: Mapping[str, float]) -> Item:
    status = _status(kind, line, moments)
    cells = [_number(values.get(name)) for name in shown]
    named = f"fold {line['fold']}, {line['case_id']}" if kind == "sme" else line["case_id"]
    notes = [Note(line["error"], "bad")] if line["error"] else []
    texts = [
        (f"text {name}", text) for name, seen in moments if seen for text in seen.get("texts") or () if text.strip()
    ]
    return Item(
        named,
        "; ".join(map(arrow, line["requests"])) or _first_prompt(moments),
        cells,
        Cell(status, tone=TONES[status]),
        _rank(values, shown) if status in (TOOK, DID_NOT) else None,
        notes,
        list(_asked(moments)),
        texts=texts,
    )


def _first_prompt(moments: Sequence[Moment]) -> str:
    """What a record that is never edited is known by."""
    return next((f"{probe['prompt']} …" for _, seen in moments if seen for probe in seen["probes"]), "")


def _status(kind: str, line: Line, moments: Sequence[Moment]) -> str:
    if line["error"]:
        return FAILED
    if line.get("when") == HELD_OUT:
        return KEPT_OUT
    if kind == "sme" and not line["mistake"]:
        return RIGHT
    asked = {**line, "after": moments[-1][1]}
    if not edited(asked):
        return ""
    return TOOK if took(asked) else DID_NOT


def _number(found: float | None) -> Cell:
    return Cell("–", tone="quiet") if found is None else Cell(words.number(found, 0), found)


def _rank(values: Mapping[str, float], shown: Sequence[str]) -> float | None:
    """Mean of the case's own numbers; of equals, by how far apart the probabilities are."""
    rated = [values[name] for name in shown if name in values]
    apart = [value for name, value in values.items() if name.endswith("_magnitude")]
    if not rated:
        return None
    return math.fsum(rated) / len(rated) + (1e-3 * math.fsum(apart) / len(apart) if apart else 0.0)


def _asked(moments: Sequence[Moment]) -> Iterator[Asked]:
    seen = [(name, probes) for name, one in moments if one and (probes := one.get("probes"))]
    count = min((len(probes) for _, probes in seen), default=0)
    for number in range(count):
        each = [(name, probes[number]) for name, probes in seen]
        first, last = each[0][1], each[-1][1]
        verdict, tone = _verdict(last, first if len(each) > 1 else None)
        known = KINDS.get(last["kind"], last["kind"])
        what = f"{known} ({last['group'].replace('_', ' ')})" if last.get("group") else known
        said = [_said(name, probe, None if index == 0 else first) for index, (name, probe) in enumerate(each)]
        yield Asked(what, last["prompt"], said, verdict, tone, last["kind"] in STAYS)


def _said(name: str, probe: Mapping[str, Any], before: Mapping[str, Any] | None) -> Said:
    reply = probe.get("generated")
    odds = [
        (bare(probe[role]), _probability(probe.get(f"{role}_nll")))
        for role in ("target", "foil")
        if probe.get(role) is not None
    ]
    return Said(name, None if reply is None else reply.strip(), odds, changed=bool(before and _differs(probe, before)))


def _differs(probe: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    return probe.get("generated") is not None and MEASURES["generated_unchanged"](probe, before) == 0.0


def _verdict(probe: Mapping[str, Any], before: Mapping[str, Any] | None) -> tuple[str, Tone]:
    """How a prompt turned out, by the answers that are compared; where there are none, by what is written."""
    if before is None:
        return "", ""
    if probe["kind"] == "rewrite":
        found = of_probe(probe)
        return str(found), "good" if found.took else "bad"
    stays = probe["kind"] in STAYS
    measures = ("success", "unchanged", "generated_unchanged") if stays else ("success", "accuracy")
    for name in measures:
        result = MEASURES[name](probe, before)
        if result is not None:
            good = result == 1.0
            right = ("kept", "changed") if stays else ("right", "wrong")
            return right[not good], "good" if good else "bad"
    return "", ""


def _probability(nll: float | None) -> str:
    return words.number(None) if nll is None else f"{100 * math.exp(-nll):.1f} %"
