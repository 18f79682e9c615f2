"""How mistakes are edited in sequence (T-Patcher, Huang et al., 2023): fields == the keys of conf/protocol/sme.yaml."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from edit_cli.datasets import Dataset, Source
from edit_cli.errors import UsageError
from edit_cli.metrics.observe import ObserveOptions
from edit_cli.monitor import Monitor
from edit_cli.requests import Case, Probe

EDITED = ("rewrite", "paraphrase")  # kinds of probes that the metrics need


@dataclass(kw_only=True)
class SmeProtocol:
    """Folds of an edit set, each a stream from the unedited model, in which only what is wrong at its turn is edited,
    one at a time.

    answers: "written" (an edit's target is right) or "right" (the data's own answer is; what the model gets wrong of it
    is edited). folds, fold_seed: the random cut. only_folds: those to run. max_edits: a fold. every: edits between
    measurements of ER, TrainR, TestR. train, test, train_split, test_split: how many records TrainR and TestR ask
    about, and of which splits.
    """

    answers: str = "written"
    folds: int = 3
    only_folds: list[int] | None = None
    fold_seed: int = 0
    max_edits: int | None = None
    every: int = 50
    train: int = 300
    test: int = 300
    train_split: str = "train"
    test_split: str = "test"
    observe: ObserveOptions = field(default_factory=ObserveOptions)

    def __post_init__(self) -> None:
        if self.answers not in ("written", "right"):
            raise UsageError(f"protocol.answers={self.answers}: choose written or right")
        for name in ("folds", "every", "train", "test", "max_edits"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"protocol.{name}={value}: give a number from 1 up")
        if self.only_folds is not None and not (
            self.only_folds and all(0 <= fold < self.folds for fold in self.only_folds)
        ):
            raise UsageError(f"protocol.only_folds={self.only_folds}: give numbers of folds from 0 to {self.folds - 1}")

    def cut(self, cases: Sequence[Case]) -> dict[int, list[Case]]:
        """{fold: its cases, in the order of their turns}, of the folds that are run.

        Raises:
            UsageError: more folds than cases.
        """
        if self.folds > len(cases):
            raise UsageError(
                f"protocol.folds={self.folds} is more than the {len(cases)} records to edit: lower it, or raise limit"
            )
        order = list(cases)
        random.Random(self.fold_seed).shuffle(order)
        return {fold: order[fold :: self.folds] for fold in self.only_folds or range(self.folds)}

    def as_edited(self, case: Case) -> Case:
        """The case with the answer that counts as right as its target, and the probes that are asked.

        Raises:
            UsageError: the data's own answer is wanted and not known.
        """
        probes = tuple(probe for probe in case.probes if probe.kind in EDITED)
        if self.answers == "written":
            return Case(case.id, case.requests, probes)
        if any(case.right_or(request.target_true) is None for request in case.requests):
            raise UsageError(
                f"protocol.answers=right: record {case.id} does not tell its right answer (protocol.answers=written)"
            )
        requests = []
        for request in case.requests:
            right, other = _corrected(case, request.target_new, request.target_true)
            requests.append(replace(request, target_new=right, target_true=other))
        asked = []
        for probe in probes:
            right, other = _corrected(case, probe.target, probe.foil)
            asked.append(replace(probe, target=right, foil=other, aliases=case.right[1:]))
        return Case(case.id, tuple(requests), tuple(asked), right=case.right)

    def kept(self, source: Source, dataset: Dataset) -> tuple[list[Case], list[Case]]:
        """(training, test) records that TrainR and TestR ask about, in the data's own answers; none of them is edited.

        Raises:
            UsageError: there are none left.
        """
        edited = {case.id for case in dataset.cases}
        edited |= {request.text for case in dataset.cases for request in case.requests}
        found: list[list[Case]] = []
        for name, split, count in (("train", self.train_split, self.train), ("test", self.test_split, self.test)):
            whole = replace(source, ids=[], offset=0, shuffle_seed=None)
            records = (
                (whole.of_split(split, f"protocol.{name}_split") if whole.has_splits else whole)
                .load(None, Monitor())
                .cases
            )
            free = [
                case
                for case in records
                if case.id not in edited and case.requests and case.requests[0].text not in edited
            ]
            cases = [known(f"{name} {case.id}", case) for case in free[:count]]
            if not cases:
                raise UsageError(
                    f"protocol.{name}: no record is left that is not edited: lower limit, or edit another dataset.split"
                )
            edited |= {case.id for case in free[:count]}
            found.append(cases)
        return found[0], found[1]


def _corrected(case: Case, new: str | None, old: str | None) -> tuple[str, str | None]:
    """(right answer, what it takes the place of), of the answer that an edit writes and the one that it replaces."""
    right = str(case.right_or(old))
    return right, old if new in (case.right or (right,)) else new


def known(id: str, case: Case) -> Case:
    """A record to ask about: what was right before any edit."""
    request = case.requests[0]
    right = case.right_or(request.target_true) or request.target_new
    return Case(id, (), (Probe("rewrite", request.text, right, aliases=case.right[1:]),))
