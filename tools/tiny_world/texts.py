"""Passages of the world's texts and how they go on, for editing generation."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from tools.tiny_world.tasks import SPLITS
from tools.tiny_world.world import World, documents

SENTENCES = {"train": 6000, "validation": 900, "test": 1800}
PASSAGE, CONTINUATION = 20, 8  # words


def text_records(world: World) -> list[dict[str, Any]]:
    """Documents about subjects of one split each, cut into a passage and its continuation."""
    found: list[dict[str, Any]] = []
    for split, group in SPLITS.items():
        part = replace(world, facts=tuple(fact for fact in world.facts if fact.group == group))
        for sentences in documents(part, SENTENCES[split], random.Random(f"{world.seed} texts {split}")):
            words = " ".join(sentences).split()
            if len(words) >= PASSAGE + CONTINUATION:
                passage, rest = words[:PASSAGE], words[PASSAGE : PASSAGE + CONTINUATION]
                found.append(
                    {"id": len(found), "split": split, "passage": " ".join(passage), "continuation": " ".join(rest)}
                )
    return found
