"""General ability along a run: each state of the model is asked once, and what it said is kept in the run's folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edit_cli.experiment.job import Job
from edit_cli.files.json_files import read_json, write_json
from edit_cli.files.shapes import checked
from edit_cli.lm.model import LM
from edit_cli.metrics.downstream.flips import State, summary
from edit_cli.metrics.downstream.harness import Harness
from edit_cli.metrics.downstream.options import DownstreamOptions
from edit_cli.wording import many

FOLDER = "downstream"
AGAIN = "delete it, and run the same command again"


class GeneralAbility:
    """What of a run asks downstream tasks; nothing, where none are chosen."""

    def __init__(self, options: DownstreamOptions, run: Path) -> None:
        self.harness, self.folder = Harness(options), run / FOLDER
        self.wanted = bool(options.downstream)

    def require(self, job: Job) -> None:
        """Refuse what cannot be asked, before the model is loaded. Raises as `Harness.require`."""
        if self.wanted:
            model = job.config.model
            self.harness.require(model.read_kind(), model.name)

    @property
    def untold(self) -> list[str]:
        """What nobody knows before it is done."""
        return ["how long downstream tasks take"] if self.wanted else []

    def lacks(self, lm_group: Any, edits: int) -> bool:
        """Whether the model with so many facts edited has not been asked yet; all processes are told the same."""
        return self.wanted and not lm_group.broadcast(self._file(edits).exists())

    def ask(self, lm: LM, edits: int) -> None:
        """Ask the model as it is now, with so many facts edited, unless that has been done.

        Raises:
            MissingError: as `Harness.ask`, or the file cannot be written.
        """
        if not self.lacks(lm.process_group, edits):
            return
        began = time.perf_counter()
        with lm.monitor.phase("ask downstream tasks"):
            items = self.harness.ask(lm)
        seconds = round(time.perf_counter() - began, 3)
        if lm.process_group.is_main:
            self.folder.mkdir(exist_ok=True)
            write_json(self._file(edits), State(edits=edits, seconds=seconds, items=items))
            count = sum(map(len, items.values()))
            lm.monitor.note(
                f"{many(count, 'item')} of downstream tasks with {many(edits, 'fact')} edited: {seconds:.0f} s"
            )

    def _file(self, edits: int) -> Path:
        return self.folder / f"{edits:06d}.json"


def downstream_of(run: Path) -> dict[str, Any]:
    """The part of summary.json about downstream tasks, from the files of a run; empty where there are none.

    Raises:
        MissingError: a file is damaged.
    """
    files: Sequence[Path] = sorted((run / FOLDER).glob("[0-9]*.json"))
    found = summary([checked(read_json(file), State, file, AGAIN) for file in files])
    return {"downstream": found} if found else {}
