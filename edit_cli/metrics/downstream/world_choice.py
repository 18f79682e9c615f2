"""A task without a network: facts of the embedded world that are never edited, with four answers to choose from."""

from __future__ import annotations

import json
from typing import Any

from edit_cli import assets

NAME, COUNT = "world_choice", 200


def items() -> list[dict[str, Any]]:
    """Statements of the training split: {"query", "choices", "label"}, the right choice at a place of its own."""
    records = json.loads((assets.FOLDER / "world" / "statements.json").read_text(encoding="utf-8"))
    found = []
    for record in [record for record in records if record["split"] == "train"][:COUNT]:
        choices, label = list(record["alternatives"]), record["id"] % 4
        choices.insert(label, record["target_true"])
        found.append({"query": record["prompt"].replace("{}", record["subject"]), "choices": choices, "label": label})
    return found


def task() -> dict[str, Any]:
    """As lm-evaluation-harness takes it."""
    from datasets import Dataset

    return {
        "task": NAME,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(items())},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{query}}",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
