"""`edits`: the saved edits of a run or a folder; no model is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edit_cli.console import Screen
from edit_cli.edits import store as edit_store
from edit_cli.errors import MissingError
from edit_cli.report.tables.saved import edits_table


def run(directories: Sequence[Path], every: bool, as_json: bool) -> int:
    """Print one line an edit. An edit itself is listed with those that it stands on, base first.

    every: with all of its facts.
    """
    rows, screen = [_row(path) for path in dict.fromkeys(p for each in directories for p in _below(each))], Screen()
    screen.json(rows) if as_json else screen.show(edits_table(rows, every))
    return 0


def _below(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise MissingError(f"{directory} is no folder: give an edit, a run, or a folder of runs")
    paths = edit_store.chain(directory) if (directory / edit_store.MANIFEST).exists() else sorted(_edits(directory))
    if not paths:
        raise MissingError(f"{directory} holds no saved edit")
    return paths


def _edits(directory: Path) -> Iterator[Path]:
    """Edit directories below; what an edit stands on lies inside it and is not listed again."""
    for path in directory.iterdir():
        if path.name.startswith(".") or path.is_symlink() or not path.is_dir():
            continue
        if (path / edit_store.MANIFEST).exists():
            yield path
        else:
            yield from _edits(path)


def _row(path: Path) -> dict[str, Any]:
    """What an edit says of itself. error: why it cannot be read."""
    try:
        manifest = edit_store.read_manifest(path)
    except MissingError as error:
        return {"path": str(path), "error": str(error)}
    names = (edit_store.TENSORS, edit_store.REMAINS, edit_store.BY_FACT, edit_store.MANIFEST)
    files = (path / name for name in names)
    return {
        "path": str(path),
        "id": manifest["id"],
        "kind": manifest["kind"],
        "method": manifest["method"].get("name"),
        "model": manifest["base_model"]["name"],
        "facts": manifest["requests"],
        "touched": sorted(manifest["touched"]),
        "bytes": sum(file.stat().st_size for file in files if file.exists()),
        "parent": manifest["parent"],
        "undone": manifest.get("undone"),
        "error": None,
    }
