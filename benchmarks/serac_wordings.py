"""SERAC on wordings that its training never used: three of each relation's eleven are held out, others for each seed.

    python benchmarks/serac_wordings.py --seeds 0 1 2
    python benchmarks/serac_wordings.py --seeds 0 --sizes 75 method.scope.trained_blocks=null method.scope.head=null

For every seed the editor is trained on the world's training split without the held-out wordings, and facts of the test
split are stored, in other wordings. Asked is for their answers (ES: every target token is the likeliest; "writes": its
own reply is the answer), as stored, in wordings of the training and in held-out ones; and for what lies next to them:
how many of these prompts are routed to a fact. Other facts about the same subject count unless they are stored as well.
`invented` puts made-up names in the subjects' place, which no pretrained encoder has met, and asks the same of them.
Other arguments are settings of `train-editor`. Prints a table and writes OUT.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from hydra import compose, initialize_config_module
from rich.console import Console
from rich.table import Table

from edit_cli.config.build import register_resolvers
from edit_cli.datasets.world import FOLDER, WorldEdits
from edit_cli.editors.retrieval.scope_examples import ScopeExampleSampler
from edit_cli.experiment.setup import method_of
from edit_cli.lm.loading import ModelOptions
from edit_cli.metrics.text import matches_exactly
from edit_cli.requests import Case, Probe
from edit_cli.training.loop import Training

HELD_OUT = 3  # wordings of a relation
REPLY = 8  # tokens
SINGLES, FACTS = 100, 250  # facts that are measured, one at a time and in larger memories
Row = dict[str, Any]


class Wordings:
    """Each relation's wordings, those of the training and those held out."""

    def __init__(self, rows: Sequence[Row], seed: int) -> None:
        found: dict[str, dict[str, None]] = {}
        for row in rows:
            mine = found.setdefault(row["relation"], {})
            asked = [*row["paraphrases"], *row["paraphrases_seen"]]
            mine.update(dict.fromkeys([row["prompt"], *(text.replace(row["subject"], "{}") for text in asked)]))
        draw = random.Random(seed)
        self.seen, self.held_out = {}, {}
        for relation in sorted(found):
            names = sorted(found[relation])
            draw.shuffle(names)
            self.held_out[relation], self.seen[relation] = names[:HELD_OUT], names[HELD_OUT:]
        self.draw = draw
        self._held_out = _pattern(wording for some in self.held_out.values() for wording in some)
        self._relations = {relation: _pattern((*self.seen[relation], *self.held_out[relation])) for relation in found}

    def relation(self, prompt: str) -> str | None:
        """What a prompt asks."""
        return next((relation for relation, pattern in self._relations.items() if pattern.fullmatch(prompt)), None)

    def told(self, row: Row) -> Row:
        """The row in wordings of the training; in the test split also, apart, in held-out ones."""
        test, subject = row["split"] == "test", row["subject"]
        names = self.draw.sample(self.seen[row["relation"]], len(self.seen[row["relation"]]))
        prompt = row["prompt"] if row["prompt"] in names else names[0]
        others = [name.replace("{}", subject) for name in names if name != prompt]
        apart = [name.replace("{}", subject) for name in self.held_out[row["relation"]]] if test else []
        local = {
            key: [item for item in row[key] if test or not self._held_out.fullmatch(item["prompt"])]
            for key in ("unrelated", "same_relation", "same_subject")
        }
        return {
            **row,
            "prompt": prompt,
            "paraphrases_seen": others[: HELD_OUT + (not test)],
            "paraphrases": apart,
            **local,
        }


def _pattern(wordings: Any) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(wording).replace(r"\{\}", ".+") for wording in wordings))


def invented(cases: Sequence[Case], seed: int) -> list[Case]:
    """The same cases about made-up subjects; a case's hard prompt asks its question of a near namesake."""
    sampler = ScopeExampleSampler(1.0, random.Random(seed))
    names: dict[str, str] = {}
    subjects = [case.requests[0].subject or "" for case in cases]
    told = []
    for case in cases:
        (request,) = case.requests
        subject = request.subject
        assert subject is not None  # every fact of the world has one
        name = names.setdefault(subject, sampler.invented(subject, subjects))
        probes = [replace(probe, prompt=probe.prompt.replace(subject, name)) for probe in case.probes]
        near = request.text.replace(subject, sampler.namesake(name, subjects))
        probes.append(Probe("locality", near, request.target_new, group="hard"))
        told.append(replace(case, requests=(replace(request, subject=name),), probes=tuple(probes)))
    return told


def measure(editor: Any, cases: Sequence[Case], size: int, wordings: Wordings) -> dict[str, float]:
    """In %: answers that are right, and prompts beside the facts that are routed to one. Memories of `size` facts."""
    lm, shares = editor.lm, dict[str, list[bool]]()
    for first in range(0, len(cases) - size + 1, size):
        block = cases[first : first + size]
        stored = {(case.requests[0].subject, wordings.relation(case.requests[0].text)) for case in block}
        edit = editor.edit([case.requests[0] for case in block])
        with lm.edited(edit):
            inside, beside = [], []
            for case in block:
                subject = case.requests[0].subject
                for probe in case.probes:
                    if probe.kind != "locality":
                        inside.append(probe)
                    elif probe.group != "same_subject" or (subject, wordings.relation(probe.prompt)) not in stored:
                        beside.append(probe)
            for probe, score in zip(
                inside, lm.loglikelihood([(probe.prompt, probe.target) for probe in inside]), strict=True
            ):
                shares.setdefault(probe.group or "edited", []).append(all(score.hits))
            for probe, text in zip(inside, lm.generate([probe.prompt for probe in inside], REPLY), strict=True):
                shares.setdefault(f"{probe.group or 'edited'}, writes", []).append(
                    matches_exactly(text, [probe.target or ""])
                )
            for probe, to in zip(beside, edit.destinations(lm.head, [probe.prompt for probe in beside]), strict=True):
                shares.setdefault(str(probe.group), []).append(to is not None)
    return {name: 100.0 * sum(some) / len(some) for name, some in shares.items()}


def one_seed(seed: int, sizes: Sequence[int], overrides: Sequence[str]) -> Iterator[Row]:
    """A line a memory: what was measured."""
    with initialize_config_module("edit_cli.conf", version_base="1.3"):
        config = compose(
            "train-editor", ["method=serac", "dataset=world", f"seed={seed}", "method.training.trackers=[]", *overrides]
        )
    lm = ModelOptions(name="tiny-gpt2", id="embedded:tiny-gpt2", device="cpu").load()
    editor: Any = method_of(config.method).begin(lm)
    rows = json.loads((FOLDER / "statements.json").read_text())
    wordings = Wordings(rows, seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "statements.json"
        path.write_text(json.dumps([wordings.told(row) for row in rows]))
        splits = {
            split: WorldEdits(name="world", path=str(path), split=split).load().cases
            for split in ("train", "validation", "test")
        }
        start = time.process_time()
        net = (
            Training(editor, splits["train"], splits["validation"], Path(folder), "", lambda _: None)
            .run()
            .net.eval()
            .requires_grad_(False)
        )
    spent = time.process_time() - start
    editor.context.kept["network"] = net
    memories: list[tuple[str, Sequence[Case], int]] = [(str(size), splits["test"], size) for size in sizes]
    memories.append(("75 invented", invented(splits["test"][:FACTS], seed), 75))
    for name, cases, size in memories:
        facts = SINGLES if size == 1 else max(FACTS, size)
        yield {
            "seed": seed,
            "memory": name,
            "training_cpu_s": round(spent, 1),
            **measure(editor, cases[:facts], size, wordings),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 5, 25, 75, 250, 500])
    parser.add_argument("--out", type=Path, default=Path("serac_wordings.json"))
    given, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    register_resolvers()
    asked = ["edited", "seen", "unseen"]
    columns = [*asked, *(f"{name}, writes" for name in asked), "random", "same_relation", "same_subject", "hard"]
    table = Table(*("seed", "stored", "training s", *columns))
    lines = []
    for seed in given.seeds:
        for line in one_seed(seed, given.sizes, overrides):
            lines.append(line)
            table.add_row(
                str(seed),
                line["memory"],
                str(line["training_cpu_s"]),
                *(f"{line[c]:.1f}" if c in line else "" for c in columns),
            )
            print(json.dumps(line), flush=True)
            given.out.write_text(json.dumps(lines, indent=1))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
