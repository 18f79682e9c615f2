"""A small model that knows the true facts of a CounterFact-style file.

Two forms are read: CounterFact's full schema (`requested_rewrite`, `paraphrase_prompts`, `neighborhood_prompts`) and the flat
one (`prompt`, `ground_truth`, `rephrase_prompt`, `locality_prompt`, `locality_ground_truth`). The bottleneck needs to know where
the subject stands; a neighbour's subject is not given and is inferred from the wordings of the file's own requests.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edit_cli.errors import MissingError, UsageError
from edit_cli.tiny.assets import Report, replace_folder, save_model, write_json
from edit_cli.tiny.statements import Statement, Text
from edit_cli.tiny.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from edit_cli.tiny.train import TrainOptions

HELD_OUT = 0.2  # share of the paraphrases that are never trained
TOKENIZER_REPEAT = 20  # how often the tokenizer sees each answer on its own


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


@dataclass(frozen=True)
class Source:
    """One record in either form, reduced to what is told."""

    template: str
    subject: str
    target: str
    paraphrases: tuple[str, ...]
    neighbours: tuple[tuple[str, str], ...]  # (prompt, answer)


def read_sources(path: Path, limit: int | None) -> tuple[list[dict[str, Any]], list[Source]]:
    """The records as they stand in the file, and what each tells. Raises UsageError naming the record and the field."""
    if not path.is_file():
        raise MissingError(f"no file {path}")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(records, list) or not records:
        raise UsageError(f"{path} must hold a non-empty JSON list of records")
    records = records[:limit]
    sources = []
    for position, record in enumerate(records):
        try:
            sources.append(_full(record) if "requested_rewrite" in record else _flat(record))
        except KeyError as error:
            raise UsageError(f"{path}: record {position} lacks the field {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{path}: record {position} is not of CounterFact's form: {error}") from None
    return records, sources


def _full(record: dict[str, Any]) -> Source:
    rewrite = record["requested_rewrite"]
    template, subject, target = rewrite["prompt"], rewrite["subject"], rewrite["target_true"]["str"].strip()
    if template.count("{}") != 1:
        raise ValueError(f"the prompt {template!r} must have exactly one {{}}")
    neighbours = tuple((prompt.strip(), target) for prompt in record.get("neighborhood_prompts", ()))
    return _checked(Source(template.strip(), subject, target, tuple(map(str.strip, record.get("paraphrase_prompts", ()))), neighbours))


def _flat(record: dict[str, Any]) -> Source:
    prompt, subject, target = record["prompt"], record["subject"], record["ground_truth"].strip()
    if subject not in prompt:
        raise ValueError(f"the subject {subject!r} does not occur in the prompt {prompt!r}")
    rephrase, neighbour = record.get("rephrase_prompt"), record.get("locality_prompt")
    neighbours = ((neighbour.strip(), record["locality_ground_truth"].strip()),) if neighbour else ()
    return _checked(
        Source(prompt.strip().replace(subject, "{}", 1), subject, target, (rephrase.strip(),) if rephrase else (), neighbours)
    )


def _checked(source: Source) -> Source:
    if not (source.subject and source.target):
        raise ValueError("subject and true target must not be empty")
    return source


def gather_facts(sources: Sequence[Source], seed: int) -> tuple[list[FactText], list[str]]:
    """Distinct facts with all their prompts, and the unrelated sentences that paraphrases start with (used as filler).

    A neighbour shares its record's relation and answer, so each of the two is also told in the other's wording.
    """
    rng = random.Random(f"{seed} held out")
    templates = sorted({source.template for source in sources}, key=len, reverse=True)
    facts: dict[tuple[str, str], FactText] = {}
    filler: dict[str, None] = {}

    def fact(subject: str | None, target: str, prompt: str) -> FactText:
        entry = facts.setdefault((subject or prompt, target), FactText(subject, target))
        entry.prompts.append(prompt)
        return entry

    for source in sources:
        own = fact(source.subject, source.target, source.template.replace("{}", source.subject))
        for paraphrase in source.paraphrases:
            (own.held_out if rng.random() < HELD_OUT else own.prompts).append(paraphrase)
            lead, _, _ = paraphrase[: max(paraphrase.find(source.subject), 0)].rpartition(". ")
            filler.update(dict.fromkeys([f"{lead}."] if lead else []))
        for prompt, answer in source.neighbours:
            subject, template = infer_subject(prompt, templates)
            other = fact(subject, answer, prompt)
            if subject and template:
                other.prompts.append(source.template.replace("{}", subject))
                own.prompts.append(template.replace("{}", source.subject))
    for entry in facts.values():
        entry.held_out = [prompt for prompt in dict.fromkeys(entry.held_out) if prompt not in entry.prompts]
    return list(facts.values()), list(filler)


def infer_subject(prompt: str, templates: Iterable[str]) -> tuple[str | None, str | None]:
    """Whom the prompt is about, by the first template (longest first) that fits it; (None, None) when none does."""
    for template in templates:
        before, _, after = template.partition("{}")
        inside = prompt[len(before) : len(prompt) - len(after)]
        if inside.strip() and before + inside + after == prompt:
            return inside, template
    return None, None


def make_fact_model(
    path: Path, out: Path, limit: int | None, vocabulary: int, options: TrainOptions, command: str, report: Report
) -> dict[str, Any]:
    """Train on the file's true facts and write the model, manifest.json, and records.json: the records whose fact it recalls."""
    from edit_cli.tiny.train import recalled, train

    records, sources = read_sources(path, limit)
    if out.exists() and any(out.iterdir()) and not (out / "manifest.json").is_file():
        raise UsageError(f"{out} is not empty and holds no earlier model; choose another folder")
    facts, filler = gather_facts(sources, options.seed)
    statements = [entry.statements() for entry in facts]
    tokenizer = train_tokenizer(_tokenizer_texts(statements, facts, filler), vocabulary, options.context)
    model = train(tokenizer, Text(statements, [Statement(line) for line in filler]), options, report)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".making-") as folder:
        staged = Path(folder) / "model"
        model = save_model(model, tokenizer, staged)
        known = recalled(model, tokenizer, [(s.template.replace("{}", s.subject), s.target) for s in sources])
        asked: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for entry in facts:
            asked["trained"] += [(prompt, entry.target) for prompt in dict.fromkeys(entry.prompts)]
            asked["held_out"] += [(prompt, entry.target) for prompt in entry.held_out]
        asked["neighborhood"] = [pair for source in sources for pair in source.neighbours]
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
            "recall_percent": {name: round(100 * sum(each) / len(each), 2) for name, each in hits.items()},
        }
        write_json(staged / "manifest.json", manifest, indent=2)
        write_json(staged / "records.json", [record for record, hit in zip(records, known, strict=True) if hit])
        replace_folder(staged, out)
    return manifest


def _tokenizer_texts(statements: Sequence[Sequence[Statement]], facts: Sequence[FactText], filler: Sequence[str]) -> list[str]:
    texts = [statement.text for group in statements for statement in group] + list(filler)
    answers = [f" {entry.target}" for entry in facts] * TOKENIZER_REPEAT
    return texts + [f" {text}" for text in texts] + answers
