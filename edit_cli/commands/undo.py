"""`undo`: a saved edit without some of its facts, made again from what was stored, or from the facts that are left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edit_cli.config.overrides import regroup
from edit_cli.console import ConsoleMonitor, Screen
from edit_cli.editors.base import SOLVED, VALUES_KEPT
from edit_cli.edits import store as edit_store
from edit_cli.experiment.saved_edits import Base, require_new
from edit_cli.experiment.undoing import AGAIN, Undoing
from edit_cli.report.tables.facts import arrow
from edit_cli.wording import many

TOLD = {
    SOLVED: "solved again from stored keys and values, without a pass of the model",
    VALUES_KEPT: "made again with the stored values; keys were read again",
    AGAIN: "the other facts were edited again from the beginning",
}


def run(directory: Path, facts: Sequence[str], out: Path, base: Base, given: Sequence[str]) -> int:
    """Write the edit without `facts` to `out`, as an edit of its own.

    facts: numbers as `edits` counts them, subjects, or whole statements. given: settings of the method as KEY=VALUE.

    Raises:
        UsageError: no such fact, or none would be left. MissingError: the edit is damaged, or what its method needs is
            not there.
    """
    undoing, screen = Undoing.of(directory, facts), Screen()
    require_new(out)
    options = base.options(undoing.at)
    method, about = undoing.method(options.name, options.id, regroup(given))
    monitor = ConsoleMonitor(screen)
    with monitor.working():
        lm = base.load(undoing.at, monitor)
        _, way = undoing.write(lm, method, about, out)
    screen.note(f"revoked: {'; '.join(map(arrow, undoing.taken))}")
    told = f"steps from {undoing.at} on were edited again" if undoing.is_sequence else TOLD[way]
    screen.note(f"{many(len(undoing.left), 'fact')} of {undoing.count:,} left: {told}")
    for upper in undoing.above:
        count = many(len(edit_store.read_manifest(upper)["requests"]), "fact")
        screen.note(f"{upper} ({count}) lies on top of it and is not in {out}: edit it again with base_edit={out}")
    screen.line(str(out))
    return 0
