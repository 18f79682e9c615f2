"""The world as edits of three forms: statements to complete, questions to answer, claims to judge.

The groups of the world are the splits: they share no subject. A fifth of each split's subjects are witnesses, whom no
edit is about: what other subjects are asked for locality is asked of them. So no run edits what it measures damage on,
however many facts it edits at once, and an editor that was trained on one split has met nothing of another.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from tools.tiny_world.records import spread
from tools.tiny_world.world import Fact, World

SPLITS = {"train": "bystander", "validation": "tune", "test": "test"}
WITNESSES = 5  # every fifth subject of a kind
TRAINED_QUESTIONS = 5
ALTERNATIVES, PARAPHRASES, NEIGHBORS, OTHERS = 3, 2, 4, 2
TRUE, FALSE = "SUPPORTS", "REFUTES"

Probe = dict[str, str]  # prompt and target


def statements(world: World) -> list[dict[str, Any]]:
    return records(world, "statements", list(world.facts), lambda fact: fact.relation.objects)


def lama(world: World) -> list[dict[str, Any]]:
    """The same facts as LAMA has those of T-REx: an object behind a mask at the end of a sentence."""
    return [
        {
            "uuid": f"world-{record['id']}",
            "predicate_id": record["relation"],
            "sub_label": record["subject"],
            "obj_label": record["target_true"],
            "evidences": [{"masked_sentence": f"{record['prompt'].replace('{}', record['subject'])} [MASK]."}],
            "split": record["split"],
        }
        for record in statements(world)
    ]


def questions(world: World) -> list[dict[str, Any]]:
    return records(world, "questions", asked(world), lambda fact: fact.relation.objects)


def claims(world: World) -> list[dict[str, Any]]:
    """One claim a fact, true or false by the toss of a coin."""
    return records(world, "claims", claimed(world, "edited"), lambda fact: (TRUE, FALSE))


def asked(world: World) -> list[Fact]:
    """The same facts, told by questions in place of statements."""
    wordings, found = question_wordings(), []
    for index, fact in enumerate(world.facts):
        own = wordings[fact.relation.id]
        own = random.Random(f"{world.seed} questions {index}").sample(own, len(own))
        found.append(replace(fact, trained=tuple(own[:TRAINED_QUESTIONS]), held_out=tuple(own[TRAINED_QUESTIONS:])))
    return found


def question_wordings() -> dict[str, list[str]]:
    """Relation id → questions with a slot for the subject."""
    return yaml.safe_load(Path(__file__).with_name("questions.yaml").read_text(encoding="utf-8"))


def claimed(world: World, draw: str) -> list[Fact]:
    """The same facts as claims, half of them false: whole sentences in their wordings, TRUE or FALSE in their
    object's place.
    """
    found = []
    for index, fact in enumerate(world.facts):
        rng = random.Random(f"{world.seed} claims {draw} {index}")
        truth = rng.random() < 0.5
        shown = fact.object if truth else rng.choice([other for other in fact.relation.objects if other != fact.object])
        trained, held_out = (tuple(f"{template} {shown}." for template in own) for own in (fact.trained, fact.held_out))
        found.append(replace(fact, object=TRUE if truth else FALSE, trained=trained, held_out=held_out))
    return found


def records(
    world: World, form: str, facts: Sequence[Fact], answers: Callable[[Fact], Sequence[str]]
) -> list[dict[str, Any]]:
    """One record for each fact that is not about a witness; within a split, blocks of a hundred do not repeat a
    subject.

    Prompts of edits and of locality are trained wordings; paraphrases are held-out ones, and, apart, other trained
    ones.
    """
    found = []
    for split, group in SPLITS.items():
        own = [(index, fact) for index, fact in enumerate(facts) if fact.group == group]
        seen = witnesses([fact for _, fact in own])
        chosen = [
            _record(world, form, split, index, fact, own, seen, answers(fact))
            for index, fact in own
            if fact.subject not in seen
        ]
        found += spread(chosen, lambda record: record["subject"], random.Random(f"{world.seed} order {form} {split}"))
    return found


def witnesses(facts: Sequence[Fact]) -> set[str]:
    """Every fifth subject of each kind."""
    by_kind: dict[str, dict[str, None]] = defaultdict(dict)
    for fact in facts:
        by_kind[fact.relation.kind][fact.subject] = None
    return {subject for subjects in by_kind.values() for subject in list(subjects)[::WITNESSES]}


def _record(
    world: World,
    form: str,
    split: str,
    index: int,
    fact: Fact,
    own: Sequence[tuple[int, Fact]],
    seen: set[str],
    answers: Sequence[str],
) -> dict[str, Any]:
    rng = random.Random(f"{world.seed} {form} {index}")
    others = [answer for answer in answers if answer != fact.object]
    alternatives = rng.sample(others, min(ALTERNATIVES, len(others)))

    def ask(about: Sequence[Fact], count: int) -> list[Probe]:
        return [
            {"prompt": rng.choice(other.trained).replace("{}", other.subject), "target": other.object}
            for other in rng.sample(list(about), min(count, len(about)))
        ]

    around = [other for number, other in own if number != index]
    same_relation = [other for other in around if other.subject in seen and other.relation.id == fact.relation.id]
    if len(answers) > ALTERNATIVES + 1:  # of two labels, one is always the new target
        same_relation = [other for other in same_relation if other.object not in alternatives]
    record: dict[str, Any] = {
        "id": index,
        "split": split,
        "relation": fact.relation.id,
        "subject": fact.subject,
        "prompt": rng.choice(fact.trained),
        "target_true": fact.object,
        "alternatives": alternatives,
        "paraphrases": [template.replace("{}", fact.subject) for template in rng.sample(fact.held_out, PARAPHRASES)],
        "same_relation": ask(same_relation, NEIGHBORS),
        "same_subject": ask([other for other in around if other.subject == fact.subject], OTHERS),
        "unrelated": ask(
            [other for other in around if other.subject in seen and other.relation.id != fact.relation.id], OTHERS
        ),
    }
    left = [template for template in fact.trained if template != record["prompt"]]
    record["paraphrases_seen"] = [template.replace("{}", fact.subject) for template in rng.sample(left, PARAPHRASES)]
    return record
