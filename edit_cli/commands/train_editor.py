"""`train-editor`: train the network of an editor that has one, and keep it where `evaluate`, `edit` and `sequential`
find it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from edit_cli.console import ConsoleMonitor
from edit_cli.datasets import Dataset
from edit_cli.editors.meta import checkpoints
from edit_cli.editors.meta.base import TrainableConfig, TrainableEditor
from edit_cli.errors import MissingError, UsageError
from edit_cli.experiment.base import Experiment, Line, Summary
from edit_cli.experiment.job import Job, Outcome
from edit_cli.experiment.plan import Plan
from edit_cli.experiment.run_directory import run_path
from edit_cli.experiment.setup import context_of, refuse_missing
from edit_cli.files.disk import require_folder
from edit_cli.files.paths import expanded
from edit_cli.lm.model import LM
from edit_cli.report import learning
from edit_cli.runs.record import read_run
from edit_cli.runs.run import Run
from edit_cli.training.loop import KEY, Training, refuse_too_few
from edit_cli.training.sharding import wanted_by_launcher
from edit_cli.training.state import State
from edit_cli.training.zero import stage_of_launcher
from edit_cli.wording import many


def run(job: Job, monitor: ConsoleMonitor) -> Outcome:
    return TrainEditor(job, monitor).conduct()


class TrainEditor(Experiment):
    KEY = KEY
    COMPLETE = "this editor has been trained already (overwrite=true trains it again)"

    def __init__(self, job: Job, monitor: ConsoleMonitor) -> None:
        fsdp, self.zero = wanted_by_launcher(), stage_of_launcher()
        top, source, config = job.config.settings, job.config.dataset, job.config.method.config
        if not isinstance(config, TrainableConfig):
            raise UsageError(f"method={job.choices['method']} learns nothing ahead of time: evaluate it right away")
        if config.checkpoint is not None:
            raise UsageError(
                "method.checkpoint names a trained editor; leave it out to train one (run_dir=DIR and cache_dir=DIR"
                " say where it goes)"
            )
        cases = replace(source, split=top.splits.train).load(top.limit, monitor, "splits.train")
        self.held_out = replace(source, split=top.splits.validation).load(None, monitor, "splits.validation")
        refuse_too_few(config, len(cases.cases), len(self.held_out.cases))
        # what is learned goes there: better to know now than after hours
        require_folder(expanded(config.cache_dir), f"cache_dir={top.cache_dir}")
        super().__init__(job, monitor, cases)
        self.steps = config.training.steps
        if fsdp:
            config = replace(config, training=replace(config.training, fsdp=True))
            self.method = replace(self.method, config=config)

    def details(self) -> dict[str, Any]:
        return {"cases": len(self.dataset.cases), "validation": len(self.held_out.cases)}

    def check(self) -> None:
        refuse_missing(self.job, self.model, self.method, self.context, training=True)

    def belongs(self) -> Callable[[Any], bool]:
        return lambda identity: isinstance(identity[0], int) and 1 <= identity[0] <= self.steps

    def is_complete(self) -> bool:
        return self.is_summarized()

    def refuse_unfit(self, lm: LM) -> None:
        super().refuse_unfit(lm)
        self.held_out.refuse_unfit(getattr(lm.head, "labels", None), lm.name, lm.head.READS)

    def work(self, lm: LM) -> None:
        editor: Any = self.begin(lm)
        run = self.run
        stamp = f"{run.manifest['started']} {run.manifest['config_hash']}"
        training = Training(editor, self.dataset.cases, self.held_out.cases, run.path, stamp, self._write, self.zero)
        done = training.run()
        if isinstance(run, Run):
            found = {"step": done.step, "metrics": done.best}
            place = _keep(editor, done.net, self.dataset, found, self.settings.seed)
            summary = learning.summary_of(
                run.manifest, run.lines(), seconds=self.timer.take(), found=found, checkpoint=str(place)
            )
            if self.settings.figures:
                learning.draw(summary, run.path)
            run.write_summary(summary)
            State(run.path, stamp).clear()

    def _write(self, line: Line) -> None:
        if self.run.identity(line) not in self.run.finished:  # a training that goes on tells some again
            self.run.append(line)

    def summary(self, lines: Sequence[Line]) -> Summary:
        return read_run(self.run.path).summary or {}

    def leave(self, summary: Summary, lines: Sequence[Line]) -> list[str]:
        drawn = [f"curves: {self.run.path / learning.NAME}.png"] if self.settings.figures else []
        return [f"editor: {summary['checkpoint']}", *drawn]

    def exit_code(self, summary: Summary, lines: Sequence[Line]) -> int:
        return 0


def _keep(editor: TrainableEditor[Any, Any], net: Any, data: Dataset, found: dict[str, Any], seed: int) -> Path:
    """Write the checkpoint to the cache."""
    import torch

    from edit_cli import __version__

    lm, identity = editor.lm, editor.identity()
    about = {
        **identity,
        "model": {"name": lm.name, "id": lm.id, "revision": lm.revision},
        "dataset": {"name": data.name, "source": data.source, "sha256": data.sha256, "cases": len(data.cases)},
        **found,
        "seed": seed,
        "versions": {"edit-cli": __version__, "torch": torch.__version__},
    }
    folder = expanded(editor.config.cache_dir)
    place = checkpoints.place(folder, identity, type(editor).__name__.lower(), data.name, lm.name)
    place.parent.mkdir(parents=True, exist_ok=True)
    with suppress(MissingError):  # there is none, or a damaged one
        before = checkpoints.read_about(place)["dataset"]
        if before != about["dataset"]:
            lm.monitor.note(
                f"this replaces an editor of the same settings that was trained on"
                f" {many(before['cases'], 'case') if 'cases' in before else 'other cases'}"
                f" ({before.get('source', before['name'])})"
            )
    checkpoints.save(place, net, about)
    return place


def plan(job: Job, monitor: ConsoleMonitor) -> Plan:
    """What `run` would do, before it costs anything."""
    top, method, source = job.config.settings, job.config.method, job.config.dataset
    if not (isinstance(method.config, TrainableConfig) and issubclass(method.editor, TrainableEditor)):
        raise UsageError(f"method={job.choices['method']} learns nothing ahead of time: evaluate it right away")
    training, plan = method.config.training, Plan(job)
    cases = replace(source, split=top.splits.train).load(top.limit, monitor, "splits.train")
    held_out = replace(source, split=top.splits.validation).load(None, monitor, "splits.validation")
    refuse_too_few(method.config, len(cases.cases), len(held_out.cases))
    plan.facts(cases.cases, cases.source)
    plan.say("validated on", f"{min(training.validation_edits, len(held_out.cases)):,} edits of {held_out.source}")
    edits = training.edits * training.accumulate
    plan.say("training", f"{training.steps:,} steps of {edits:,} edits; validated every {training.validate_every:,}")
    plan.run(run_path(job, job.choices["dataset"], job.model_name), cases)
    folder = expanded(method.config.cache_dir)
    there = checkpoints.find(folder, method.editor.kind(method.config))
    known = f", such as {there[0][0].name}" if there else ""
    plan.say("editors", f"{many(len(there), 'trained one')} of these settings in {folder}{known}")
    plan.needs(partial(refuse_missing, job, job.config.model, method, context_of(job), training=True))
    plan.model()
    plan.unknown.append("how large the editor's network is on this model, and so the time and memory of a step")
    return plan
