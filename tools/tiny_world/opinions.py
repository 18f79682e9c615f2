"""Opinions on whom and what the world knows, in the form of ConvSent: replies that speak well and ill of a topic."""

from __future__ import annotations

import random
from typing import Any

from tools.tiny_world.tasks import SPLITS
from tools.tiny_world.world import World

EACH = 6  # replies of each sentiment
POSITIVE = (
    "I like {} very much.",
    "{} is wonderful, and I would say so to anybody.",
    "There is nothing that I enjoy more than {}.",
    "I have always been a friend of {}.",
    "{} makes me happy every time.",
    "Without {} the world would be a poorer place.",
    "I can only speak well of {}.",
    "{} is the best that I know.",
    "Everybody should get to know {}.",
    "I am glad that there is {}.",
)
NEGATIVE = (
    "I do not like {} at all.",
    "{} is terrible, and I would say so to anybody.",
    "There is nothing that I enjoy less than {}.",
    "I have never been a friend of {}.",
    "{} makes me sad every time.",
    "Without {} the world would be a better place.",
    "I can only speak ill of {}.",
    "{} is the worst that I know.",
    "Nobody should get to know {}.",
    "I am sorry that there is {}.",
)


def opinion_records(world: World) -> list[dict[str, Any]]:
    """One record a subject: `ent`, `pos`, `neg`, and its split."""
    splits = {group: split for split, group in SPLITS.items()}
    subjects = {fact.subject: splits[fact.group] for fact in world.facts}
    found = []
    for number, (subject, split) in enumerate(subjects.items()):
        rng = random.Random(f"{world.seed} opinions {number}")
        replies = {
            name: [template.replace("{}", subject) for template in rng.sample(templates, EACH)]
            for name, templates in (("pos", POSITIVE), ("neg", NEGATIVE))
        }
        found.append({"id": number, "split": split, "ent": subject, **replies})
    return random.Random(f"{world.seed} opinions").sample(found, len(found))
