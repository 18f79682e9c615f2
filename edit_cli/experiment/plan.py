"""What a command is going to do, and what it will cost, before it costs anything: `--dry-run`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from edit_cli.config.identity import differences
from edit_cli.console import ConsoleMonitor, duration
from edit_cli.editors.base import Method
from edit_cli.editors.cost import Cost
from edit_cli.errors import EditCliError, MissingError
from edit_cli.experiment.base import Experiment
from edit_cli.experiment.cost import Asked, Work
from edit_cli.experiment.job import Job, Outcome
from edit_cli.experiment.run_directory import identity
from edit_cli.experiment.setup import perplexity_texts
from edit_cli.files.disk import require_place
from edit_cli.lm.memory import free, taken
from edit_cli.lm.outline import Outline
from edit_cli.report.tables.facts import arrow
from edit_cli.requests import Case
from edit_cli.runs.record import LOG, MANIFEST, read_run
from edit_cli.wording import many, size

Line = tuple[str, str]


@dataclass
class Plan:
    """Lines of (topic, sentence), and what is summed up below them.

    unknown: what cannot be told without doing it.
    """

    job: Job
    lines: list[Line] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    work: Work | None = None

    @classmethod
    def of(cls, whole: Experiment, batches: Sequence[Sequence[Case]] = ()) -> Plan:
        """Begun with what all experiments have."""
        plan = cls(whole.job)
        plan.facts(whole.dataset.cases, whole.dataset.source, batches)
        if whole.dataset.known:
            plan.unknown.append("which facts the model knows: what it was not asked before is counted as known here")
        plan.run(whole.path(), whole.dataset)
        plan.needs(whole.check)
        plan.model()
        return plan

    def say(self, topic: str, sentence: str) -> None:
        self.lines.append((topic, sentence))

    # --- what there is ------------------------------------------------------------------------------------------------

    def facts(self, cases: Sequence[Case], source: str, batches: Sequence[Sequence[Case]] = ()) -> None:
        """What is edited, in which batches, and the first of it."""
        told = f"{many(len(cases), 'record')} of {source}"
        if batches:
            largest = max(map(len, batches))
            most = "up to " if len(batches) > 1 else ""
            told += f", in {many(len(batches), 'batch', 'batches')} of {most}{largest:,}"
        self.say("facts", told)
        request = next((request for case in cases for request in case.requests), None)
        if request is not None:
            was = f" (now: {request.target_true.strip()})" if request.target_true else ""
            self.say("the first", f"{arrow(asdict(request))}{was}")

    def run(self, path: Path, dataset: Any = None) -> None:
        """Where the run lies, and what the command would make of what is there."""
        self.say("run", f"{path}: {standing(self.job, path, dataset)}")
        self.needs(partial(require_place, path, f"run_dir={path}"))

    def model(self) -> Outline | None:
        """The model, and whether it fits."""
        options = self.job.config.model
        outline = options.outline
        if outline is None:
            self.unknown.append("size and layout of this model, whose code makes it only with its weights")
            return None
        device = options.target
        kind = ", mixture of experts" if outline.layout.has_experts else ""
        self.say(
            "model",
            f"{options.name}: {outline.parameters:,} parameters in {options.quantize or options.dtype},"
            f" {many(outline.depth, 'layer')} of width {outline.layout.width:,}{kind};"
            f" {size(outline.bytes)} on {device or options.device_map}",
        )
        if slow := options.emulated():
            self.say("slow", slow)
        if not outline.reads_text:
            self.unknown.append("time and memory of a model that reads no text")
        elif device is not None:
            self.work = Work(outline, options.tokenizer(), device, options.batch_tokens)
        else:
            self.unknown.append("time and memory of a model that is spread over devices")
        return outline

    def needs(self, check: Callable[[], None]) -> None:
        """What is missing or unfit, as the command itself would refuse it by `check`."""
        try:
            check()
        except EditCliError as error:
            self.say("REFUSED", str(error))

    def moments(self, store: Any, layers: Sequence[int]) -> None:
        """Second moments that are there, and what those that are missing take."""
        model = self.job.config.model
        if store.import_npz:
            self.say("second moments", f"layers {_listed(layers)}: read from {store.import_npz}")
            return
        there = [layer for layer in layers if store.found(model.name, layer)]
        if there:
            place = store.folder(model.name)
            self.say("second moments", f"layers {_listed(there)}: there, if they are of these weights (in {place})")
        missing = [layer for layer in layers if layer not in there]
        if not missing:
            return
        widths = [self.work.outline.key_width(layer) for layer in missing] if self.work is not None else []
        units = ((store.documents, "documents"), (store.tokens, "tokens"))
        limits = " or ".join(f"{count} {unit}" for count, unit in units if count is not None) or "all of it"
        room = f"; {size(sum(m * m * 8 for m in widths))} of files, and as much host memory" if widths else ""
        told = f"layers {_listed(missing)}: missing, one pass over {store.corpus.label} ({limits}){room}"
        self.say("second moments", told)
        if self.work is None:
            return
        tokens = 10 * max(widths) if store.tokens == "auto" else store.tokens
        work, host = self.work, sum(m * m * 8 for m in widths)
        share = (max(missing) + 1) / work.outline.depth

        def seconds(count: float) -> float:
            sums = sum(2 * count * m * m for m in widths) / work.many_rows
            return work.passes(count * share, 0, count / store.batch_tokens) + sums

        if tokens is None:
            self.unknown.append(
                f"how many tokens {store.documents or 'all'} documents of the text have: each million takes about"
                f" {duration(seconds(1e6))}"
            )
        work.add("second moments", seconds(tokens or 0), host + work.states(store.batch_tokens))

    def editing(self, method: Method, batches: Sequence[Sequence[Case]]) -> None:
        """What the edits take, as far as the method can tell, and what has to be there before the first one."""
        if (first := method.editor.beforehand(method.config)) is not None:
            self.say("beforehand", f"{self.job.choices['method']} {first}")
        if self.work is None:
            return
        config: Any = method.config
        if getattr(config, "use_covariance", False) and (layers := getattr(config, "layers", None)):
            self.moments(config.moments, sorted(layers))
        costs: list[Cost | None] = []
        for batch in batches:
            lengths = [
                self.work.length(f"{request.text} {request.target_new}") for case in batch for request in case.requests
            ]
            costs.append(method.editor.cost(config, self.work.outline, lengths))
        known = [cost for cost in costs if cost is not None]
        if not known:
            self.unknown.append(f"how long an edit by {self.job.choices['method']} takes, and its memory")
            return
        seconds = sum(self.work.passes(cost.passes, 0, cost.steps) for cost in known)
        largest = max(known, key=lambda cost: cost.bytes)
        self.work.add(f"edits ({largest.of})", seconds, largest.bytes)

    def asking(self, when: str, cases: Sequence[Case], times: int = 1, aloud: bool = True) -> None:
        """What is asked of these cases, `times` times."""
        options = self.job.config.protocol.observe
        asked = Asked.of(cases, options)
        if aloud:
            self.say(f"asked {when}", asked.told(options) + (f", {times} times" if times > 1 else ""))
            if options.judge.model is not None and when == "before":
                self.unknown.append(f"how long {options.judge.model} takes to judge the replies")
        if self.work is not None:
            with suppress(MissingError):  # said among what is refused
                self.work.ask(f"ask {when}", asked, options, perplexity_texts(self.job.config.model), times)

    def perplexity(self, when: str, times: int) -> None:
        """It is asked so many times more: once after each batch."""
        options = self.job.config.protocol.observe
        if self.work is not None and times > 0:
            with suppress(MissingError):
                self.work.ask(f"ask {when}", Asked([], [], []), options, perplexity_texts(self.job.config.model), times)

    # --- summed up ----------------------------------------------------------------------------------------------------

    def sums(self) -> list[Line]:
        """Memory and time."""
        work = self.work
        if work is None:
            return []
        on_host = work.device.type == "cpu"
        count = self.job.config.settings.processes if on_host else 1
        own = taken() if on_host else 0
        need = count * (own + work.outline.bytes + work.peak)
        room = free(work.device)
        most = max(work.bytes, key=lambda what: work.bytes[what], default=None)
        parts = [f"weights {size(work.outline.bytes)}"]
        parts += [f"program {size(own)}"] if own else []
        parts += [f"{most} {size(work.peak)}"] if most and work.peak else []
        told = f"about {size(need)} at its peak on {work.device} ({', '.join(parts)})"
        if room is not None:
            free_there = room + own
            told += f"; {size(free_there)} are free" + ("" if need < free_there else ": IT MAY NOT FIT")
        if not work.seconds:
            return [("memory", told)]
        shown = sorted(work.seconds.items(), key=lambda item: -item[1])
        parts = [f"{what} {duration(seconds)}" for what, seconds in shown if seconds >= 0.5]
        when = f"about {duration(work.total)}" + (f" ({', '.join(parts)})" if len(parts) > 1 else "")
        return [("memory", told), ("time", f"{when}, and the model's loading")]


def show(plan: Plan, monitor: ConsoleMonitor) -> Outcome:
    """Print a plan."""
    job = plan.job
    monitor.screen.line(f"`edit-cli {job.command}` would do this; nothing was loaded or written.")
    lines = [*plan.lines, *plan.sums(), *(("not known", what) for what in plan.unknown)]
    width = max(len(topic) for topic, _ in lines) + 2
    for topic, sentence in lines:
        monitor.screen.line(f"{topic + ':':<{width}}{sentence}")
    return Outcome(0)


def standing(job: Job, path: Path, dataset: Any = None) -> str:
    """What the command would make of the run that lies at `path`."""
    if not (path / MANIFEST).exists():
        if path.is_dir() and any(part.name not in (LOG, ".lock") for part in path.iterdir()):
            return "is not empty and holds no run: refused"
        return "new"
    try:
        record = read_run(path, whole=False)
    except MissingError as error:
        return f"REFUSED: {error}"
    lines = many(len(record.lines), "line")
    if job.config.settings.overwrite:
        return f"holds {lines}, which are deleted first (overwrite=true)"
    config, ignore = identity(job, None if dataset is None else dataset.describe())
    changed = differences(record.manifest["config"], config, ignore)
    if record.manifest["command"] != job.command or changed:
        if not record.lines:
            return "new (a command that came to nothing lies there)"
        if record.manifest["command"] != job.command:
            changed = {"the command": (record.manifest["command"], job.command)}
        key, (was, now) = next(iter(changed.items()))
        return f"REFUSED: it holds a run with other settings ({key} was {was} and is {now}): tag=NAME or overwrite=true"
    if record.summary is not None and record.status == "success" and not record.lost:
        return f"complete ({lines}): its table is shown, nothing is done again"
    return f"holds {lines} of an earlier start, and goes on from there"


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
