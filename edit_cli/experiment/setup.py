"""Steps that several commands take: build the parts, load the model, edit one batch."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from edit_cli import assets
from edit_cli.config.build import made_of, target_class
from edit_cli.config.composed import Composed
from edit_cli.datasets import Dataset
from edit_cli.distributed import SINGLE, ProcessGroup
from edit_cli.editors.base import Context, Editor, Examples, Method
from edit_cli.editors.meta.base import TrainableEditor
from edit_cli.edits.diagnosis import Diagnosis
from edit_cli.edits.edit import Edit
from edit_cli.errors import MissingError, RejectedRequest, UsageError
from edit_cli.experiment.job import Job, RunConfig
from edit_cli.experiment.training_command import training_command
from edit_cli.files.paths import expanded
from edit_cli.lm.heads.kinds import KINDS
from edit_cli.lm.loading import EMBEDDED, ModelOptions
from edit_cli.lm.model import LM
from edit_cli.monitor import Monitor
from edit_cli.requests import Case, EditRequest

STATISTICS = "statistics"  # phase that is paid once a model, not once an edit


def configured(composed: Composed) -> RunConfig:
    """All settings of a run as typed objects, of the groups that its command works with.

    Raises:
        UsageError: names the first key that is wrong. MissingError: as `ModelOptions.read_kind`.
    """
    settings = composed.settings
    settings.refuse(composed)

    def made(group: str, make: Callable[[Composed], Any] | None = None) -> Any:
        if group not in settings.parts:
            return None
        return composed.part(group) if make is None else make(composed)

    return RunConfig(
        settings=settings,
        model=made("model", _model),
        method=made("method", _method),
        dataset=made("dataset"),
        protocol=made("protocol"),
        stats=made("stats"),
        plain=composed.plain,
    )


def _model(composed: Composed) -> ModelOptions:
    """One that was given a name of its own is another than the chosen one, whatever else it shares with it."""
    options: ModelOptions = composed.part("model")
    return options if options.name == composed.choices.get("model") else replace(options, made_for=None)


def _method(composed: Composed) -> Method:
    try:
        return method_of(composed.node.method)
    except UsageError:
        _refuse_kind(composed)
        raise


def method_of(node: Any) -> Any:
    """The method that a node of the configuration describes, with its settings. Raises as `build`."""
    cls = target_class(node)
    if issubclass(cls, Editor):
        return Method(cls, made_of(node, cls.Config))
    raise UsageError(f"method._target_={node._target_} is no method: name an editor, here or of a plug-in")


def context_of(job: Job, examples: Examples | None = None) -> Context:
    """What the job hands to its editors."""
    return Context(examples, partial(training_command, job))


def _refuse_kind(composed: Composed) -> None:
    """Of two reasons against a method's settings, tell the one that no setting mends: the model is of a kind that it
    cannot work on.

    Raises:
        UsageError: as `Editor.refuse_kind`.
    """
    cls, options = composed.class_of("method"), composed.part("model")
    if issubclass(cls, Editor) and len(cls.heads) < len(KINDS):
        with suppress(MissingError):  # without its files, only the settings can be told
            cls.refuse_kind(options.read_kind(), options.name)


def refuse_missing(
    job: Job,
    options: ModelOptions,
    method: Method | None = None,
    context: Context | None = None,
    training: bool = False,
) -> None:
    """Refuse what can be told to be missing or unfit before a model is loaded, which may take long.

    Raises:
        MissingError: the model's files, a text, statistics, a trained network or a library are not there; says how to
            do without. UsageError: the model is another than the chosen one, or of a kind that the method cannot work
            on.
    """
    kind = options.read_kind()
    if hasattr(job.config.protocol, "observe"):
        perplexity_texts(options)
    if method is None:
        return
    method.editor.refuse_kind(kind, options.name)
    if training and issubclass(method.editor, TrainableEditor):
        method.editor.require_training(method.config)
    else:
        method.require(options.name, context or Context())


def load_model(options: ModelOptions, monitor: Monitor, process_group: ProcessGroup = SINGLE) -> LM:
    """The model, without the chatter of the libraries that load it."""
    with monitor.phase("load model"):
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        lm = options.load(monitor, process_group)
    # libraries and model stay to the end: each collection would look through all of their objects (4 % of a mass edit)
    gc.freeze()
    return lm


def load_fitting(
    job: Job,
    options: ModelOptions,
    method: Method,
    context: Context,
    datasets: Sequence[Dataset],
    monitor: Monitor,
    training: bool = False,
) -> LM:
    """The job's model, once it is known to suit method and data: asking it anything may take hours.

    Raises:
        UsageError: it is of a kind that does not, or lacks a layer. Others as `refuse_missing` and `ModelOptions.load`.
    """
    with monitor.phase("load model"):
        refuse_missing(job, options, method, context, training)
    lm = load_model(options, monitor, job.process_group)
    method.begin(lm, context)  # refuses what it cannot work on
    for dataset in datasets:
        dataset.refuse_unfit(getattr(lm.head, "labels", None), lm.name)
    return lm


def perplexity_texts(options: ModelOptions) -> list[str]:
    """Lines of the text that goes with the model, or that `model.perplexity_text=FILE` names; none means no
    perplexity.
    """
    name = options.perplexity_text
    if name is None:
        return []
    path = assets.FOLDER / name.removeprefix(EMBEDDED) if name.startswith(EMBEDDED) else expanded(name)
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MissingError(
            f"model.perplexity_text={name} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None


@dataclass
class Attempt:
    """What came of editing some cases at once. rejected: {case id: why}. seconds: of one case, without statistics.
    diagnosis: what the edit says of how it went.
    """

    edit: Edit | None
    cases: list[Case]
    rejected: dict[str, str]
    seconds: float
    diagnosis: Diagnosis = field(default_factory=Diagnosis)

    @property
    def requests(self) -> list[EditRequest]:
        return [request for case in self.cases for request in case.requests]


def attempt(editor: Editor[Any], cases: Sequence[Case]) -> Attempt:
    """Edit all requests of `cases` at once, leaving out the cases that cannot be worked on."""
    lm = editor.lm
    rejected: dict[str, str] = {}
    for case in cases:
        try:
            for request in case.requests:
                editor.check(request)
        except RejectedRequest as error:
            rejected[case.id] = str(error)
    able = [case for case in cases if case.id not in rejected]
    result = Attempt(None, able, rejected, 0.0)
    if not able:
        return result
    began, once = time.perf_counter(), lm.monitor.seconds[STATISTICS]
    try:
        with lm.monitor.phase("edit"):
            made = editor.edit_cases(able)
        if not made.is_finite:
            raise RejectedRequest(
                "the edit came out as NaN or infinite and is not kept: give a smaller method.lr, or load the model with"
                " more digits (model.dtype=float32)"
            )
        result.edit = made
    except RejectedRequest as error:
        return Attempt(None, [], rejected | {case.id: str(error) for case in able}, 0.0)
    result.seconds = max(time.perf_counter() - began - (lm.monitor.seconds[STATISTICS] - once), 0.0) / len(able)
    result.diagnosis = made.diagnosis(lm)
    return result


class PhaseTimer:
    """Seconds by phase since they were last asked for: every line of results takes its share, so that a killed run
    keeps them.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._taken: dict[str, float] = {}

    def take(self) -> dict[str, float]:
        """{phase: seconds} since the last call."""
        now = dict(self._monitor.seconds)
        spent = {phase: round(seconds - self._taken.get(phase, 0.0), 4) for phase, seconds in now.items()}
        self._taken = now
        return {phase: seconds for phase, seconds in spent.items() if seconds > 0}
