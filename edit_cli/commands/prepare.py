"""`prepare`: records for trained editors, made of questions or claims that have only their right answers.

As KE's and MEND's authors made theirs (De Cao et al., 2021, section 4.1): what an edit writes is another beam of the
base model, so that it is an answer which the model might have given; other wordings come by way of another language,
or of templates. Those that the model answers as it answers the question itself are kept apart (`filtered_rephrases`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edit_cli.config.composed import model_called
from edit_cli.console import ConsoleMonitor
from edit_cli.datasets.base import WINDOW
from edit_cli.errors import MissingError, RejectedRequest, UsageError
from edit_cli.experiment.cost import Asked
from edit_cli.experiment.job import Job, Outcome
from edit_cli.experiment.plan import Plan
from edit_cli.experiment.settings import PrepareSettings
from edit_cli.experiment.setup import load_model, refuse_missing
from edit_cli.files.disk import flush, require_place, telling
from edit_cli.files.json_files import read_lines, to_json
from edit_cli.files.paths import expanded
from edit_cli.lm.heads.kinds import NAMES
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.metrics.observe import ObserveOptions, ask_each
from edit_cli.metrics.text import first_sentence, matches_exactly, normalize
from edit_cli.requests import Case
from edit_cli.wording import many
from edit_cli.writing import bare, spoken

LONGER = 2  # times as many tokens as a text has, a translation may have

Record = dict[str, Any]


def run(job: Job, monitor: ConsoleMonitor) -> Outcome:
    top: PrepareSettings = job.config.settings
    out = _new(top)
    dataset = job.config.dataset.load(top.limit, monitor)
    pair = [_translator(name, key) for key in ("there", "back") if (name := getattr(top, key)) is not None]
    refuse_missing(job, job.config.model)
    part = Part.of(out, _about(job), dataset.cases, anew=top.overwrite)
    lm = load_model(job.config.model, monitor)
    dataset.refuse_unfit(getattr(lm.head, "labels", None), lm.name, lm.head.READS)
    maker = Maker(lm, top, [load_model(options, monitor) for options in pair])
    left = dataset.cases[len(part.records) :]
    if part.records:
        monitor.note(f"continuing: {len(part.records):,} of {len(dataset.cases):,} records are there already")
    with monitor.task("records", len(dataset.cases)) as advance:
        advance(len(part.records))
        for start in range(0, len(left), WINDOW):
            window = left[start : start + WINDOW]
            part.append(maker.records(window))
            advance(len(window))
    kept = part.finish()
    if not job.in_sweep:
        for line in told(part.records, kept, out, claims=dataset.labels is not None):
            monitor.screen.line(line)
    return Outcome()


def _new(top: PrepareSettings) -> Path:
    """Where the file is going to lie. Raises UsageError: there is one; MissingError: it cannot lie there."""
    assert top.out is not None  # `refuse` has seen to it
    out = expanded(top.out)
    if out.exists() and not top.overwrite:
        raise UsageError(f"out={top.out}: is there already; name another file, or say overwrite=true")
    if not out.parent.is_dir():
        raise MissingError(f"out={top.out}: there is no folder {out.parent}")
    require_place(out, f"out={top.out}")
    return out


def _translator(name: str, key: str) -> ModelOptions:
    """Raises UsageError: the model does not translate. MissingError: it is not there."""
    options: ModelOptions = model_called(name, {})
    if (kind := options.read_kind()) != "seq2seq":
        raise UsageError(f"{key}={name} is {NAMES[kind]}: what translates is an encoder-decoder model")
    return options


def _about(job: Job) -> dict[str, Any]:
    """What every record is made by."""
    top, model = job.config.settings, job.config.model
    names = ("alternatives", "max_new_tokens", "templates", "there", "back", "wordings")
    own = {name: getattr(model, name) for name in ("revision", "dtype", "quantize", "beams")}
    return {"model": model.id, **own, **{name: getattr(top, name) for name in names}}


@dataclass
class Part:
    """The records that are made so far: a file beside `out`, to which whole windows are added.

    Records without anything to write stand in it, too, so that they are not asked for again.
    """

    out: Path
    file: Path
    about: dict[str, Any]
    records: list[Record]

    @classmethod
    def of(cls, out: Path, about: dict[str, Any], cases: Sequence[Case], anew: bool) -> Part:
        """What an earlier command left there, if it was made by the same settings of the same questions, whole windows
        of it: in other company, answers differ in their last bits. anew: nothing of it.
        """
        file = out.with_name(f".{out.name}.part")
        records = [] if anew else read_lines(file)[0]
        asked = [(about, case.id, case.requests[0].text) for case in cases]
        if [tuple(map(record.get, ("meta", "id", "input"))) for record in records] != asked[: len(records)]:
            records = []
        if len(records) < len(asked):
            records = records[: len(records) // WINDOW * WINDOW]
        part = cls(out, file, about, records)
        part._write(file, "w", records)
        return part

    def append(self, records: Sequence[Record]) -> None:
        made = [{**record, "meta": self.about} for record in records]
        self._write(self.file, "a", made)
        self.records += made

    def finish(self) -> list[Record]:
        """Write the file itself, with the records that have something to write; these."""
        kept = [record for record in self.records if record["alternatives"]]
        if not kept:
            self.file.unlink()  # with other settings nothing of it is taken up
            raise UsageError(
                f"none of {many(len(self.records), 'record')} has an answer to write: every beam is right, or they are"
                " too few: raise alternatives"
            )
        whole = self.out.with_name(f".{self.out.name}.new")
        self._write(whole, "w", kept)
        with telling(self.out):
            whole.replace(self.out)
            self.file.unlink()
        return kept

    def _write(self, path: Path, mode: str, records: Sequence[Record]) -> None:
        with telling(self.out):
            with path.open(mode, encoding="ascii") as file:
                file.writelines(f"{to_json(record)}\n" for record in records)
            flush(path)


@dataclass(frozen=True)
class Maker:
    """Asks the base model, and the two that translate."""

    lm: LM
    top: PrepareSettings
    translators: Sequence[LM]

    def records(self, cases: Sequence[Case]) -> list[Record]:
        """KILT's records of a window: `prediction` is the model's first beam, `alternatives` its others but the right
        ones; of a claim, the other label.
        """
        lm, top, texts = self.lm, self.top, [case.requests[0].text for case in cases]
        with lm.monitor.phase("alternatives"):
            beams = self._said(lm, texts, top.alternatives, top.max_new_tokens)
        reworded = self._reworded(cases, texts)
        with lm.monitor.phase("filter wordings"):
            asked = list(dict.fromkeys([*texts, *(text for some in reworded for text in some)]))
            given = ask_each(lm, "replies", lambda some: lm.generate(some, top.max_new_tokens), asked, len(asked))
        replies = {text: reply if isinstance(reply, str) else "" for text, reply in given.items()}
        found, labeled = [], lm.head.kind == "classifier"
        for case, text, said, others in zip(cases, texts, beams, reworded, strict=True):
            request = case.requests[0]
            right = [bare(answer) for answer in case.right] or [bare(request.target_true or request.target_new)]
            answers = [first_sentence(spoken(beam), right[0]) for beam in said]
            # a label that is right is what a wrong one is flipped to; a right answer is no other answer to write
            taken = [*([] if labeled else right), *answers[:1]]
            own = first_sentence(spoken(replies[text]), right[0])
            found.append(
                {
                    "id": case.id,
                    "input": text,
                    **({"subject": request.subject} if request.subject else {}),
                    "output": [{"answer": answer} for answer in right],
                    "prediction": answers[0] if answers else "",
                    "alternatives": _others(answers[1:], taken),
                    "rephrases": others,
                    "filtered_rephrases": [one for one in others if own and matches_exactly(replies[one], [own])],
                }
            )
        return found

    def _reworded(self, cases: Sequence[Case], texts: Sequence[str]) -> list[list[str]]:
        """Other wordings of each text: the data's own, those of templates, and those that come back."""
        own = [[probe.text for probe in case.probes if probe.kind == "paraphrase"] for case in cases]
        found = [
            [*mine, *(template.replace("{}", text) for template in self.top.templates)]
            for mine, text in zip(own, texts, strict=True)
        ]
        if self.translators:
            with self.lm.monitor.phase("translate"):
                for some, returned in zip(found, self._returned(texts), strict=True):
                    some += returned
        return [_others(some, [text]) for some, text in zip(found, texts, strict=True)]

    def _said(self, lm: LM, texts: Sequence[str], count: int, tokens: int) -> list[list[str]]:
        """The likeliest answers of a model to each text; none to one that it cannot be asked, which is told."""
        distinct = list(dict.fromkeys(texts))
        found = ask_each(lm, "beams", lambda some: lm.alternatives(some, count, tokens), distinct, len(distinct))
        for problem in (one for one in found.values() if isinstance(one, RejectedRequest)):
            self.lm.monitor.note(f"{lm.name} is not asked: {problem}")
        return [[] if isinstance(one := found[text], RejectedRequest) else one for text in texts]

    def _returned(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """What each text comes back as from the other language."""
        there, back = self.translators
        longest = LONGER * max(len(there.tokenizer(text)["input_ids"]) for text in texts)
        abroad = self._said(there, texts, self.top.wordings, longest)
        pivots = list(dict.fromkeys(text for some in abroad for text in some))
        returned = dict(zip(pivots, self._said(back, pivots, self.top.wordings, longest), strict=True))
        for some in abroad:
            yield [text for one in some for text in returned[one]]


def _others(texts: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Those that say something, and something else than what is taken, each once, in order."""
    known, found = {"", *map(normalize, taken)}, []
    for text in texts:
        if normalize(text) not in known:
            known.add(normalize(text))
            found.append(text)
    return found


def told(records: Sequence[Record], kept: Sequence[Record], out: Path, claims: bool) -> list[str]:
    """How it went, and what the file is for, in lines."""
    count = sum(len(record["alternatives"]) for record in kept)
    reworded = sum(len(record["rephrases"]) for record in kept)
    alike = sum(len(record["filtered_rephrases"]) for record in kept)
    lines = [f"{out}: {many(len(kept), 'record')}, {count / len(kept):.1f} answers to write a record"]
    if len(kept) < len(records):
        lines.append(f"left out, since no beam is a wrong answer: {len(records) - len(kept):,}")
    if reworded:
        share = f"{alike / reworded:.0%} of them answered alike"
        lines.append(f"other wordings: {reworded / len(kept):.1f} a record, {share}")
    elif not claims:
        lines.append("no other wordings, which dataset=zsre_qa wants: give templates, or there and back")
    lines.append(f"edit them: dataset={'fever' if claims else 'zsre_qa'} dataset.path={out}")
    return lines


def plan(job: Job, monitor: ConsoleMonitor) -> Plan:
    """What `run` would do, before it costs anything."""
    top: PrepareSettings = job.config.settings
    plan = Plan(job)
    out = _new(top)
    dataset = job.config.dataset.load(top.limit, monitor)
    plan.facts(dataset.cases, dataset.source)
    plan.say("file", str(out))
    plan.needs(partial(refuse_missing, job, job.config.model))
    plan.model()
    if (work := plan.work) is not None:
        texts = [case.requests[0].text for case in dataset.cases]
        options = ObserveOptions(max_new_tokens=top.max_new_tokens)
        work.ask("alternatives", Asked([], texts, []), options, (), times=top.alternatives)
        work.ask("filter wordings", Asked([], texts, []), options, (), times=1 + len(top.templates))
    if top.there is not None:
        plan.unknown.append("translating: how many wordings come back, and what they take")
    return plan
