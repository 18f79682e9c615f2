"""A run as it lies on disk: found, read, and held against what the program counts on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edit_cli.errors import MissingError
from edit_cli.files.json_files import read_json, read_lines
from edit_cli.files.lock import is_locked
from edit_cli.runs.format import check_lines, check_manifest, check_summary
from edit_cli.wording import many

FORMAT = 2
MANIFEST, RESULTS, SUMMARY, LOG, EDITS = "manifest.json", "results.jsonl", "summary.json", "log.txt", "edits"
UNREADABLE = "unreadable"  # status of a run of which a file is damaged


@dataclass(frozen=True)
class RunRecord:
    """A run as it lies on disk. A status of "unreadable" comes with an "error" that says what is missing."""

    path: Path
    manifest: dict[str, Any]

    @property
    def status(self) -> str:
        """started (a process is writing to it), success, failed, interrupted or unreadable."""
        recorded = self.manifest["status"]
        return "interrupted" if recorded == "started" and not is_locked(self.path) else recorded

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """Lines of results.jsonl; one that is still being written is left out."""
        return lines_of(self.path, self.manifest)[0]

    @cached_property
    def summary(self) -> dict[str, Any] | None:
        """summary.json, or None for a run that has not come so far, or cannot be read."""
        if self.manifest["status"] == UNREADABLE or not (self.path / SUMMARY).exists():
            return None
        summary = read_json(self.path / SUMMARY)
        check_summary(self.manifest, summary, self.path / SUMMARY)
        return summary

    @property
    def lost(self) -> int:
        """How many of the lines that the summary was made of are no longer there."""
        return max((self.summary or {}).get("lines", 0) - len(self.lines), 0)


def read_run(path: Path | str, whole: bool = True) -> RunRecord:
    """The run at `path`. whole: refuse one that has lost lines since its summary was made.

    Raises:
        MissingError: there is no run, or a part of it cannot be read; names the file.
    """
    record = RunRecord(Path(path), manifest_of(Path(path)))
    _ = record.lines, record.summary  # what cannot be read is told now, not in the middle of a report
    if whole and (lost := record.lost):
        raise MissingError(
            f"{record.path / RESULTS} is damaged: {many(lost, 'line')} that the summary counts"
            f" {'is' if lost == 1 else 'are'} torn or gone; the same command makes them again, or start with"
            " overwrite=true"
        )
    return record


def list_runs(root: Path | str) -> list[RunRecord]:
    """All runs below `root`, by path. Those that cannot be read are listed as such.

    Raises:
        MissingError: `root` is no directory.
    """
    if not Path(root).is_dir():
        raise MissingError(f"{root} is no directory: no run has been made there")
    return list(_walk(Path(root)))


def _walk(directory: Path) -> Iterator[RunRecord]:
    if not (directory / MANIFEST).exists():
        for part in sorted(directory.iterdir()):
            if part.is_dir() and not part.is_symlink():
                yield from _walk(part)
        return
    try:
        yield RunRecord(directory, manifest_of(directory))
    except MissingError as error:
        yield RunRecord(directory, {"status": UNREADABLE, "error": str(error)})


def lines_of(path: Path, manifest: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """(lines of results.jsonl, byte at which the last whole one ends)."""
    lines, end = read_lines(path / RESULTS)
    check_lines(manifest, lines, path / RESULTS)
    return lines, end


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest of the run at `path`.

    Raises:
        MissingError: there is none, or it cannot be read.
    """
    if not (path / MANIFEST).exists():
        raise MissingError(f"{path} holds no run: {MANIFEST} is missing")
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise MissingError(
            f"{path / MANIFEST}: format {FORMAT} is what this version reads; run again with overwrite=true"
        )
    check_manifest(manifest, path / MANIFEST)
    return manifest
