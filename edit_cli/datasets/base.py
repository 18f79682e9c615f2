"""What every dataset is: a `Source` whose `load` gives a `Dataset` of cases.

A new source is one file with a subclass that says how one raw row becomes a `Case`, and one YAML in conf/dataset.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from edit_cli.config.schema import Config, FilePath, Linked, Mark, Natural, Seed
from edit_cli.datasets.records.files import File, Remote, download, locate
from edit_cli.datasets.records.reading import Content, read
from edit_cli.datasets.records.rows import Dropped, Fault, Row
from edit_cli.errors import MissingError, UsageError
from edit_cli.monitor import Monitor
from edit_cli.requests import Case, with_join
from edit_cli.wording import many
from edit_cli.writing import bare

Chosen = tuple[Row, Case]
Knows = Callable[[Sequence[Case]], list[bool]]
"""Of each case, whether a model gives its true answers."""
WINDOW = 100  # cases of which a model is asked at once whether it knows them
REPORTED = 20  # dropped records that are named one by one; the rest are counted by reason


@dataclass(frozen=True)
class Dataset:
    """The cases of a run, and where they came from."""

    name: str
    cases: tuple[Case, ...]
    source: str  # what was read: a path, an address, "embedded world, split test"
    sha256: str  # of the file
    total: int  # records in the file (of this split) before anything was dropped or selected
    dropped: tuple[Dropped, ...]
    limit: int | None
    offset: int
    shuffle_seed: int | None
    split: str | None
    labels: tuple[str, ...] | None = None  # what a classifier must be able to answer; None: the targets are texts
    as_text: str | None = None  # the setting that puts them as texts, where there is one
    prompts: str = "texts"  # what prompts are: texts or images
    known: dict[str, Any] | None = None  # of those that were asked whether the model knows them: how many it does
    forms: dict[str, Any] | None = None  # in which they are edited and asked, where not all is plain text (lm/chat.py)

    def refuse_unfit(self, labels: Sequence[str] | None, model: str, reads: str = "texts") -> None:
        """Refuse a model of the wrong kind before it is asked anything.

        labels: those that it tells apart; None if it writes text. reads: what its prompts are.

        Raises:
            UsageError: images are put to a model that reads texts, or the other way round; labels are asked of a model
                that writes text, text of one that only knows labels, or labels of another name.
        """
        if self.prompts != reads:
            raise UsageError(
                f"dataset={self.name} holds {self.prompts}, and {model} reads {reads}: choose another model or data set"
            )
        known = {label.casefold() for label in labels or ()}
        if self.labels is None:
            if labels and not any(
                bare(request.target_new).casefold() in known for case in self.cases for request in case.requests
            ):
                has = f"{model} only chooses a label ({', '.join(labels)})"
                raise UsageError(f"dataset={self.name} asks for texts, and {has}: give it claims to judge")
            return
        wanted = ", ".join(self.labels)
        if labels is None:
            remedy = "give it to a classifier" + (
                f", or put its claims as questions: {self.as_text}" if self.as_text else ""
            )
            raise UsageError(
                f"dataset={self.name} asks for a label ({wanted}), and {model} has none: it writes text; {remedy}"
            )
        if lacking := [label for label in self.labels if label.casefold() not in known]:
            raise UsageError(
                f"dataset={self.name} asks for a label ({wanted}), and {model} has others: {', '.join(labels)} (not"
                f" {lacking[0]}); if they mean the same, name them alike by model.labels"
            )

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(case.id for case in self.cases)

    @property
    def passed(self) -> int:
        """Usable records up to the last one that was considered."""
        return self.offset + (len(self.cases) if self.known is None else self.known["asked"])

    @property
    def references(self) -> dict[str, Any]:
        """{case id: reference texts} of the cases that have some."""
        return {case.id: case.references for case in self.cases if case.references}

    def describe(self) -> dict[str, Any]:
        """What a run stores about its data (JSON-able). `ids_sha256` is over the selected ids, one a line, in order."""
        return {
            "name": self.name,
            "source": self.source,
            "sha256": self.sha256,
            "records_total": self.total,
            "records_dropped": len(self.dropped),
            "records_selected": len(self.cases),
            "limit": self.limit,
            "offset": self.offset,
            "shuffle_seed": self.shuffle_seed,
            "split": self.split,
            "ids_sha256": hashlib.sha256("\n".join(self.ids).encode()).hexdigest(),
            **({"known": self.known} if self.known else {}),
            **({"forms": self.forms} if self.forms else {}),
        }


@dataclass(frozen=True)
class Source(Config, ABC):
    """Where cases come from and which of them are used.

    Selection keeps the order of the file unless it is shuffled or given by ids.
    """

    place = "dataset"

    name: str
    """What the data are called in the run's path and its tables."""
    _: KW_ONLY
    path: FilePath | None = None
    """FILE, https://… or hub:owner/name[:file]; null: the records that come with edit-cli or the model, else the
    published file."""
    published: Remote | None = None
    """The published file, fetched once into cache_dir, on first use."""
    split: str | None = None
    """Which split is used; null: of an embedded file test, of all others every record; all: every record."""
    ids: Annotated[list[str], Mark.DISTINCT] = field(default_factory=list)
    """Records by their ids, in this order; instead of offset and shuffle_seed."""
    offset: Natural = 0
    """Usable records to skip."""
    shuffle_seed: Seed | None = None
    """Shuffle before offset and limit; null keeps the order of the file."""
    known: bool = False
    """Edit only facts whose true answer the unedited model gives; limit counts these."""
    known_by: Literal["reply", "rank"] = "reply"
    """What that means: the answer is in what the model writes (reply), or its first choice token by token (rank)."""
    join: Literal["none", "space"] | None = None
    """What stands between prompt and answer; null: what the characters that meet ask for (docs/datasets.md)."""
    cache_dir: Annotated[FilePath, Linked("${cache_dir}")] = "~/.cache/edit-cli"
    """Where downloads are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ids and (self.offset or self.shuffle_seed is not None):
            raise UsageError("dataset.ids names the records; leave out dataset.offset and dataset.shuffle_seed")

    expects: ClassVar[str]  # the fields of a record, for the message about a file that holds something else
    fields: ClassVar[frozenset[str]]  # fields that may occur; others are reported as ignored
    id_fields: ClassVar[tuple[str, ...]] = ("case_id", "id")  # under which a record's own id may stand
    # train, validation and test, which share no subject: editors can be trained on it
    has_splits: ClassVar[bool] = False
    prompts: ClassVar[str] = "texts"  # or images
    as_text: ClassVar[str | None] = None  # the setting that makes texts of labels, for models that write

    @abstractmethod
    def case(self, row: Row) -> Case:
        """One case. Raises `Fault` where the row cannot be used."""

    def locate(self, monitor: Monitor) -> File:
        """The file to read: the user's, or the published one."""
        if self.path is not None:
            return locate(self.path, self.cache_dir, monitor, "dataset.path")
        if self.published is None:
            raise UsageError(f"dataset {self.name} needs a file: dataset.path=FILE ({self.expects})")
        return download(self.published, self.cache_dir, monitor, "dataset.path")

    def read(self, file: File) -> Content:
        """The raw rows of the file."""
        return read(file.path, file.label, self.fields, self.expects)

    def split_of(self, row: Row) -> str | None:
        """The split that a row belongs to: what its field `split` says, None without it."""
        return str(row.values["split"]) if row.has("split") else None

    def usable(self, records: Sequence[Chosen]) -> list[Chosen]:
        """Those of the records without a fault that are to be used, in order: a source may leave some out for what
        the others are.
        """
        return list(records)

    def complete(self, chosen: Sequence[Chosen], pool: Sequence[Chosen], file: File, monitor: Monitor) -> list[Case]:
        """Add what is costly to look up, to the selected cases only.

        pool: all usable records of the split, in the order of the file.
        """
        return [case for _, case in chosen]

    def answer_labels(self, cases: Sequence[Case]) -> tuple[str, ...] | None:
        """The labels that targets are names of, or None where they are texts. cases: all that can be used."""
        return None

    def load(
        self,
        limit: int | None = None,
        monitor: Monitor | None = None,
        split_key: str = "dataset.split",
        knows: Knows | None = None,
    ) -> Dataset:
        """Read, validate, select. Records that cannot be used are dropped and reported; `limit` counts the others.

        split_key: the setting that names the split, for messages. knows: asked of the selected ones where `known` is
        set.

        Raises:
            UsageError: a limit or selection that makes no sense.
            MissingError: no file, a file of another format, or no usable record in it.
        """
        if limit is not None and limit <= 0:
            raise UsageError(f"limit={limit}: give a number of records above 0, or null for all of them")
        if self.known and knows is None:
            raise UsageError("dataset.known=true is for commands that edit facts: leave it out here")
        monitor = monitor or Monitor()
        with monitor.task("reading data", None):
            return self._load(limit, monitor, split_key, knows if self.known else None)

    def _load(self, limit: int | None, monitor: Monitor, split_key: str, knows: Knows | None) -> Dataset:
        file = self.locate(monitor)
        _refuse_damaged(file)
        content = self.read(file)
        split = None if self.split == "all" else self.split or file.split
        rows = self._of_split(content, split, file.label, split_key)
        usable, dropped = self._cases(rows)
        if not usable:
            first = f"; {dropped[0]}" if dropped else ""
            raise MissingError(
                f"{file.label} holds no usable record: expected {self.expects}{first}{self._other_fields(rows)}"
            )
        self._report(rows, dropped, monitor)
        usable = self.usable(usable)
        candidates, known = self._select(list(usable), dropped), None
        if knows is None:
            chosen = candidates[:limit]
        else:
            chosen, known = self._known(candidates, limit, knows)
        cases = tuple(with_join(case, self.join) for case in self.complete(chosen, usable, file, monitor))
        _tell_repeated(self.name, cases, monitor)
        source = f"{file.label}, split {split}" if split else file.label
        selection = (limit, self.offset, self.shuffle_seed, split)
        return Dataset(
            self.name,
            cases,
            source,
            content.sha256,
            len(rows),
            tuple(dropped),
            *selection,
            self.answer_labels([case for _, case in usable]),
            self.as_text,
            self.prompts,
            known,
        )

    def _known(
        self, candidates: Sequence[Chosen], limit: int | None, knows: Knows
    ) -> tuple[list[Chosen], dict[str, Any]]:
        """(the first `limit` that the model knows, what was asked for that): whole windows, so that a fact is asked in
        the same company whatever the limit.

        Raises:
            UsageError: records without true answers, or none that the model knows.
        """
        if not any(case.right or any(request.target_true for request in case.requests) for _, case in candidates):
            raise UsageError(
                f"dataset.known=true: {self.name} names no true answers (target_true), so it cannot be told which facts"
                " the model knows"
            )
        found: list[Chosen] = []
        asked = 0
        for start in range(0, len(candidates), WINDOW):
            window = candidates[start : start + WINDOW]
            asked += len(window)
            verdicts = knows([case for _, case in window])
            found += [one for one, known in zip(window, verdicts, strict=True) if known]
            if limit is not None and len(found) >= limit:
                break
        if not found:
            raise UsageError(
                f"dataset.known=true: the model knows none of the {asked:,} facts of {self.name} that it was asked"
                f" (dataset.known_by={self.known_by})"
            )
        return found[:limit], {"by": self.known_by, "asked": asked, "known": len(found)}

    def _cases(self, rows: Sequence[Row | Dropped]) -> tuple[list[Chosen], list[Dropped]]:
        usable: dict[str, Chosen] = {}
        dropped: list[Dropped] = []
        for row in rows:
            if isinstance(row, Dropped):
                dropped.append(row)
                continue
            try:
                case = with_join(self.case(row), row.join(self.join))
            except Fault as fault:
                named = next((str(row.values[key]) for key in self.id_fields if row.has(key)), None)
                dropped.append(Dropped(row.where, fault.field, fault.reason, named))
                continue
            if case.id in usable:
                dropped.append(Dropped(row.where, "id", "occurs twice; the first record with it is used", case.id))
            else:
                usable[case.id] = row, case
        return list(usable.values()), dropped

    def _select(self, usable: list[Chosen], dropped: Sequence[Dropped]) -> list[Chosen]:
        if self.ids:
            by_id = {case.id: (row, case) for row, case in usable}
            if missing := [id for id in self.ids if id not in by_id]:
                reason = next((f"; {drop}" for drop in dropped if drop.id in missing), "")
                raise MissingError(f"dataset.ids: {self.name} has no usable record {', '.join(missing[:5])}{reason}")
            return [by_id[id] for id in self.ids]
        if self.shuffle_seed is not None:
            random.Random(self.shuffle_seed).shuffle(usable)
        if self.offset >= len(usable):
            raise UsageError(f"dataset.offset={self.offset}: {self.name} has {len(usable)} usable records")
        return usable[self.offset :]

    def _other_fields(self, rows: Sequence[Row | Dropped]) -> str:
        """What the first record has instead of the fields that this source knows, for a message."""
        names = next((list(row.values) for row in rows if isinstance(row, Row)), [])
        if not names or self.fields.intersection(names):
            return ""
        return f" (it has {', '.join(map(repr, names[:10]))}{', …' if len(names) > 10 else ''})"

    def _report(self, rows: Sequence[Row | Dropped], dropped: Sequence[Dropped], monitor: Monitor) -> None:
        ignored = sorted({key for row in rows if isinstance(row, Row) for key in row.values} - self.fields - {"join"})
        if ignored:
            monitor.note(
                f"{self.name}: ignored fields: {', '.join(map(str, ignored[:10]))}{', …' if len(ignored) > 10 else ''}"
            )
        if not dropped:
            return
        reasons = Counter(f"{drop.field} {drop.reason}".strip() for drop in dropped).most_common()
        counts = "; ".join(f"{reason} ({times})" for reason, times in reasons[:10])
        monitor.note(
            f"{self.name}: dropped {len(dropped):,} of {many(len(rows), 'record')}:"
            f" {counts}{'; …' if len(reasons) > 10 else ''}"
        )
        for drop in dropped[:REPORTED]:
            monitor.note(f"  dropped {drop}")
        if len(dropped) > REPORTED:
            monitor.note(f"  … and {len(dropped) - REPORTED:,} more")

    def _of_split(self, content: Content, split: str | None, label: str, key: str) -> list[Row | Dropped]:
        """The rows of that split; rows that could not be read belong to every one."""
        if split is None:
            return list(content.rows)
        splits = [self.split_of(row) if isinstance(row, Row) else None for row in content.rows]
        known = sorted({one for one in splits if one is not None})
        if not known:
            raise UsageError(f"{key}={split}: the records of {label} have no field split")
        if split not in known:
            raise UsageError(f"{key}={split}: {label} has {', '.join(known[:10])}")
        return [row for row, one in zip(content.rows, splits, strict=True) if one == split or isinstance(row, Dropped)]


def _refuse_damaged(file: File) -> None:
    """Raises MissingError: a published file is not what was published; told before what this makes of its form."""
    if file.sha256 is None:
        return
    with file.path.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != file.sha256:
        raise MissingError(f"{file.path} is a damaged copy of {file.label}: delete it to download it again")


def _tell_repeated(name: str, cases: Sequence[Case], monitor: Monitor) -> None:
    """Edits that are asked for twice, or contradict each other, are the user's to know of: methods treat them
    differently.
    """
    answers: dict[str, set[str]] = {}
    again: list[str] = []
    other: list[str] = []
    for case in cases:
        for request in case.requests:
            known = answers.setdefault(request.text, set())
            if known:
                (again if request.target_new in known else other).append(case.id)
            known.add(request.target_new)
    for ids, what in (
        (again, "again for an edit of an earlier record"),
        (other, "for another answer to the prompt of an earlier record"),
    ):
        if ids:
            monitor.note(
                f"{name}: {len(ids):,} of {len(cases):,} records {'asks' if len(ids) == 1 else 'ask'} {what} (id"
                f" {', '.join(ids[:3])}{', …' if len(ids) > 3 else ''})"
            )
