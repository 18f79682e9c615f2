"""How mistakes are edited in sequence (T-Patcher, Huang et al., 2023). Imports nothing heavy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Len

from edit_cli.config.schema import Count, Linked, Mark, Natural, Seed
from edit_cli.errors import UsageError
from edit_cli.lm.chat import ChatOptions
from edit_cli.metrics.observe import ObserveOptions
from edit_cli.monitor import Monitor
from edit_cli.requests import Case, Probe

if TYPE_CHECKING:
    from edit_cli.datasets import Dataset, Source

EDITED = ("rewrite", "paraphrase")  # kinds of probes that the metrics need


@dataclass(frozen=True, kw_only=True)
class SmeProtocol(ChatOptions):
    """Folds of an edit set, each a stream from the unedited model, in which only what is wrong at its turn is edited,
    one at a time.
    """

    answers: Literal["written", "right"] = "written"
    """What counts as right of an edit: what it writes, or the data's own answer (true mistakes of the model)."""
    folds: Count = 3
    """The edit set is cut into so many parts at random; each is a stream that starts from the unedited model."""
    only_folds: Annotated[list[Natural], Len(1), Mark.DISTINCT] | None = None
    """Folds that are run, from 0; null: all."""
    fold_seed: Annotated[Seed, Linked("${seed}")] = 0
    """Of the cut and of the order within a fold."""
    max_edits: Count | None = None
    """Edits a fold at most; null: every mistake."""
    every: Count = 50
    """Edits after which ER, TrainR and TestR are measured; always at a fold's end, too."""
    train: Count = 300
    """Records of the training split for TrainR (10,000 as published); none of them is edited."""
    test: Count = 300
    """Records of the test split for TestR."""
    train_split: str = "train"
    """Where the former come from, if the data have splits; otherwise from records after the edited ones."""
    test_split: str = "test"
    """Where the latter come from."""
    observe: ObserveOptions = field(
        default_factory=lambda: ObserveOptions(sample=False, perplexity=False, top_tokens=0, max_new_tokens=12)
    )
    """What is asked of the model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.only_folds is not None and max(self.only_folds) >= self.folds:
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
            if whole.has_splits:
                whole = replace(whole, split=split)
            records = whole.load(None, Monitor(), f"protocol.{name}_split").cases
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
