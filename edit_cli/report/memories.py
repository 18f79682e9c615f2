"""What was found of feed-forward layers as memories: summary and table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from rich.console import Group, RenderableType

from edit_cli.inspection.patterns import REMOVED
from edit_cli.report.comparison import right_aligned
from edit_cli.report.summary import ABOUT_DATA, header
from edit_cli.report.tables.run import plain_table, prose
from edit_cli.report.tables.texts import Text
from edit_cli.terminal import one_line
from edit_cli.wording import many
from edit_cli.writing import bare

Line = Mapping[str, Any]

OF_LAYERS = ("keys", "silent", "compared", "agreement", "chance", "top_share", "composition", "refinement")
OF_TEXT = ("documents", "prefixes", "measured")
TOLD = 4  # tokens of a vector in the table
NOTES = {
    "triggers": "shallow: at least half of a key's triggers end with the same token; semantic: they share a word that"
    " three random prefixes in a hundred have at most. without last, first: relative change of a key's coefficient"
    " where that token of its triggers is removed, the median over keys.",
    "values": "agreement: the value's top token is the next token of the key's strongest trigger, over all keys that"
    " fire; chance: the same if values and triggers were dealt out anew.",
    "layers": "active: memories that carry 90 % of the layer's output (of ReLUs: all above zero); alone: the layer's"
    " top token is that of a single active memory. residual wins: the top token of the sum is that of the residual and"
    " not the layer's. final: before the layer, the residual's top token is the model's answer already.",
}


def summary_of(
    manifest: Mapping[str, Any],
    lines: Sequence[Line],
    references: Mapping[str, Sequence[str]] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """summary.json: `layers`, from below upwards, and of an edit `edited`."""
    about = manifest["dataset"]
    of_layers = sorted((line for line in lines if line["what"] == "layer"), key=lambda line: line["layer"])
    keys = [line for line in lines if line["what"] == "key"]
    return {
        **header(manifest, lines, seconds),
        "dataset": {key: about[key] for key in ABOUT_DATA},
        "n": len(keys),
        "failed": 0,
        "metrics": {},  # lists of runs read these two of every run
        "seconds_per_edit": None,
        "norm": manifest["config"]["protocol"]["norm"],
        "text": {name: of_layers[0][name] for name in OF_TEXT} if of_layers else None,
        "layers": [_layer(line, [key for key in keys if key["layer"] == line["layer"]]) for line in of_layers],
        "edited": [
            {"layer": line["layer"], "size": line["size"], "facts": [_fact(fact) for fact in line["facts"]]}
            for line in sorted((line for line in lines if line["what"] == "edit"), key=lambda line: line["layer"])
        ],
    }


def _layer(line: Line, keys: Sequence[Line]) -> dict[str, Any]:
    """keys: those of this layer whose triggers were kept."""
    patterns = [key["pattern"] for key in keys if key["pattern"] is not None]
    kinds = Counter(found["kind"] for found in patterns)
    removed = [key["removed"] for key in keys if key["removed"] is not None]
    return {
        "layer": line["layer"],
        **{name: line[name] for name in OF_LAYERS},
        "looked_at": len(patterns),
        "shallow": kinds["shallow"] / len(patterns) if patterns else None,
        "semantic": kinds["semantic"] / len(patterns) if patterns else None,
        "documents_apart": fmean(found["documents"] for found in patterns) if patterns else None,
        "removed": {which: median(found[which] for found in removed) for which in REMOVED} if removed else None,
    }


def _fact(fact: Mapping[str, Any]) -> dict[str, Any]:
    return {"request": fact["request"], "token": fact["token"], "change_promotes": fact["change_promotes"]}


def heading(summary: Mapping[str, Any]) -> Text:
    """Model, text, and how vectors are read."""
    text = Text(f"Memories of {summary['model']}: {many(summary['n'], 'key')} looked at", style="bold")
    if (read := summary["text"]) is not None:
        told = (
            f"{many(read['prefixes'], 'distinct prefix', 'distinct prefixes')} of {many(read['documents'], 'document')}"
        )
        text.append(f"\nText: {summary['dataset']['name']}, {told}; layers on {read['measured']:,} of them",
                    style="not bold")  # fmt: skip
    norm = "after the model's last norm" if summary["norm"] else "without the last norm"
    text.append(f"\nVectors are read by the output embedding, {norm}.", style="not bold")
    return text


def table(summary: Mapping[str, Any]) -> RenderableType:
    """A line a layer, and what an edit's change promotes."""
    parts: list[RenderableType] = [heading(summary), Text()]
    found = right_aligned(
        "layer", "shallow\n%", "semantic\n%", "without\nlast %", "without\nfirst %", "agreement\n%", "chance\n%",
        "active\n%", "alone\n%", "residual\nwins %", "final\n%",
    )  # fmt: skip
    for layer in summary["layers"]:
        found.add_row(str(layer["layer"]), *cells(layer))
    parts += [found, *map(prose, NOTES.values())]
    if summary["edited"]:
        parts += [Text(), *_edited(summary["edited"])]
    return Group(*parts)


def cells(layer: Mapping[str, Any]) -> list[str]:
    """The numbers of a layer in percent, as in the table."""
    removed, refined = layer["removed"] or {}, layer["refinement"]
    signed = [_percent(removed.get(which), "+.0f") for which in ("last", "first")]
    rare = [_percent(layer[name], ".2f") for name in ("agreement", "chance")]
    return [
        *(_percent(layer[name]) for name in ("shallow", "semantic")),
        *signed,
        *rare,
        *(_percent(layer["composition"][name]) for name in ("active", "alone")),
        *(_percent(refined[name]) for name in ("residual", "final")),
    ]


def _percent(share: float | None, form: str = ".0f") -> str:
    return "–" if share is None else f"{100 * share:{form}}"


def _edited(edited: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    found = plain_table("layer", "fact", "read at", "what the edit adds there promotes")
    for layer in edited:
        for fact in layer["facts"]:
            found.add_row(
                str(layer["layer"]), Text(told_fact(fact["request"])), Text(repr(fact["token"])),
                Text(tokens(fact["change_promotes"], TOLD)),
            )  # fmt: skip
    sizes = ", ".join(f"layer {layer['layer']}: {100 * layer['size']:.2g} %" for layer in edited)
    return [found, prose(f"Size of the change, in norms of the matrix: {sizes}.")]


def told_fact(request: Mapping[str, Any]) -> str:
    prompt = request["prompt"].replace("{}", request["subject"] or "", 1)
    return one_line(f"{prompt} → {bare(request['target_new'])}")


def tokens(promoted: Sequence[tuple[str, float]], count: int | None = None) -> str:
    """`' piano' 31 %, ' organ' 9 %`"""
    return ", ".join(f"{token!r} {100 * share:.2g} %" for token, share in promoted[:count])
