"""Records that an editor may remember: those that the run neither edits nor asks about."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from edit_cli.datasets import Source
from edit_cli.errors import UsageError
from edit_cli.lm.chat import ALL_PLAIN, Forms
from edit_cli.monitor import Monitor
from edit_cli.requests import Case


@dataclass(frozen=True)
class OtherRecords:
    """(prompt, right answer) pairs of the splits of `source`, without the prompts of `asked`; in the form that is
    edited.

    First what the records are about, in random order; then these in other wordings (not those that are held out), and
    what must stay.
    """

    source: Source
    asked: Sequence[Case]
    seed: int = 0
    forms: Forms = ALL_PLAIN

    def __call__(self, split: str) -> list[tuple[str, str]]:
        if not self.source.has_splits:
            return []
        try:
            cases = self._put(
                replace(self.source, split=split, ids=[], offset=0, shuffle_seed=None).load(None, Monitor()).cases
            )
        except UsageError:  # the file lacks this split
            return []
        random.Random(self.seed).shuffle(cases)
        found = [(r.text, case.right_or(r.target_true)) for case in cases for r in case.requests]
        probes = [(case, probe) for case in cases for probe in case.probes]
        found += [
            (probe.text, case.right_or(probe.foil))
            for case, probe in probes
            if probe.kind == "paraphrase" and probe.group != "unseen"
        ]
        found += [(probe.text, probe.target) for _, probe in probes if probe.kind == "locality"]
        taken = self._taken
        return [(prompt, answer) for prompt, answer in dict.fromkeys(found) if answer and prompt not in taken]

    def others(self) -> list[Case]:
        """Records of the training split, else of what the run's own are from, whose prompts are not in `asked`."""
        whole = replace(self.source, ids=[], offset=0, shuffle_seed=None)
        try:
            cases = (replace(whole, split="train") if whole.has_splits else whole).load(None, Monitor()).cases
        except UsageError:  # the file has no training split
            cases = replace(whole, split="all").load(None, Monitor()).cases
        taken = self._taken
        return [case for case in self._put(cases) if not any(request.text in taken for request in case.requests)]

    @cached_property
    def _taken(self) -> set[str]:
        asked = self._put(self.asked)
        taken = {request.text for case in asked for request in case.requests}
        return taken | {probe.text for case in asked for probe in case.probes}

    def _put(self, cases: Sequence[Case]) -> list[Case]:
        """The cases in the form that is edited."""
        return list(map(self.forms.only_edited().case, cases))
