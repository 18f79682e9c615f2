"""Sources whose records serve as each other's locality prompts, and are split so that no two splits share a subject."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Annotated, Any, ClassVar

from annotated_types import Len

from edit_cli.config.schema import Natural, NonNegative, Seed
from edit_cli.datasets.base import Chosen, Source
from edit_cli.datasets.records.files import File
from edit_cli.datasets.records.reading import Content
from edit_cli.datasets.records.rows import Dropped, Fault, Row
from edit_cli.datasets.subjects import split_of
from edit_cli.errors import UsageError
from edit_cli.monitor import Monitor
from edit_cli.requests import Case, Probe
from edit_cli.writing import joined

SPLITS = ("train", "validation", "test")
TRIES = 20  # candidates that are looked at for each one wanted: those whose subject is edited in this run come last


@dataclass(frozen=True)
class Pooled(Source):
    """A source that draws locality prompts from its own records.

    What is drawn for a record does not depend on which others were selected, but for one thing: subjects that this run
    edits are avoided where there are others.
    """

    has_splits: ClassVar[bool] = True
    _: KW_ONLY
    shares: Annotated[list[NonNegative], Len(3, 3)] = field(default_factory=lambda: [0.8, 0.1, 0.1])
    """Of train, validation and test, for files without a field split; a subject falls into one of them by its hash."""
    locality: Natural = 2
    """Prompts of each group whose answers must stay, drawn from other records: another subject, the same relation,
    something else about the same subject; 0: none."""
    seed: Seed = 0
    """Of everything that is drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(self.shares) <= 0:
            raise UsageError(f"dataset.shares={self.shares}: give those of {', '.join(SPLITS)}, such as [0.8,0.1,0.1]")

    @abstractmethod
    def about(self, row: Row) -> str:
        """Whom a record is about. Raises `Fault` where that cannot be told."""

    def relation(self, row: Row, case: Case) -> str | None:
        """What a record asks of its subject, where that can be told: its field `relation`, or the prompt without its
        subject.
        """
        if row.has("relation"):
            return row.phrase("relation")
        request = case.requests[0]
        return None if request.subject is None else request.prompt

    def asked(self, row: Row, case: Case) -> tuple[str, str | None]:
        """The prompt and the right answer with which the record serves others as a locality prompt."""
        request = case.requests[0]
        return request.text, request.target_true

    def split_of(self, row: Row) -> str | None:
        named = super().split_of(row)
        if named is not None:
            return named
        try:
            return split_of(self.about(row), self.shares, SPLITS)
        except Fault:  # to be reported with one of them
            return SPLITS[row.index % len(SPLITS)]

    def _of_split(self, content: Content, split: str | None, label: str, key: str) -> list[Row | Dropped]:
        rows = [row for row in content.rows if isinstance(row, Row)]
        if split in SPLITS and rows and all(self.split_of(row) != split for row in rows):
            how = (
                "by their field split"
                if any(row.has("split") for row in rows)
                else f"by subject, dataset.shares={self.shares}"
            )
            raise UsageError(
                f"{key}={split} is empty: none of the {len(rows):,} records of {label} falls into it ({how})"
            )
        return super()._of_split(content, split, label, key)

    def complete(self, chosen: Sequence[Chosen], pool: Sequence[Chosen], file: File, monitor: Monitor) -> list[Case]:
        if not self.locality:
            return [case for _, case in chosen]
        own = [self.entry(row, case) for row, case in chosen]
        drawn = _Pool(self.others(pool, monitor), {entry.subject for entry in own})
        cases = []
        for entry, (row, case) in zip(own, chosen, strict=True):
            rng = random.Random(f"{self.seed} locality {case.id}")
            probes, brought = list(drawn.probes(entry, self.locality, rng)), self.brought(row)
            if brought:
                probes = [probe for probe in probes if probe.group != "random"] + brought
            cases.append(replace(case, probes=(*case.probes, *probes)))
        return cases

    def brought(self, row: Row) -> list[Probe]:
        """Unrelated prompts that a record brings itself; other records stand in for them where it brings none."""
        return []

    def others(self, pool: Sequence[Chosen], monitor: Monitor) -> list[Entry]:
        """What locality prompts are drawn from: all records of the split."""
        return [self.entry(row, case) for row, case in pool]

    def entry(self, row: Row, case: Case) -> Entry:
        """The record as a locality prompt for others."""
        prompt, target = self.asked(row, case)
        target = None if target is None else joined(target, row.join(self.join))  # as the case's own answers are
        aliases = case.right[1:] if case.right[:1] == (target,) else ()
        return Entry(self.about(row).casefold(), self.relation(row, case), prompt, target, aliases)

    def drawn(self, row: Row, what: str) -> random.Random:
        """A generator for what is drawn for one record: the same on every machine, whatever else is drawn."""
        return random.Random(f"{self.seed} {what} {row.index}")


@dataclass(frozen=True)
class Entry:
    """A record as a locality prompt for others. aliases: other answers that are right."""

    subject: str
    relation: str | None
    prompt: str
    target: str | None
    aliases: tuple[str, ...] = ()

    def probe(self, group: str) -> Probe:
        return Probe("locality", self.prompt, self.target, aliases=self.aliases, group=group)


class _Pool:
    """Entries by what they share. edited: subjects to be avoided."""

    def __init__(self, entries: Sequence[Entry], edited: set[str]) -> None:
        self.entries, self.edited = entries, edited
        self.by_subject: dict[str, list[Entry]] = defaultdict(list)
        self.by_relation: dict[str | None, list[Entry]] = defaultdict(list)
        for entry in entries:
            self.by_subject[entry.subject].append(entry)
            self.by_relation[entry.relation].append(entry)

    def probes(self, own: Entry, count: int, rng: random.Random) -> Iterator[Probe]:
        """Locality probes for one record: up to `count` of each group, fewer where there are none."""
        yield from self._some(
            "random", self.entries, lambda one: one.subject != own.subject and not _same_relation(one, own), count, rng
        )
        if own.relation is not None:
            yield from self._some(
                "same_relation", self.by_relation[own.relation], lambda one: one.subject != own.subject, count, rng
            )
        same = self.by_subject[own.subject]
        yield from self._some(
            "same_subject", same, lambda one: one.prompt != own.prompt and not _same_relation(one, own), count, rng
        )

    def _some(self, group: str, among: Sequence[Entry], fits: Any, count: int, rng: random.Random) -> Iterator[Probe]:
        looked_at = [among[i] for i in rng.sample(range(len(among)), min(len(among), TRIES * count))]
        distinct = {one.prompt: one for one in looked_at if fits(one)}
        for one in sorted(distinct.values(), key=lambda one: one.subject in self.edited)[:count]:
            yield one.probe(group)


def _same_relation(one: Entry, other: Entry) -> bool:
    return one.relation is not None and one.relation == other.relation
