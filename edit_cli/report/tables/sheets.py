"""A table of texts, as Markdown, as LaTeX (booktabs) and on the screen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement

from edit_cli.report.comparison import right_aligned
from edit_cli.report.tables.texts import Text
from edit_cli.terminal import one_line

SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "±": r"$\pm$", "−": r"$-$",
    "×": r"$\times$", "–": "--", "’": "'",
}  # fmt: skip
MINUS = re.compile(r"(?<![\w-])-(?=\d)")
PREAMBLE = r"% in the preamble: \usepackage{booktabs}"


@dataclass(frozen=True)
class Block:
    """Rows that belong together; the label says what sets them apart from those of other blocks."""

    label: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Sheet:
    """A table: the first column is a name, the others are values. Where no block has a row, only the notes are told."""

    title: str
    heads: Sequence[str]
    blocks: Sequence[Block]
    notes: Sequence[str] = ()

    @property
    def filled(self) -> list[Block]:
        return [block for block in self.blocks if block.rows]


def markdown(sheets: Sequence[Sheet]) -> str:
    """Each sheet after the other; a block with a label is a table of its own."""
    parts = []
    for sheet in sheets:
        parts += [f"**{_piped(sheet.title)}**\n"] if sheet.title else []
        for block in sheet.filled:
            lines = [sheet.heads, ["---"] * len(sheet.heads), *block.rows]
            told = f"{_piped(block.label)}:\n\n" if block.label else ""
            parts.append(told + "".join(f"| {' | '.join(map(_piped, row))} |\n" for row in lines))
        parts += [f"{_piped(note)}\n" for note in sheet.notes]
    return "\n".join(parts)


def _piped(text: str) -> str:
    return one_line(text).replace("|", "\\|")


def latex(sheets: Sequence[Sheet]) -> str:
    """A `tabular` each with the rules of booktabs; blocks are parted by a rule and their label."""
    return PREAMBLE + "\n" + "\n".join(map(_tabular, sheets))


def _tabular(sheet: Sheet) -> str:
    count = len(sheet.heads)
    lines = [rf"% {one_line(sheet.title)}"] if sheet.title else []
    if sheet.filled:
        lines += [rf"\begin{{tabular}}{{l{'r' * (count - 1)}}}", r"\toprule", _row(sheet.heads), r"\midrule"]
        for number, block in enumerate(sheet.filled):
            lines += [r"\midrule"] if number else []
            lines += [rf"\multicolumn{{{count}}}{{l}}{{\textit{{{escaped(block.label)}}}}} \\"] if block.label else []
            lines += [_row(row) for row in block.rows]
        lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\smallskip\noindent{{\footnotesize {escaped(note)}}}" for note in sheet.notes]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return " & ".join(map(escaped, cells)) + r" \\"


def escaped(text: str) -> str:
    """Text for LaTeX, whatever it holds."""
    signed = MINUS.sub("−", one_line(text))
    return "".join(SPECIAL.get(character, character) for character in signed)


def on_screen(sheet: Sheet) -> RenderableType:
    """A value's interval, spread and p-value stand below it."""
    parts: list[RenderableType] = [Text(sheet.title, style="bold")] if sheet.title else []
    for block in sheet.filled:
        if block.label:
            parts += [*([Text("")] if parts else []), Text(block.label, style="italic")]
        table = right_aligned(*sheet.heads)
        for row in block.rows:
            table.add_row(*(Text(cell if index == 0 else _stacked(cell)) for index, cell in enumerate(row)))
        parts.append(table)
    return Group(*parts)


def width(console: Console, sheet: Sheet) -> int:
    """Columns that it takes on a screen without end."""
    return Measurement.get(console, console.options.update(width=1000), on_screen(sheet)).maximum


def _stacked(cell: str) -> str:
    for mark in (" [", " ± ", " p=", " p<"):
        cell = cell.replace(mark, f"\n{mark.strip()}" + (" " if mark == " ± " else ""))
    return cell
