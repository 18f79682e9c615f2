"""A small model that knows the true facts of a CounterFact-style file."""

from __future__ import annotations

import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edit_cli.errors import UsageError
from tools.tiny_world.assets import Report, replace_folder, save_model, write_json
from tools.tiny_world.sources import COMMON, Source, infer_subject, read_sources, relations_of
from tools.tiny_world.statements import Statement, Text
from tools.tiny_world.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from tools.tiny_world.train import TrainOptions

HELD_OUT = 0.2  # share of the paraphrases that are never trained
TOKENIZER_REPEAT = 20  # how often the tokenizer sees each answer on its own
EXTRA_WORDINGS = 5  # of a relation's common ones, for each of its facts


@dataclass
class FactText:
    """One fact: who, what, and the prompts that ask for it. `subject` is None where it could not be inferred."""

    subject: str | None
    target: str
    prompts: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)

    def statements(self) -> list[Statement]:
        return [_locate(prompt, self.subject, self.target) for prompt in dict.fromkeys(self.prompts)]


def _locate(prompt: str, subject: str | None, target: str) -> Statement:
    start = prompt.find(subject) if subject else -1
    span = (start, start + len(subject)) if subject and start >= 0 else None
    return Statement(f"{prompt} {target}.", span, ((len(prompt) + 1, len(prompt) + 1 + len(target)),))


def gather_facts(sources: Sequence[Source], seed: int) -> tuple[list[FactText], list[str]]:
    """Distinct facts with all their prompts, and the unrelated sentences that paraphrases start with (used as filler).

    A fact learned from one prompt alone does not generalize, and a flat record has few. So every fact is also told in
    some of the common wordings of its relation.
    """
    rng = random.Random(f"{seed} wordings")
    templates = sorted({source.template for source in sources}, key=len, reverse=True)
    facts: dict[tuple[str, str], FactText] = {}
    relation_of: dict[tuple[str, str], str] = {}
    filler: dict[str, None] = {}
    wordings: dict[str, Counter[str]] = defaultdict(Counter)
    relations = relations_of(sources, templates)

    def tell(subject: str | None, target: str, prompt: str, relation: str) -> FactText:
        key = (subject or prompt, target)
        relation_of.setdefault(key, relation)
        entry = facts.setdefault(key, FactText(subject, target))
        entry.prompts.append(prompt)
        return entry

    for source, relation in zip(sources, relations, strict=True):
        own = tell(source.subject, source.target, source.template.replace("{}", source.subject), relation)
        wordings[relation][source.template] += 1
        for paraphrase in source.paraphrases:
            (own.held_out if rng.random() < HELD_OUT else own.prompts).append(paraphrase)
            lead, _, bare = paraphrase.rpartition(". ")
            filler.update(dict.fromkeys([f"{lead}."] if lead and source.subject not in lead else []))
            if source.subject in bare:
                wordings[relation][bare.replace(source.subject, "{}", 1)] += 1
        for prompt, answer in source.neighbors:
            subject, template = infer_subject(prompt, templates)
            tell(subject, answer, prompt, relation)
            wordings[relation].update([template] if template else [])
    for key, entry in facts.items():
        subject = entry.subject or ""
        common = [template for template, count in wordings[relation_of[key]].items() if count >= COMMON]
        for template in rng.sample(common, min(EXTRA_WORDINGS, len(common))) if subject else []:
            prompt = template.replace("{}", subject)
            if not any(held_out.endswith(prompt) for held_out in entry.held_out):
                entry.prompts.append(prompt)
        entry.held_out = [prompt for prompt in dict.fromkeys(entry.held_out) if prompt not in entry.prompts]
    return list(facts.values()), list(filler)


def make_fact_model(
    path: Path, out: Path, limit: int | None, vocabulary: int, options: TrainOptions, command: str, report: Report
) -> dict[str, Any]:
    """Train on the file's true facts and write the model, manifest.json, corpus.txt and records.json. The same call
    goes on with a training that was killed.

    The last one holds the records that an editor can be judged on: the model recalls the true fact, and has met the new
    target as an answer (no edit at one subject makes it say a word that it never learned to say).
    """
    import torch

    from edit_cli.statistics.files import digest_of
    from tools.tiny_world.train import recalled, train
    from tools.tiny_world.training_state import TrainingState

    records, sources = read_sources(path, limit)
    if out.exists() and any(out.iterdir()) and not (out / "manifest.json").is_file():
        raise UsageError(f"{out} is not empty and holds no earlier model; choose another folder")
    facts, filler = gather_facts(sources, options.seed)
    statements = [entry.statements() for entry in facts]
    answers = {entry.target for entry in facts}
    tokenizer = train_tokenizer(_tokenizer_texts(statements, answers, filler), vocabulary, options.context)
    out.parent.mkdir(parents=True, exist_ok=True)
    told = [statement.text for group in statements for statement in group]
    hangs_on = [asdict(options), torch.get_num_threads(), tokenizer.backend_tokenizer.to_str(), told, filler]
    state = TrainingState(out.parent / f".{out.name}.training.safetensors", digest_of(hangs_on))
    model = train(tokenizer, Text(statements, [Statement(line) for line in filler]), options, report, state)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".making-") as folder:
        staged = Path(folder) / "model"
        model = save_model(model, tokenizer, staged)
        known = recalled(model, tokenizer, [(s.template.replace("{}", s.subject), s.target) for s in sources])
        kept = [
            record
            for record, source, hit in zip(records, sources, known, strict=True)
            if hit and (source.new_target is None or source.new_target in answers)
        ]
        asked: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for entry in facts:
            asked["trained"] += [(prompt, entry.target) for prompt in dict.fromkeys(entry.prompts)]
            asked["held_out"] += [(prompt, entry.target) for prompt in entry.held_out]
        asked["neighborhood"] = [pair for source in sources for pair in source.neighbors]
        hits = {name: recalled(model, tokenizer, pairs) for name, pairs in asked.items() if pairs}
        manifest = {
            "command": command,
            "seed": options.seed,
            "recipe": asdict(options),
            "vocabulary": len(tokenizer),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "facts": len(facts),
            "facts_without_subject": sum(entry.subject is None for entry in facts),
            "records": len(records),
            "records_recalled": sum(known),
            "records_kept": len(kept),
            "recall_percent": {name: round(100 * sum(each) / len(each), 2) for name, each in hits.items()},
        }
        write_json(staged / "manifest.json", manifest, indent=2)
        write_json(staged / "records.json", kept)
        (staged / "corpus.txt").write_text("\n".join(told) + "\n", encoding="utf-8")  # for second moments
        replace_folder(staged, out)
    state.remove()
    return manifest


def _tokenizer_texts(statements: Sequence[Sequence[Statement]], answers: set[str], filler: Sequence[str]) -> list[str]:
    texts = [statement.text for group in statements for statement in group] + list(filler)
    return texts + [f" {text}" for text in texts] + [f" {answer}" for answer in sorted(answers)] * TOKENIZER_REPEAT
