"""The records of a run: chosen, known to the model if only such facts are wanted, and in the forms in which they are
edited and asked. All before the run's directory is opened, since they are part of what makes a run the same run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from edit_cli.datasets import Dataset, Source
from edit_cli.datasets.base import WINDOW
from edit_cli.errors import MissingError
from edit_cli.experiment.job import Job
from edit_cli.experiment.setup import load_model, refuse_missing
from edit_cli.files.json_files import read_json, to_json, write_json
from edit_cli.files.paths import expanded
from edit_cli.files.shapes import checked
from edit_cli.lm.chat import CHAT, ChatOptions, Forms, forms
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.lm.model_files import resolve
from edit_cli.metrics import knowledge
from edit_cli.monitor import Monitor
from edit_cli.requests import Case
from edit_cli.wording import many


@dataclass(frozen=True)
class Records:
    """What a run edits and asks about.

    source: where the records come from. found: the chosen ones, as the data have them. lm: the model, where it had to
    be asked which facts it knows.
    """

    source: Source
    found: Dataset
    forms: Forms
    lm: LM | None = None

    @property
    def dataset(self) -> Dataset:
        """The chosen records in the forms of the run."""
        return replace(self.found, cases=tuple(self.put(self.found.cases)), forms=self.forms.told())

    def put(self, cases: Iterable[Case]) -> list[Case]:
        """Cases in the forms of the run."""
        return [self.forms.case(case) for case in cases]


def records_of(job: Job, monitor: Monitor, given: Dataset | None = None) -> Records:
    """The records of a job. given: a data set that is there already.

    Raises:
        As `Source.load` and `forms`; of facts that must be known, as `refuse_missing` and `ModelOptions.load`, too.
    """
    source: Source = job.config.dataset
    chosen = forms_of(job.config.model, job.config.protocol)
    if given is not None:
        return Records(source, given, chosen)
    knowing = None
    if source.known:
        refuse = partial(refuse_missing, job, job.config.model, job.config.method)
        length = job.config.protocol.observe.max_new_tokens if source.known_by == "reply" else None
        knowing = Knowing(job, chosen, monitor, source.known_by, length, refuse)
    found = source.load(job.config.settings.limit, monitor, knows=knowing)
    if found.known and not job.config.settings.dry_run:
        asked, known = found.known["asked"], found.known["known"]
        monitor.note(f"{source.name}: the model knows {known:,} of {many(asked, 'fact')} that it was asked")
    return Records(replace(source, known=False), found, chosen, knowing.lm if knowing else None)


def traceable(job: Job, monitor: Monitor, refuse: Callable[[], None]) -> Records:
    """The records of a trace: up to the one with which `limit` facts are known, since no others can be traced. A fact
    is known if its true answer is the model's first choice.

    refuse: raises what can be told before the model is loaded. Raises as `records_of`.
    """
    source: Source = job.config.dataset
    limit, found = job.config.settings.limit, source.load(None, monitor)
    if limit is None or limit >= len(found.cases):
        return Records(source, found, Forms())
    knowing = Knowing(job, Forms(), monitor, "rank", None, refuse)
    count = _reaching(limit, knowing, found.cases)
    return Records(source, replace(found, cases=found.cases[:count], limit=count), Forms(), knowing.lm)


def _reaching(limit: int, knowing: Knowing, cases: Sequence[Case]) -> int:
    """How many of the cases it takes for `limit` known ones; all, if there are not as many."""
    known = 0
    for start in range(0, len(cases), WINDOW):
        for place, verdict in enumerate(knowing(cases[start : start + WINDOW]), start + 1):
            known += verdict
            if known == limit:
                return place
    return len(cases)


def forms_of(model: ModelOptions, chat: ChatOptions) -> Forms:
    """The forms of a run, from the model's files alone. Raises as `forms`."""
    if chat.chat == "none" and CHAT not in (chat.asked or ()):
        return Forms()
    stops = model.stops() if chat.chat == "auto" else []
    return forms(chat, model.tokenizer(), (model.name, model.id), stops)


class Verdicts(TypedDict):
    """What a file of the cache holds: whom it is about, and of each question whether its answer is known."""

    about: dict[str, Any]
    known: dict[str, bool]


class Knowing:
    """Asks the job's model which facts it knows, and keeps the answers in the cache, so that it need not be loaded for
    them again. A fact is known in the form in which it would be edited.

    by: the rule. max_new_tokens: of a reply, for the rule of that name. refuse: raises what can be told before the
    model is loaded. lm: the model, once it was needed.
    """

    def __init__(
        self,
        job: Job,
        chosen: Forms,
        monitor: Monitor,
        by: str,
        max_new_tokens: int | None,
        refuse: Callable[[], None],
    ) -> None:
        self.job, self.forms, self.monitor = job, chosen.only_edited(), monitor
        self.by, self.max_new_tokens, self.refuse = by, max_new_tokens, refuse
        self.lm: LM | None = None
        self.about = {
            "model": _identity(job.config.model),
            "rule": {"by": by, "max_new_tokens": max_new_tokens},
        }
        name = hashlib.sha256(to_json(self.about).encode()).hexdigest()[:24]
        self.file = expanded(job.config.settings.cache_dir) / "known" / f"{name}.json"
        self.known: dict[str, bool] = job.process_group.broadcast(self._kept())

    def __call__(self, cases: Sequence[Case]) -> list[bool]:
        questions = [self.forms.case(knowledge.question(case)) for case in cases]
        keys = list(map(_key, questions))
        if self.job.config.settings.dry_run:  # which loads nothing: what was not asked yet is taken as known
            return [self.known.get(key, True) for key in keys]
        if not self.known.keys() >= set(keys):  # all again: in other company, answers differ in their last bits
            self.lm = self.lm or self._loaded()
            with self.monitor.phase("ask what is known"):
                found = knowledge.known(self.lm, questions, self.by, self.max_new_tokens or 1)
            self.known |= dict(zip(keys, found, strict=True))
            if self.job.process_group.is_main:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.file, {"about": self.about, "known": self.known})
        return [self.known[key] for key in keys]

    def _loaded(self) -> LM:
        self.refuse()
        return load_model(self.job.config.model, self.monitor, self.job.process_group)

    def _kept(self) -> dict[str, bool]:
        with suppress(MissingError):  # nothing yet, or damaged: then it is asked again
            return dict(checked(read_json(self.file), Verdicts, self.file)["known"])
        return {}


def _key(question: Case) -> str:
    """Of what is asked and which answers are right, whatever data it comes from."""
    asked = [[probe.text, probe.target, *probe.aliases] for probe in question.probes]
    return hashlib.sha256(to_json(asked).encode()).hexdigest()[:24]


def _identity(model: ModelOptions) -> dict[str, Any]:
    """What tells a model from others without reading its weights: the hub's commit, or the files of a folder by their
    sizes and dates.
    """
    source = resolve(model.id, model.revision)
    folder = Path(source.path)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    own = {key: asdict(model)[key] for key in ("dtype", "quantize", "kind", "labels", "beams")}
    return {"id": source.path, "revision": source.revision, "files": stats, **own}
