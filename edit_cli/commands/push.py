"""`push`: an edit, a checkpoint, a trained editor or statistics to a repository on the hub."""

from __future__ import annotations

from pathlib import Path

from edit_cli.console import ConsoleMonitor, Screen
from edit_cli.errors import UsageError
from edit_cli.experiment.parcel import parcel, sizes
from edit_cli.files import hub
from edit_cli.report.tables.saved import files_table
from edit_cli.wording import many, size


def run(
    directory: Path, to: str, private: bool, revision: str | None, message: str | None, update: bool, dry_run: bool
) -> int:
    """Show what goes where, and send it. dry_run: only show it."""
    address = hub.Address.parse(to, "")
    if revision is not None:
        if address.revision is not None:
            raise UsageError(f"--revision {revision}: {to} names one already")
        address = hub.Address(address.repo, revision, address.folder)
    screen, found = Screen(), parcel(directory, address)
    rows = list(sizes(found.files))
    screen.show(files_table(rows))
    seen = "a private repository" if private else "a repository"
    total = f"{many(len(rows), 'file')}, {size(sum(count for _, count in rows))}"
    screen.note(f"{found.kind} {directory}: {total}, to {address} ({'which is there' if update else seen})")
    if found.left_out:
        screen.note(f"not sent: {', '.join(found.left_out)}")
    for note in found.notes:
        screen.note(note)
    if dry_run:
        screen.note("nothing was sent (--dry-run)")
        screen.line(str(address))
        return 0
    monitor = ConsoleMonitor(screen)
    with monitor.working(), monitor.phase("send"):
        commit = hub.push(found.files, address, message or f"{found.kind} by edit-cli", private or None, update)
    screen.note(commit)
    screen.line(str(address))
    return 0
