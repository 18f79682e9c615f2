"""In which order a training meets its cases: by its seed and the number of the epoch alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from edit_cli.requests import Case


@dataclass
class Edits:
    """The cases as a stream of edits of `size` cases each, shuffled anew every epoch; no subject twice in an edit,
    where that is possible.
    """

    cases: Sequence[Case]
    size: int
    seed: int
    _epochs: dict[int, list[list[Case]]] = field(default_factory=dict)

    @property
    def per_epoch(self) -> int:
        return len(self.cases) // self.size

    def __getitem__(self, number: int) -> list[Case]:
        epoch, place = divmod(number, self.per_epoch)
        if epoch not in self._epochs:
            self._epochs = {epoch: self._epoch(epoch)}
        return self._epochs[epoch][place]

    def _epoch(self, epoch: int) -> list[list[Case]]:
        order = random.Random(f"{self.seed}/{epoch}").sample(list(self.cases), len(self.cases))
        if self.size == 1:
            return [[case] for case in order]
        edits: list[list[Case]] = [[] for _ in range(self.per_epoch)]
        spare = []
        for case in order:
            fits = next(
                (edit for edit in edits if len(edit) < self.size and not _subjects(edit) & _subjects([case])), None
            )
            (spare if fits is None else fits).append(case)
        for edit in edits:
            while len(edit) < self.size:
                edit.append(spare.pop())
        return edits


def _subjects(cases: Sequence[Case]) -> set[str]:
    return {request.subject for case in cases for request in case.requests if request.subject}
