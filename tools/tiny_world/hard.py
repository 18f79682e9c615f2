"""Harder questions about the world, in the form of zsRE-hard: what a fact implies, and whether a statement is true."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from tools.tiny_world.tasks import SPLITS, asked
from tools.tiny_world.world import Fact, World

ALTERNATIVES, REPHRASES = 3, 2
WHO = "which one"


def hard_records(world: World, form: str) -> list[dict[str, Any]]:
    """One record a fact. form: "questions", or "statements" that end before their answer.

    implied: pairs of a question that holds the fact's object, and its answer; with another object in its place, it is
    what the edited fact implies. statement: the fact as a sentence. Both are told in wordings that the fact is never
    told with in training.
    """
    told = asked(world) if form == "questions" else list(world.facts)
    alike: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in world.facts:
        alike[fact.relation.id, fact.group].append(fact)
    splits = {group: split for split, group in SPLITS.items()}
    found = []
    for index, (fact, sentence) in enumerate(zip(told, world.facts, strict=True)):
        rng = random.Random(f"{world.seed} hard {form} {index}")
        others = rng.sample([answer for answer in fact.relation.objects if answer != fact.object], ALTERNATIVES)
        found.append(
            {
                "id": index,
                "split": splits[fact.group],
                "relation": fact.relation.id,
                "subject": fact.subject,
                "input": rng.choice(fact.trained).replace("{}", fact.subject),
                "output": [{"answer": fact.object}],
                "alternatives": others,
                "filtered_rephrases": [
                    wording.replace("{}", fact.subject) for wording in rng.sample(fact.held_out, REPHRASES)
                ],
                "implied": [
                    list(pair) for pair in _implied(sentence, others, alike[fact.relation.id, fact.group], rng)
                ],
                "statement": f"{rng.choice(sentence.held_out).replace('{}', fact.subject)} {fact.object}.",
            }
        )
    order = list(range(len(found)))
    random.Random(f"{world.seed} hard order {form}").shuffle(order)
    return [found[i] for i in order]


def _implied(
    fact: Fact, alternatives: Sequence[str], alike: Sequence[Fact], rng: random.Random
) -> Iterator[tuple[str, str]]:
    """(question, answer): which of two subjects, and which of two objects.

    The other subject has none of the objects that may be written.

    alike: facts of the same relation, of which none is told of another split.
    """
    told = (fact.object, *alternatives)
    others = [one.subject for one in alike if one.object not in told]
    template = rng.choice(fact.held_out)
    if others:
        pair = rng.sample([fact.subject, rng.choice(others)], 2)
        question = f"{template.replace('{}', WHO)} {fact.object}, {pair[0]} or {pair[1]}?"
        yield question[0].upper() + question[1:], fact.subject
    left = [answer for answer in fact.relation.objects if answer not in told]
    if left:
        pair = rng.sample([fact.object, rng.choice(left)], 2)
        yield f"{template.replace('{}', fact.subject)} which, {pair[0]} or {pair[1]}?", fact.object
