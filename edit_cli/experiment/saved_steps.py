"""The edits of a sequence on disk: a directory a step, and now and then the sum of all of them, so that the weights of
earlier steps can go.

A step that changes a whole matrix would otherwise leave a copy of it, a thousand steps a thousand. Whatever moment the
process is killed at, what lies there leads back to the same bits.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edit_cli.editors.base import Editor
from edit_cli.editors.memory.base import MemoryLayer, MemoryPatch
from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import Edit, WeightDelta, WeightState
from edit_cli.edits.store import STATE
from edit_cli.errors import MissingError
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest


@contextmanager
def naming(folder: Path, what: str) -> Iterator[None]:
    """A step that is damaged stands in the way of all that come after it: say what to delete."""
    try:
        yield
    except MissingError as error:
        raise MissingError(f"{error}: delete {folder}, and the same command makes {what} again") from None


@dataclass
class SavedSteps:
    """directory: of the run's edits.

    room: the edits may take so many times the room of what they change; null: all are kept whole.

    start: the last step that is taken up from a state, −1 for none.
    """

    directory: Path
    lm: LM
    editor: Editor[Any]
    room: float | None
    start: int = -1
    _since: int = 0  # bytes of the weights that were saved after the latest state
    _touched: dict[str, str] = field(default_factory=dict)  # hashes of what the edits change, before any of them

    def __post_init__(self) -> None:
        last = max((number for number, _ in self._saved("")), default=-1)
        usable = [number for number, _ in self._saved(STATE) if number <= last - self.editor.looks_back]
        self.start = self.lm.process_group.broadcast(max(usable, default=-1))
        if self.lm.process_group.is_main:
            self._tidy()

    def path(self, number: int) -> Path:
        """Of a step's edit."""
        return self.directory / f"{number:05d}"

    def state_path(self, number: int) -> Path:
        """Of the sum of all edits up to a step."""
        return self.directory / f"{STATE}{number:05d}"

    def saved(self, number: int) -> bool:
        return self.lm.process_group.broadcast((self.path(number) / edit_store.MANIFEST).exists())

    def read(self, number: int) -> tuple[Edit | None, dict[str, Any]]:
        """(what is to be attached, how it was made) of a saved step, whose editor is told of it.

        Up to `start` nothing is attached but the sum.

        Raises:
            MissingError: it is damaged; says what to delete.
        """
        if number > self.start:
            with naming(self.path(number), "that step"):
                made = edit_store.made_of(self.path(number))
                edit = edit_store.load(self.path(number), self.lm)
                self.editor.recall(edit)
            self._count(number)
            return edit, made
        with naming(self.directory, "all steps"):
            made = edit_store.made_of(self.path(number))
            if not self.editor.looks_back:
                self.editor.recall(edit_store.remains(self.path(number), self.lm))
            if number < self.start:
                return None, made
            self._touched = edit_store.read_manifest(self.state_path(number))["touched"]
            return edit_store.load(self.state_path(number), self.lm), made

    def save(
        self,
        number: int,
        edit: Edit,
        requests: Sequence[EditRequest],
        method: Mapping[str, Any],
        undone: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a step's edit; call it before the edit is attached. undone: as of `edit_store.save`."""
        if self.lm.process_group.is_main:
            if isinstance(edit, WeightDelta):
                edit = replace(edit, by_fact={})  # no fact is taken out of a step that others stand on
            edit_store.save(edit, self.path(number), self.lm, requests, dict(method), undone=undone)
            self._count(number)

    def attached(self, number: int, method: Mapping[str, Any]) -> None:
        """The step's edit is in place: where the edits have outgrown their room, their sum is saved and the earlier
        ones are let go.
        """
        if self.room is None or not self.lm.process_group.is_main:
            return
        size = _size(self.lm)
        if not size or self._since <= self.room * size:
            return
        state = _sum(self.lm)
        touched = {name: self._touched[name] for name in state.touches(self.lm)}
        edit_store.save(state, self.state_path(number), self.lm, [], dict(method), touched=touched)
        self._since = 0
        self._let_go(number - self.editor.looks_back)

    def _count(self, number: int) -> None:
        for name, digest in edit_store.read_manifest(self.path(number))["touched"].items():
            self._touched.setdefault(name, digest)
        with suppress(FileNotFoundError):
            self._since += (self.path(number) / edit_store.TENSORS).stat().st_size

    def _let_go(self, latest: int) -> None:
        """Delete what the newest state up to `latest` makes needless."""
        needed = max((number for number, _ in self._saved(STATE) if number <= latest), default=-1)
        for number, path in self._saved(""):
            if number <= needed:
                edit_store.let_go(path, self.state_path(needed).name)
        for number, path in self._saved(STATE):
            if number < needed:
                (path / edit_store.MANIFEST).unlink()  # first, so that half of it counts for nothing
                shutil.rmtree(path)

    def _tidy(self) -> None:
        """Finish what a killed process had begun to delete."""
        for path in self.directory.glob(f"{STATE}*"):
            if not (path / edit_store.MANIFEST).exists():
                shutil.rmtree(path)
        if self.start >= 0:
            with naming(self.directory, "all steps"):
                self._let_go(self.start)

    def _saved(self, prefix: str) -> Iterator[tuple[int, Path]]:
        """(step, directory) of the steps, or of the states, that are there."""
        for path in sorted(self.directory.glob(f"{prefix}[0-9]*")):
            number = path.name.removeprefix(prefix)
            if number.isdigit() and (path / edit_store.MANIFEST).exists():
                yield int(number), path


def _memory(lm: LM) -> tuple[MemoryPatch, MemoryLayer] | None:
    """The latest edit and the memory that it added to, if the attached edits are a memory."""
    patches = [edit for edit in lm.attached if isinstance(edit, MemoryPatch)]
    if not patches or len(patches) < len(lm.attached):
        return None
    return patches[-1], patches[-1].present(lm, patches[-1].module)


def _weights(lm: LM) -> list[str]:
    """Names of what the attached edits change, if all of them change weights."""
    edits = lm.attached
    return (
        sorted({name for e in edits for name in e.touches(lm)})
        if all(e.kind == WeightState.kind for e in edits)
        else []
    )


def _size(lm: LM) -> int:
    """Bytes of the sum of all attached edits; 0 where there is no smaller one than the edits themselves."""
    if found := _memory(lm):
        return found[1].bytes
    return sum(4 * math.prod(lm.access(name).shape) for name in _weights(lm))


def _sum(lm: LM) -> Edit:
    """All attached edits as one on the unedited model, where `_size` says that there is one."""
    if found := _memory(lm):
        return found[0].whole(lm)
    return WeightState.present(lm, _weights(lm))
