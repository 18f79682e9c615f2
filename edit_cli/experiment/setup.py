"""What commands begin with: typed settings of all parts, what is missing for them, and the model."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from edit_cli import assets
from edit_cli.config.build import UNPUBLISHED, made_of, target_class
from edit_cli.config.by_depth import first_layers
from edit_cli.config.composed import Composed
from edit_cli.config.overrides import override_key
from edit_cli.distributed import SINGLE, ProcessGroup
from edit_cli.editors.base import Context, Editor, Examples, Method
from edit_cli.editors.meta.base import TrainableEditor
from edit_cli.errors import MissingError, UsageError
from edit_cli.experiment.job import Job, RunConfig
from edit_cli.experiment.training_command import training_command
from edit_cli.files.paths import expanded
from edit_cli.lm.heads.kinds import KINDS
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.lm.model_files import EMBEDDED
from edit_cli.metrics.judge import JudgeOptions
from edit_cli.monitor import Monitor


def configured(composed: Composed) -> RunConfig:
    """All settings of a run as typed objects, of the groups that its command works with.

    Raises:
        UsageError: names the first key that is wrong. MissingError: as `ModelOptions.read_kind`.
    """
    settings = composed.settings
    try:
        settings.refuse(composed)
        _refuse_key_of_a_file(composed)
        return _made(composed, settings)
    except UsageError as error:
        if UNPUBLISHED not in str(error):
            raise
        raise UsageError(f"{error}{_layers_to_begin_with(composed)}") from None


def _refuse_key_of_a_file(composed: Composed) -> None:
    """Which of the user's secrets is sent to a judge, no file may say (UsageError)."""
    key = f"{JudgeOptions.place}.key"
    if composed.has(key) and key not in map(override_key, composed.overrides):
        raise UsageError(f"{key} names an environment variable, which no file may: give {key}=NAME on the command line")


def _made(composed: Composed, settings: Any) -> RunConfig:
    def made(group: str, make: Callable[[Composed], Any] | None = None) -> Any:
        if group not in settings.parts:
            return None
        return composed.part(group) if make is None else make(composed)

    model, plain = made("model", _model), composed.plain
    if model is not None:
        plain = plain | {"model": plain["model"] | {"dtype": model.dtype}}
    return RunConfig(
        settings=settings,
        model=model,
        method=made("method", _method),
        dataset=made("dataset"),
        protocol=made("protocol"),
        stats=made("stats"),
        plain=plain,
    )


def _model(composed: Composed) -> ModelOptions:
    """With the dtype that `auto` stands for here. One that was given a name of its own is another than the chosen one,
    whatever else it shares with it.
    """
    options: ModelOptions = composed.part("model").settled()
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


def _layers_to_begin_with(composed: Composed) -> str:
    """The rest of the line about a method without layers: a first range, and what finds better ones."""
    method, options = composed.choices["method"], composed.part("model")
    ways = (
        f"`edit-cli tune method={method} model=…` searches, and `edit-cli trace model=…` shows where the model's facts"
        " are"
    )
    with suppress(MissingError, UsageError):  # without its files, nothing is known of its depth
        if (outline := options.outline) is not None and (first := first_layers(method, outline.depth)):
            words = " ".join(f"'method.{key}={value}'".replace(", ", ",") for key, value in first.items())
            return (
                f". Published for other models, by relative depth, would be {words} of its {outline.depth} layers: a"
                f" place to begin, not tried on this model; {ways}"
            )
    return f"; {ways}"


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
    dense: str | None = None,
) -> None:
    """Refuse what can be told to be missing or unfit before a model is loaded, which may take long.

    dense: what only a model without experts can be right for, in words.

    Raises:
        OutOfMemory: the model is larger than the memory that is free.
        MissingError: the model's files, a text, statistics, a trained network or a library are not there; says how to
            do without.
        UsageError: the model is another than the chosen one, lacks a layer, or is of a kind that the method cannot
            work on.
    """
    kind, outline = options.read_kind(), options.outline
    if dense is not None and outline is not None:
        outline.layout.refuse_experts(dense, options.name)
    if hasattr(job.config.protocol, "observe"):
        perplexity_texts(options)
        job.config.protocol.observe.judge.require()
    if method is None:
        return
    method.editor.refuse_kind(kind, options.name)
    if outline is not None:
        method.editor.refuse_layout(method.config, outline.layout, options.name)
    if training and issubclass(method.editor, TrainableEditor):
        method.editor.require_training(method.config)
    else:
        method.require(options.name, context or Context())
    options.refuse_what_cannot_fit()


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
