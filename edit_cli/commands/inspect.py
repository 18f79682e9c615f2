"""`inspect`: a model's feed-forward layers as key–value memories, and what an edit has changed in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edit_cli.console import ConsoleMonitor
from edit_cli.datasets import Dataset
from edit_cli.edits import store as edit_store
from edit_cli.experiment.base import Experiment, Line, Summary
from edit_cli.experiment.job import Job, Outcome
from edit_cli.experiment.plan import Plan
from edit_cli.experiment.run_directory import run_path
from edit_cli.experiment.saved_edits import weight_edits
from edit_cli.experiment.setup import refuse_missing
from edit_cli.files.paths import expanded
from edit_cli.inspection.analysis import Inspection, keys_of, layers_of
from edit_cli.lm.heads.kinds import require_causal
from edit_cli.lm.model import LM
from edit_cli.report.memories import summary_of
from edit_cli.wording import many

CANNOT = "cannot be inspected"


def run(job: Job, monitor: ConsoleMonitor) -> Outcome:
    return Inspect(job, monitor).conduct()


class Inspect(Experiment):
    KEY = ("what", "layer", "key")
    COMPLETE = "this model has been inspected already (overwrite=true does it again)"
    SHOWN_IN_SWEEPS = True

    def __init__(self, job: Job, monitor: ConsoleMonitor) -> None:
        edit = job.config.settings.edit
        self.edits = [] if edit is None else weight_edits(expanded(edit), CANNOT, "a projection")
        corpus, limit = job.config.protocol.corpus, job.config.settings.limit
        self.size = min((count for count in (limit, corpus.size()) if count is not None), default=None)
        super().__init__(job, monitor, _data(corpus, limit, corpus.size(), self.edits))

    def path(self) -> Path:
        return run_path(self.job, self.dataset.name, self.job.model_name, leaf="memories")

    def details(self) -> dict[str, Any]:
        return {"edits": [str(path) for path in self.edits]}

    def belongs(self) -> Callable[[Any], bool]:
        return lambda identity: identity[0] in ("key", "layer", "edit")

    def is_complete(self) -> bool:
        return self.is_summarized()

    def check(self) -> None:
        self.protocol.corpus.require()
        refuse_missing(self.job, self.model, dense="looking at memories")
        if (outline := self.model.outline) is not None:
            layers_of(self.protocol, outline.layout)

    def refuse_unfit(self, lm: LM) -> None:
        require_causal(lm, "looking at memories")
        layers = layers_of(self.protocol, lm.layout)
        keys_of(self.protocol, {layer: lm.key_width(layer) for layer in layers})

    def work(self, lm: LM) -> None:
        named, limit = self.settings.edit or "", self.settings.limit
        for line in Inspection(lm, self.protocol, self.edits, named, limit, self.size).lines():
            if self.run.identity(line) not in self.run.finished:
                self.write(line)

    def summary(self, lines: Sequence[Line]) -> Summary:
        return summary_of(self.run.manifest, lines, None, self.timer.take())

    def exit_code(self, summary: Summary, lines: Sequence[Line]) -> int:
        return 0


def _data(corpus: Any, limit: int | None, size: int | None, edits: Sequence[Path]) -> Dataset:
    """The text, told as every run tells its data. Another text, or another edit, is another run."""
    made = [edit_store.read_manifest(path)["id"] for path in edits]
    identity = json.dumps([corpus.identity(), made], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()
    read = 0 if size is None else size
    return Dataset(corpus.label, (), f"corpus {corpus.label}", digest, read, (), limit, 0, None, None)


def plan(job: Job, monitor: ConsoleMonitor) -> Plan:
    """What `run` would do, before it costs anything."""
    whole, options = Inspect(job, monitor), job.config.protocol
    plan = Plan(job)
    count = "all" if whole.size is None else f"{whole.size:,}"
    plan.say("text", f"{count} documents of {options.corpus.label}, in prefixes of up to {options.max_length} tokens")
    plan.run(whole.path(), whole.dataset)
    plan.needs(whole.check)
    outline = plan.model()
    if outline is None:
        return plan
    depth = len(options.layers or options.chosen or range(outline.depth))
    plan.say("memories", f"{many(depth, 'layer')}; triggers of {options.keys} keys of each, {options.examples} a key")
    if (work := plan.work) is not None:
        work.bytes["activations"] = work.states(options.batch_tokens)
    plan.unknown.append("how many tokens the documents have, and so how long it takes")
    return plan
