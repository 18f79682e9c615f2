"""How a run was made: the command, protocol and data, every setting and where it comes from, versions."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from edit_cli.config.identity import flatten
from edit_cli.config.origins import COMMAND_LINE, DEFAULT, SKIPPED, TUNE
from edit_cli.config.schema import shown
from edit_cli.report.page.parts import Block, Cell, Code, Grid, Note, Rows, Section, Tone, pairs

SHARED = ("stats", "corpus")  # stand in the method's own settings, if it uses them
COPIES = (
    "method.moments",
    "dataset.published",
    "dataset.published_snippets",
    "model.made_for",
)  # groups that tell nothing of their own
LONGEST = 300  # characters of a value
ORIGINS = (
    f"Where each comes from: {COMMAND_LINE}; {TUNE}: found for this model by `edit-cli tune`; conf/…: a packaged file,"
    " of which conf/tuned/… are settings published or chosen for the model; ${KEY}: the value of that setting;"
    f" {DEFAULT}: of the program. `edit-cli show-config KIND/NAME` tells what each is for."
)
OLD = "The run was made by a version that did not write down what was typed, nor where settings come from."


def command_of(manifest: Mapping[str, Any]) -> str | None:
    """What was typed, as a shell takes it; None where that is not known."""
    arguments = manifest.get("arguments")
    return None if arguments is None else shlex.join(["edit-cli", manifest["command"], *arguments])


def made(manifest: Mapping[str, Any], summary: Mapping[str, Any] | None) -> Section:
    """Everything that another person needs to make the run again."""
    typed = command_of(manifest)
    blocks: list[Block] = [Code(typed) if typed is not None else Note(OLD)]
    about = manifest["dataset"]
    protocol = {**flatten(manifest["config"].get("protocol") or {}), **manifest["protocol"]}
    blocks += [
        pairs("Protocol", [(key.replace("_", " "), _value(value)) for key, value in protocol.items() if key != "type"]),
        pairs("Data", [(key.replace("_", " "), _value(value)) for key, value in about.items()]),
        _settings(manifest),
        pairs("Seeds", list(manifest["seeds"].items()), folded=True),
        pairs("Versions", list(_versions(manifest).items()), folded=True),
        pairs("Time and place", _spent(manifest, summary or {}), folded=True),
    ]
    changed = [
        [Cell(one["at"]), Cell(key), Cell(_value(pair[0])), Cell(_value(pair[1]))]
        for one in manifest.get("resumed", [])
        for key, pair in one.get("changed", {}).items()
    ]
    if changed:
        blocks.append(Grid(("when", "what", "was", "became"), [Rows("", changed)], "Changed when the run went on"))
    return Section("How it was made", blocks)


def _settings(manifest: Mapping[str, Any]) -> Grid:
    """Every setting, those that depart from defaults first in their group."""
    origins = manifest.get("origins", {})
    rows: dict[str, list[list[Cell]]] = {}
    for key, value in flatten(manifest["config"], SHARED).items():
        if key.rpartition(".")[2] in SKIPPED or any(f"{key}.".startswith(f"{copy}.") for copy in COPIES):
            continue
        origin = origins.get(key, DEFAULT if "origins" in manifest else "not written down")
        group = key.partition(".")[0] if "." in key else "of the command"
        tone: Tone = "quiet" if origin == DEFAULT else "good" if origin == COMMAND_LINE else ""
        rows.setdefault(group, []).append([Cell(key), Cell(_value(value)), Cell(origin, tone=tone)])
    blocks = [
        Rows(group, sorted(cells, key=lambda row: row[2].tone == "quiet"))
        for group, cells in sorted(rows.items(), key=lambda item: item[0] != "of the command")
    ]
    return Grid(("setting", "value", "where it comes from"), blocks, "Settings", [ORIGINS], folded=True)


def _versions(manifest: Mapping[str, Any]) -> dict[str, str]:
    git = manifest.get("git") or {}
    commit = {"commit": git["commit"] + (" (with changes)" if git.get("dirty") else "")} if git.get("commit") else {}
    brought = {f"plug-in {name}": version for name, version in manifest.get("plugins", {}).items()}
    return {**commit, **manifest["versions"], **brought}


def _spent(manifest: Mapping[str, Any], summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    memory = summary.get("peak_memory_bytes") or {}
    return [
        ("started", manifest.get("started")),
        ("finished", manifest.get("finished")),
        ("status", manifest["status"]),
        ("devices", ", ".join(manifest.get("devices", []))),
        ("platform", manifest.get("platform")),
        ("processes", manifest.get("processes")),
        ("threads", manifest.get("threads")),
        *((f"peak memory, {where}", f"{size / 2**30:.2f} GiB") for where, size in memory.items() if size),
        *((f"seconds, {phase}", f"{spent:,.1f}") for phase, spent in (summary.get("seconds") or {}).items()),
    ]


def _value(value: Any) -> str:
    text = f"[{', '.join(map(shown, value))}]" if isinstance(value, list) else shown(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"
