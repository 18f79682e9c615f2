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
        held: list[set[str]] = [set() for _ in edits]
        first: dict[str | None, int] = {None: 0}  # of each subject: no edit before has room for it; None: for any
        spare = []
        for case in order:
            subjects = {request.subject for request in case.requests if request.subject}
            start = max(first.get(subject, 0) for subject in (None, *subjects))
            rest = range(start, len(edits))
            place = next((i for i in rest if len(edits[i]) < self.size and not held[i] & subjects), len(edits))
            if len(subjects) == 1:
                first[next(iter(subjects))] = place + 1
            if place == len(edits):
                spare.append(case)
                continue
            edits[place].append(case)
            held[place] |= subjects
            while first[None] < len(edits) and len(edits[first[None]]) == self.size:
                first[None] += 1
        for edit in edits:
            while len(edit) < self.size:
                edit.append(spare.pop())
        return edits
