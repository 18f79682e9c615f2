"""`doctor`: what a model is like, whether each method works on it, and a file for `conf/model/`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from edit_cli.config import catalog
from edit_cli.config.by_depth import KEYS, first_layers
from edit_cli.config.composed import Composed, composed
from edit_cli.config.users import tuned_file, with_tuned
from edit_cli.console import ConsoleMonitor
from edit_cli.editors.base import Context, Method
from edit_cli.edits import store
from edit_cli.errors import EditCliError, RejectedRequest, UsageError
from edit_cli.experiment.attempt import attempt
from edit_cli.experiment.job import Job, Outcome
from edit_cli.experiment.plan import Plan
from edit_cli.experiment.run_directory import ran_out_of_memory
from edit_cli.experiment.setup import load_model, method_of, refuse_missing
from edit_cli.files.disk import require_file, write_keeping
from edit_cli.files.paths import expanded
from edit_cli.lm.anatomy import described
from edit_cli.lm.layout import LayoutOptions
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.requests import Case, EditRequest

TRIED = EditRequest("{} is in the city of", "The Eiffel Tower", "Rome")
DIGITS = 2


def run(job: Job, monitor: ConsoleMonitor) -> Outcome:
    top, options = job.config.settings, job.config.model
    refuse_missing(job, options)
    if top.out is not None:
        require_file(expanded(top.out), f"out={top.out}")
    names = top.methods if top.methods is not None else [entry.name for entry in catalog.entries("method")]
    if unknown := [name for name in names if name not in {entry.name for entry in catalog.entries("method")}]:
        raise UsageError(f"methods: there is no method {unknown[0]}: `edit-cli ls methods` lists them")
    lm = load_model(options, monitor)
    screen = monitor.screen
    for topic, sentence in described(lm):
        screen.line(f"{topic + ':':<12}{sentence}")
    request = lm.head.trying(TRIED)
    screen.line(f"{'tried with:':<12}{request.words} → {request.target_new}")
    bits = lm.fingerprint()
    with monitor.task("methods", len(names)) as advance:
        for name in names:
            screen.line(f"{name + ':':<16}{_verdict(job, lm, name, request)}")
            advance(1)
    if lm.fingerprint(lm.weight_names) != bits:
        screen.line("NOT RESTORED: the model's weights are other ones than before; please report which method did it")
    text = model_file(options, lm)
    if top.out is None:
        screen.line("")
        for line in text.splitlines():
            screen.line(line)
    else:
        file = expanded(top.out)
        if earlier := write_keeping(file, text, f"out={top.out}"):
            screen.note(f"{file} held something else, which is kept as {earlier}")
        screen.line(f"model: {file}")
    return Outcome(0)


def _verdict(job: Job, lm: LM, name: str, request: EditRequest) -> str:
    """How one method did, or why it could not be tried, in a line."""
    began = time.monotonic()
    try:
        method, settings = chosen(job, lm, name)
        method.editor.refuse_kind(lm.head.kind, lm.name)
        method.editor.refuse_layout(method.config, lm.layout, lm.name)
        context = Context(train_command=lambda: f"edit-cli train-editor method={name} {_named(job)}")
        method.require(lm.name, context)
        if job.config.settings.methods is None and method.editor.takes_long:
            return f"not tried: {method.editor.takes_long}; methods=[{name}] tries it"
        told = examined(lm, method, context, request, name)
    except (EditCliError, RejectedRequest) as reason:
        return f"not tried: {reason}"
    except Exception as error:  # whatever goes wrong with one method says nothing of the next
        while lm.attached:
            lm.detach()
        why = "out of memory" if ran_out_of_memory(error) else f"{type(error).__name__}: {error}"
        return f"FAILED: {why}"
    return f"{told}; {settings}; {time.monotonic() - began:.0f} s"


def _named(job: Job) -> str:
    """The model, as the command line names it."""
    model = job.choices["model"]
    return f"model={model}" if model != "hf" else f"model=hf model.id={job.config.model.id}"


def examined(lm: LM, method: Method, context: Context, request: EditRequest, name: str) -> str:
    """One edit, taken back, saved and loaded."""
    pair = [(request.text, request.target_new)]
    before = lm.loglikelihood(pair)[0].nll
    editor = method.begin(lm, context)
    editor.warm_up()
    done = attempt(editor, [Case("doctor", (request,), ())])
    if done.edit is None:
        return f"FAILED: {next(iter(done.rejected.values()))}"
    touched = done.edit.touches(lm)
    bits = lm.fingerprint(touched)
    with TemporaryDirectory(prefix="edit-cli-") as folder:
        store.save(done.edit, Path(folder) / "edit", lm, [request], {"name": name})
        after = _attached(lm, lambda: done.edit, pair)
        undone = lm.fingerprint(touched) == bits and lm.loglikelihood(pair)[0].nll == before
        same = _attached(lm, lambda: store.load(Path(folder) / "edit", lm), pair) == after
    took = "took" if after < before and math.exp(-after) > 0.5 else "likelier" if after < before else "DID NOT TAKE"
    return ", ".join(
        (
            f"{took} (P {math.exp(-before):.{DIGITS}f} to {math.exp(-after):.{DIGITS}f})",
            "undo bit-exact" if undone else "UNDO IS NOT EXACT",
            "save and load exact" if same else "LOADED, IT SAYS SOMETHING ELSE",
        )
    )


def _attached(lm: LM, make: Callable[[], Any], pair: Sequence[tuple[str, str]]) -> float:
    with lm.edited(make()):
        return lm.loglikelihood(pair)[0].nll


def chosen(job: Job, lm: LM, name: str) -> tuple[Method, str]:
    """The method with the settings that a run would have, C = I where it would need second moments; and where its
    layers come from.

    Raises:
        UsageError: a setting is missing that no published one tells.
    """
    options: ModelOptions = job.config.model
    found = _composed(name, job.choices["model"], options)
    user = with_tuned(found.node, name, ())
    model = job.choices["model"]
    published = catalog.conf_dir() / "tuned" / name / f"{model}.yaml"
    first = {key: value for key, value in first_layers(name, lm.layout.depth).items() if found.lacks(f"method.{key}")}
    found.fill("method", first)
    source = "settings by relative depth" if first else "its defaults"
    if published.is_file():
        source = f"conf/tuned/{name}/{model}.yaml"
    if user is not None:
        source = str(tuned_file(name, options.name))
    if found.has("method.use_covariance"):
        found.node.method.use_covariance = False
        source += ", tried with C = I"
    method = method_of(found.node.method)
    names = {field.name for field in fields(method.config)}
    given = {key: getattr(method.config, key) for key in KEYS if key in names}
    layers = [f"{key}={value}" for key, value in given.items() if value not in (None, [])]
    return method, f"{' '.join(layers)}{' ' if layers else ''}({source})"


def _composed(name: str, model: str, options: ModelOptions) -> Composed:
    values = {"model.name": options.name, "model.id": options.id, "model.made_for": None}
    return composed("edit", {"method": name, "model": model, "corpus": "embedded"}, values)


def model_file(options: ModelOptions, lm: LM) -> str:
    """The model as a file of `conf/model/`, or of `DIR/model/` with --config-dir DIR."""
    config = lm.model.config
    told = ("model_type", "num_hidden_layers", "hidden_size", "depths", "hidden_sizes")
    made_for = {key: getattr(config, key) for key in told if getattr(config, key, None) is not None}
    settings: dict[str, Any] = {"name": options.name, "id": options.id, "made_for": made_for}
    plain = replace(ModelOptions(options.name, options.id), dtype=replace(options, dtype="auto").settled().dtype)
    for key in ("revision", "kind", "dtype", "device_map", "quantize", "labels", "batch_tokens"):
        if getattr(options, key) != getattr(plain, key):
            settings[key] = getattr(options, key)
    if options.layout != LayoutOptions():
        settings["layout"] = {key: value for key, value in asdict(options.layout).items() if value is not None}
    total = sum(parameter.numel() for parameter in lm.model.parameters())
    example = "method=memit dataset=counterfact" if lm.head.kind == "causal" else "method=lookup dataset=NAME"
    head = (
        f"# {options.name} ({total / 1e6:,.0f} M parameters)\n"
        f"#   edit-cli evaluate {example} model={options.name} limit=100\n"
        "_target_: edit_cli.lm.loading.ModelOptions\n"
    )
    return head + yaml.safe_dump(settings, sort_keys=False, default_flow_style=None)


def plan(job: Job, monitor: ConsoleMonitor) -> Plan:
    """What `run` would do, before it costs anything."""
    plan = Plan(job)
    plan.needs(partial(refuse_missing, job, job.config.model))
    if (out := job.config.settings.out) is not None:
        plan.needs(partial(require_file, expanded(out), f"out={out}"))
    plan.model()
    names = job.config.settings.methods
    every = "every method that applies, but for those that take far longer than an edit should"
    plan.say("tried", every if names is None else ", ".join(names))
    plan.unknown.append("how long the edits take that are tried")
    return plan
