"""What a CounterFact-style file tells: its records, reduced to facts, prompts and relations.

Two forms are read: CounterFact's full schema (`requested_rewrite`, `paraphrase_prompts`, `neighborhood_prompts`) and
the flat one (`prompt`, `ground_truth`, `rephrase_prompt`, `locality_prompt`, `locality_ground_truth`). The attention
bottleneck needs to know where the subject stands; a neighbor's subject is not given and is inferred from the wordings
of the file's own requests.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edit_cli.errors import MissingError, UsageError

COMMON = 3  # times that a wording must occur with a relation to be taken for one of its wordings


@dataclass(frozen=True)
class Source:
    """One record in either form, reduced to what is told."""

    template: str
    subject: str
    target: str
    new_target: str | None
    relation: str | None
    paraphrases: tuple[str, ...]
    neighbors: tuple[tuple[str, str], ...]  # (prompt, answer)


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
    template, target = rewrite["prompt"].strip(), rewrite["target_true"]["str"].strip()
    if template.count("{}") != 1:
        raise ValueError(f"the prompt {template!r} must have exactly one {{}}")
    new_target = rewrite["target_new"]["str"].strip() if "target_new" in rewrite else None
    paraphrases = tuple(prompt.strip() for prompt in record.get("paraphrase_prompts", ()))
    neighbors = tuple((prompt.strip(), target) for prompt in record.get("neighborhood_prompts", ()))
    return _checked(
        Source(template, rewrite["subject"], target, new_target, rewrite.get("relation_id"), paraphrases, neighbors)
    )


def _flat(record: dict[str, Any]) -> Source:
    prompt, subject, target = record["prompt"], record["subject"], record["ground_truth"].strip()
    if subject not in prompt:
        raise ValueError(f"the subject {subject!r} does not occur in the prompt {prompt!r}")
    rephrase, neighbor = record.get("rephrase_prompt"), record.get("locality_prompt")
    neighbors = ((neighbor.strip(), record["locality_ground_truth"].strip()),) if neighbor else ()
    template = prompt.strip().replace(subject, "{}", 1)
    paraphrases = (rephrase.strip(),) if rephrase else ()
    new_target = record["target_new"].strip() if "target_new" in record else None
    return _checked(Source(template, subject, target, new_target, None, paraphrases, neighbors))


def _checked(source: Source) -> Source:
    if not (source.subject and source.target):
        raise ValueError("subject and true target must not be empty")
    return source


def infer_subject(prompt: str, templates: Iterable[str]) -> tuple[str | None, str | None]:
    """Whom the prompt is about, by the first template (longest first) that fits it; (None, None) when none does."""
    for template in templates:
        before, _, after = template.partition("{}")
        inside = prompt[len(before) : len(prompt) - len(after)]
        if inside.strip() and before + inside + after == prompt:
            return inside, template
    return None, None


def relations_of(sources: Sequence[Source], templates: Sequence[str]) -> list[str]:
    """A name for each source's relation: its id, or, in the flat form, the wordings that its neighbors connect.

    A neighbor shares its record's relation; two wordings that meet so at least COMMON times belong together.
    """
    meetings: Counter[tuple[str, str]] = Counter()
    for source in sources:
        inferred = (infer_subject(prompt, templates)[1] for prompt, _ in source.neighbors)
        meetings.update((source.template, template) for template in inferred if template)
    parent = {template: template for template in templates}

    def root(template: str) -> str:
        while parent[template] != template:
            template = parent[template]
        return template

    for (one, other), count in meetings.items():
        if count >= COMMON:
            parent[root(one)] = root(other)
    return [source.relation or root(source.template) for source in sources]
