"""The world as records in CounterFact's full schema, and as reference texts for the consistency metric."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any

from tools.tiny_world.world import Fact, World, sentence

PROMPTS = 10  # neighborhood and attribute prompts a record, where the world has as many
BLOCK = 100


def make_records(world: World, skip: Collection[int] = ()) -> list[dict[str, Any]]:
    """One record for each fact of the groups "test" and "tune", test first; `skip` lists case ids to leave out.

    Within a split, records 1-100, 101-200, … each name a subject at most once, so that a batch of a hundred holds no
    two edits of one subject (their keys would coincide: CounterFact's multi-edit variant drops such conflicts too).
    """
    by_answer: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in world.facts:
        by_answer[fact.relation.id, fact.object].append(fact)
    records = []
    for split in ("test", "tune"):
        chosen = [
            _record(world, case_id, fact, by_answer)
            for case_id, fact in enumerate(world.facts)
            if fact.group == split and case_id not in skip
        ]
        records += spread(
            chosen, lambda record: record["requested_rewrite"]["subject"], random.Random(f"{world.seed} order {split}")
        )
    return records


def _record(world: World, case_id: int, fact: Fact, by_answer: dict[tuple[str, str], list[Fact]]) -> dict[str, Any]:
    rng = random.Random(f"{world.seed} record {case_id}")
    relation = fact.relation
    new = rng.choice([answer for answer in relation.objects if answer != fact.object])

    def prompts(answer: str) -> list[str]:
        others = [other for other in by_answer[relation.id, answer] if other.group != fact.group]
        others = rng.sample(others, min(PROMPTS, len(others)))
        return [rng.choice(other.trained).replace("{}", other.subject) for other in others]

    bare, after_text = (template.replace("{}", fact.subject) for template in rng.sample(fact.held_out, 2))
    return {
        "case_id": case_id,
        "pararel_idx": world.relations.index(relation),
        "requested_rewrite": {
            "prompt": fact.trained[0],
            "relation_id": relation.id,
            "target_new": {"str": new, "id": new.lower()},
            "target_true": {"str": fact.object, "id": fact.object.lower()},
            "subject": fact.subject,
        },
        "paraphrase_prompts": [bare, f"{world.filler.sentence(rng)} {after_text}"],
        "neighborhood_prompts": prompts(fact.object),
        "attribute_prompts": prompts(new),
        "generation_prompts": [template.replace("{}", fact.subject) for template in relation.generation],
        "split": fact.group,
    }


def spread(
    records: Sequence[dict[str, Any]], subject: Callable[[dict[str, Any]], str], rng: random.Random
) -> list[dict[str, Any]]:
    """A random order in which no block of a hundred repeats a subject (as far as that is possible)."""
    capacity = [BLOCK] * (len(records) // BLOCK) + [len(records) % BLOCK]
    blocks: list[list[dict[str, Any]]] = [[] for _ in capacity]
    by_subject: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in rng.sample(records, len(records)):
        by_subject[subject(record)].append(record)
    # subjects with many records first: they are the hard ones to place; always into the emptiest blocks
    for own in sorted(by_subject.values(), key=len, reverse=True):
        emptiest = sorted(range(len(blocks)), key=lambda block: len(blocks[block]) / max(capacity[block], 1))
        free = [block for block in emptiest if len(blocks[block]) < capacity[block]]
        for position, record in enumerate(own):
            blocks[free[position % len(free)]].append(record)
    return [record for block in blocks for record in rng.sample(block, len(block))]


def make_snippets(world: World, samples: int = 4) -> list[dict[str, Any]]:
    """For each property (relation, object): what the world writes about some bystanders that have it.

    Same form as CounterFact's attribute snippets: `{relation_id, target_id, samples: [{name, text}]}`.
    """
    about: dict[str, list[Fact]] = defaultdict(list)
    having: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in world.facts:
        about[fact.subject].append(fact)
        if fact.group == "bystander":
            having[fact.relation.id, fact.object].append(fact)
    snippets = []
    for relation in world.relations:
        for answer in relation.objects:
            rng = random.Random(f"{world.seed} snippet {relation.id} {answer}")
            owners = having[relation.id, answer]
            texts = []
            for fact in rng.sample(owners, min(samples, len(owners))):
                told = [sentence(template, fact) for template in rng.sample(fact.trained, 3)]
                told += [
                    sentence(rng.choice(other.trained), other) for other in about[fact.subject] if other is not fact
                ]
                texts.append({"name": fact.subject, "text": " ".join(rng.sample(told, len(told)))})
            snippets.append({"relation_id": relation.id, "target_id": answer.lower(), "samples": texts})
    return snippets
