"""What `inspect` found, as parts of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edit_cli.report import memories
from edit_cli.report.page.parts import Block, Cell, Grid, Item, Items, Note, Rows, Section, Tile, Tone
from edit_cli.terminal import one_line
from edit_cli.wording import many

Summary = Mapping[str, Any]
Lines = Sequence[Mapping[str, Any]]

HEADS = (
    "layer", "shallow %", "semantic %", "without last %", "without first %", "agreement %", "chance %", "active %",
    "alone %", "residual wins %", "final %",
)  # fmt: skip
TONES: dict[str, Tone] = {"shallow": "good", "semantic": "good", "none": "quiet"}


def tiles(summary: Summary) -> list[Tile]:
    layers, text = summary["layers"], summary["text"]
    if not layers:
        return []
    told = [
        Tile("keys looked at", f"{summary['n']:,}", many(len(layers), "layer")),
        Tile("prefixes", f"{text['prefixes']:,}", many(text["documents"], "document")),
    ]
    compared = [layer for layer in layers if layer["agreement"] is not None]
    if compared:
        best = max(compared, key=lambda layer: layer["agreement"])
        told.append(
            Tile("largest agreement", f"{100 * best['agreement']:.2f} %",
                 f"layer {best['layer']}, by chance {100 * best['chance']:.2f} %")
        )  # fmt: skip
    return told


def sections(summary: Summary, lines: Lines) -> list[Section]:
    """Numbers by layer, and the changed layers."""
    rows = [
        [Cell(str(layer["layer"]), layer["layer"]), *map(Cell, memories.cells(layer))] for layer in summary["layers"]
    ]
    blocks: list[Block] = [Grid(HEADS, [Rows("", rows)], notes=list(memories.NOTES.values()), right=range(len(HEADS)))]
    edited = sorted((line for line in lines if line["what"] == "edit"), key=lambda line: line["layer"])
    return [
        Section("What it found", blocks),
        *(Section(f"What the edit changed in layer {line['layer']}", _edited(line)) for line in edited),
    ]


def _edited(line: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = [Note(f"The change has {100 * line['size']:.2g} % of the matrix's norm.")]
    for fact in line["facts"]:
        fired = [
            [Cell(str(one["key"]), one["key"]), Cell(f"{one['before']:.4g}", one["before"]),
             Cell(f"{one['after']:.4g}", one["after"])]
            for one in fact["fired"]
        ]  # fmt: skip
        told = [
            [Cell("what the edit adds"), Cell(memories.tokens(fact["change_promotes"]))],
            [Cell("the layer's output before"), Cell(memories.tokens(fact["promoted_before"]))],
            [Cell("the layer's output since"), Cell(memories.tokens(fact["promoted_after"]))],
        ]
        where = f"{memories.told_fact(fact['request'])}, read at {fact['token']!r}"
        blocks.append(Grid(("", "promotes"), [Rows("", told)], where))
        heads = ("key", "coefficient before", "since the edit")
        blocks.append(Grid(heads, [Rows("", fired)], "Keys that fire there most", right=range(3), folded=True))
    values = [
        [Cell(str(one["key"]), one["key"]), Cell(f"{100 * one['moved']:.3g}", one["moved"]),
         Cell(memories.tokens(one["before"])), Cell(memories.tokens(one["after"]))]
        for one in line["values"]
    ]  # fmt: skip
    columns = ("key", "moved, % of its norm", "promoted before", "promotes since")
    blocks.append(Grid(columns, [Rows("", values)], "Values that moved most", right=(0, 1)))
    for number, factor in enumerate(line["factors"], 1):
        rows = [[Cell("promotes", tone="quiet"), Cell(memories.tokens(factor["tokens"])), Cell()]]
        rows += [[Cell("read by", tone="quiet"), Cell(one_line(text)), Cell(f"{score:.4g}", score)]
                 for text, score in factor["texts"]]  # fmt: skip
        title = f"Factor {number}: the tokens along its left side, and the texts whose keys lie along its right one"
        blocks.append(Grid(("", "", "product"), [Rows("", rows)], title, right=(2,), folded=number > 1))
    return blocks


def items(lines: Lines) -> Items:
    """The keys, to be searched."""
    found = [_key(line) for line in lines if line["what"] == "key"]
    heads = ("same end %", "without last %", "value's top token")
    note = "Same end: share of a key's triggers that end with its most common last token."
    return Items("key", "keys", heads, found, [note])


def _key(line: Mapping[str, Any]) -> Item:
    name, found, value = f"{line['layer']}:{line['key']}", line["pattern"], line["value"]
    top = Cell(repr(value["tokens"][0][0]))
    if found is None:
        quiet = Cell("–", tone="quiet")
        return Item(name, "fires at no prefix", [quiet, quiet, top], Cell("silent", tone="quiet"))
    removed = line["removed"]
    ends, words = found["last"], found["words"]
    shared = ", ".join(f"{word} ({100 * share:.0f} %)" for word, share in words if share > 1 / len(line["examples"]))
    lead = f"ends with {ends[0]!r}" if found["kind"] == "shallow" else f"shares {shared}" if shared else "no pattern"
    cells = [
        Cell(f"{100 * ends[1]:.0f}", ends[1]),
        Cell(f"{100 * removed['last']:+.0f}", removed["last"]) if removed else Cell("–", tone="quiet"),
        top,
    ]
    rows = [
        [Cell(f"{one['coefficient']:.4g}", one["coefficient"]), Cell(one_line(one["text"])),
         Cell("" if one["next"] is None else repr(one["next"])), Cell(str(one["document"]), one["document"])]
        for one in line["examples"]
    ]  # fmt: skip
    bigram = found["bigram"]
    notes = [
        Note(f"Most common last two tokens: {bigram[0]!r} ({100 * bigram[1]:.0f} %). Shared words: {shared or 'none'}."
             f" {100 * found['documents']:.0f} % of the triggers are from documents of their own."),
        Note(f"The value promotes {memories.tokens(value['tokens'])}."),
    ]  # fmt: skip
    if removed:
        told = ", ".join(f"the {which} {100 * removed[which]:+.0f} %" for which in ("last", "first"))
        notes.append(Note(f"Change of the coefficient without one token: {told}, one at random"
                          f" {100 * removed['random']:+.0f} %."))  # fmt: skip
    grid = Grid(("coefficient", "trigger", "goes on with", "document"), [Rows("", rows)], "Triggers", right=(0, 3))
    return Item(name, lead, cells, Cell(found["kind"], tone=TONES[found["kind"]]), notes=notes, grids=[grid])
