"""The invented world: who exists, which facts hold, with which sentences each fact is told.

Everything follows from the seed. Three rules shape it:

* Subjects fall into three groups. Those of "test" and "tune" are edited; bystanders never are. A record's neighbors
  come from another group than its own, so that no run edits a neighbor by accident.
* In every relation and group the objects are dealt like cards: each is as frequent as the others, none is a safe guess.
* Of its relation's templates a fact is told with some and never with the others; the latter are its paraphrase prompts.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tools.tiny_world.names import pool

GROUPS = {"test": 75, "tune": 39, "bystander": 69}  # people; other kinds have two thirds as many subjects
RELATIONS_A_PERSON = 6
TRAINED_TEMPLATES = 7
POOL_FACTOR = 20


@dataclass(frozen=True)
class Relation:
    id: str
    kind: str
    objects: tuple[str, ...]
    templates: tuple[str, ...]
    generation: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """A true statement about a subject, and the templates that do and do not tell it in training."""

    subject: str
    relation: Relation
    object: str
    group: str
    trained: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Filler:
    """A grammar of sentences that state no fact."""

    sentences: tuple[str, ...]
    words: dict[str, tuple[str, ...]]

    def sentence(self, rng: random.Random) -> str:
        words = {kind: rng.sample(choices, len(choices)) for kind, choices in sorted(self.words.items())}
        text = rng.choice(self.sentences)
        while "{" in text:
            kind = text[text.index("{") + 1 : text.index("}")]
            text = text.replace("{" + kind + "}", words[kind].pop(), 1)
        return text[0].upper() + text[1:] + "."


@dataclass(frozen=True)
class World:
    seed: int
    relations: tuple[Relation, ...]
    facts: tuple[Fact, ...]
    filler: Filler
    name_pool: dict[str, tuple[str, ...]]


def load_relations(path: Path | None = None) -> tuple[tuple[Relation, ...], Filler]:
    """The relations and the filler grammar of a YAML file (default: the packaged one)."""
    path = path or Path(__file__).with_name("relations.yaml")
    data: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    grammar = data.pop("filler")
    filler = Filler(tuple(grammar["sentences"]), {kind: tuple(words) for kind, words in grammar["words"].items()})
    relations = tuple(
        Relation(name, kind, tuple(entry["objects"]), tuple(entry["templates"]), tuple(entry["generation"]))
        for kind, entries in data.items()
        for name, entry in entries.items()
    )
    return relations, filler


def make_world(seed: int, size: int = 1) -> World:
    """The world of that seed: about 2,600 facts about 660 subjects, times `size`."""
    rng = random.Random(seed)
    relations, filler = load_relations()
    facts: list[Fact] = []
    name_pool: dict[str, tuple[str, ...]] = {}
    for kind in dict.fromkeys(relation.kind for relation in relations):
        own = [relation for relation in relations if relation.kind == kind]
        shares = {group: count if kind == "person" else count * 2 // 3 for group, count in GROUPS.items()}
        names = pool(kind, POOL_FACTOR * sum(shares.values()), rng)
        name_pool[kind] = tuple(names)
        for group, count in shares.items():
            subjects, names = names[: size * count], names[size * count :]
            facts += _deal(own, subjects, group, rng)
    return World(seed, relations, tuple(facts), filler, name_pool)


def _deal(relations: Sequence[Relation], subjects: Sequence[str], group: str, rng: random.Random) -> list[Fact]:
    """Facts about `subjects`; a person has some of the relations, evenly spread, any other subject has all of its
    kind's.
    """
    holders: dict[str, list[str]] = {relation.id: [] for relation in relations}
    deck: list[Relation] = []
    for subject in subjects:
        for _ in range(min(RELATIONS_A_PERSON, len(relations))):
            # a fresh deck holds every relation once; deal the first one that the subject does not have yet
            if not any(subject not in holders[relation.id] for relation in deck):
                deck += rng.sample(relations, len(relations))
            relation = next(relation for relation in deck if subject not in holders[relation.id])
            deck.remove(relation)
            holders[relation.id].append(subject)
    facts = []
    for relation in relations:
        cards: list[str] = []
        for subject in holders[relation.id]:
            cards = cards or rng.sample(relation.objects, len(relation.objects))
            templates = rng.sample(relation.templates, len(relation.templates))
            trained, held_out = templates[:TRAINED_TEMPLATES], templates[TRAINED_TEMPLATES:]
            facts.append(Fact(subject, relation, cards.pop(), group, tuple(trained), tuple(held_out)))
    return facts


def sentence(template: str, fact: Fact) -> str:
    """The fact told with that template, full stop included."""
    return f"{template.replace('{}', fact.subject)} {fact.object}."


def documents(world: World, sentences: int, rng: random.Random, avoid: Collection[str] = ()) -> list[list[str]]:
    """Documents of 4 to 8 sentences: facts in trained wordings, a sixth filler; none of the sentences in `avoid`.

    Every fact comes up equally often, up to one time.
    """
    told: list[list[str]] = []
    deck: list[Fact] = []
    while sentences > 0:
        length = rng.randint(4, 8)
        text: list[str] = []
        while len(text) < length:
            if rng.random() < 1 / 6:
                line = world.filler.sentence(rng)
            else:
                deck = deck or rng.sample(world.facts, len(world.facts))
                fact = deck.pop()
                line = sentence(rng.choice(fact.trained), fact)
            if line not in avoid:
                text.append(line)
        told.append(text)
        sentences -= length
    return told
