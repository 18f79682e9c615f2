"""What stands on a page, as plain data. Templates lay it out; no HTML is made anywhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from edit_cli.report import words

Tone = Literal["", "good", "bad", "quiet"]


@dataclass(frozen=True)
class Mark:
    """A mean in % with its interval, on a scale from 0 to 100. side: 0 for before, and so on."""

    side: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """text: what is read. sort: what it is ordered by. marks: drawn below the text, or alone."""

    text: str = ""
    sort: float | None = None
    tone: Tone = ""
    marks: Sequence[Mark] = ()


@dataclass(frozen=True)
class Rows:
    """Rows of a table that belong together. part: told above the label, where a new part of the table begins."""

    label: str
    cells: Sequence[Sequence[Cell]]
    part: str = ""


@dataclass(frozen=True)
class Grid:
    """A table. right: columns of numbers. folded: on a screen, shown only when asked for."""

    kind: ClassVar[str] = "grid"

    heads: Sequence[str]
    blocks: Sequence[Rows]
    title: str = ""
    notes: Sequence[str] = ()
    right: Sequence[int] = ()
    folded: bool = False


@dataclass(frozen=True)
class Note:
    kind: ClassVar[str] = "note"

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Code:
    """What is typed."""

    kind: ClassVar[str] = "code"

    text: str


@dataclass(frozen=True)
class Figure:
    """image: the picture as a data URL. It is shown as an image, in which no script of a foreign file runs."""

    kind: ClassVar[str] = "figure"

    image: str
    caption: str


@dataclass(frozen=True)
class Said:
    """What a model said to a prompt at one moment. odds: (answer, its probability in words)."""

    moment: str
    reply: str | None
    odds: Sequence[tuple[str, str]] = ()
    tone: Tone = ""
    changed: bool = False


@dataclass(frozen=True)
class Asked:
    """A prompt, and what was said to it before and after. verdict: how it turned out, in words. stays: its answer was
    to stay.
    """

    what: str
    prompt: str
    said: Sequence[Said]
    verdict: str = ""
    tone: Tone = ""
    stays: bool = False


@dataclass(frozen=True)
class Item:
    """One case, traced fact or trial. rank: from worst to best, None for what cannot be ranked."""

    name: str
    lead: str
    cells: Sequence[Cell]
    status: Cell
    rank: float | None = None
    notes: Sequence[Note] = ()
    asked: Sequence[Asked] = ()
    grids: Sequence[Grid] = ()
    texts: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Items:
    """All of them, to be searched and sorted. one, several: what they are called. heads: of their numbers."""

    kind: ClassVar[str] = "items"

    one: str
    several: str
    heads: Sequence[str]
    items: Sequence[Item]
    notes: Sequence[str] = ()

    @property
    def statuses(self) -> list[str]:
        """What they can be chosen by."""
        return list(dict.fromkeys(item.status.text for item in self.items if item.status.text))


@dataclass(frozen=True)
class Extremes:
    """The worst and the best, shown whole."""

    kind: ClassVar[str] = "extremes"

    heads: Sequence[str]
    worst: Sequence[Item]
    best: Sequence[Item]


Block = Grid | Note | Code | Figure | Items | Extremes


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Tile:
    """One number that sums a run up."""

    label: str
    value: str
    more: str = ""


@dataclass(frozen=True)
class Part:
    """One run. warnings: what a reader must know before any number."""

    title: str
    place: str
    lines: Sequence[str]
    tiles: Sequence[Tile] = ()
    warnings: Sequence[str] = ()
    sections: Sequence[Section] = ()


@dataclass(frozen=True)
class Page:
    title: str
    parts: Sequence[Part]
    comparison: Section | None = None
    made: str = ""
    notes: Sequence[str] = field(default_factory=tuple)


SHOWN = 3  # cases on either side of `extremes`


def extremes(found: Items) -> Extremes | None:
    """The worst and the best of those that can be ranked, where there are enough to choose from."""
    ranked = sorted((item for item in found.items if item.rank is not None), key=lambda item: item.rank or 0.0)
    if len(ranked) < 3 * SHOWN:
        return None
    return Extremes(found.heads, ranked[:SHOWN], ranked[: -SHOWN - 1 : -1])


def mark(side: int, entry: Mapping[str, Any] | None) -> list[Mark]:
    """Of an entry of a summary in %; nothing where it has no mean."""
    if entry is None or entry["mean"] is None:
        return []
    low, high = entry["ci95"] or (None, None)
    return [Mark(side, entry["mean"], *(entry["mean"] if end is None else end for end in (low, high)))]


def value(entry: Mapping[str, Any] | None, digits: int = 1) -> Cell:
    """Mean and interval of an entry of a summary."""
    return Cell(words.with_interval(entry, digits), entry["mean"] if entry else None, "" if entry else "quiet")


def pairs(title: str, rows: Sequence[tuple[str, Any]], folded: bool = False) -> Grid:
    """A table of names and what they are; those without a value are left out."""
    told = [[Cell(name), Cell(str(what))] for name, what in rows if what not in (None, "", [], {})]
    return Grid(("", ""), [Rows("", told)], title, folded=folded)
