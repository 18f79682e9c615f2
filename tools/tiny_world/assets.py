"""Makes the shipped assets: the model with its tokenizer, and the world as records and texts."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.tiny_world.hard import hard_records
from tools.tiny_world.names import pool
from tools.tiny_world.opinions import opinion_records
from tools.tiny_world.records import make_records, make_snippets
from tools.tiny_world.statements import Statement, Text, listing, statement
from tools.tiny_world.tasks import claims, lama, questions, statements
from tools.tiny_world.texts import text_records
from tools.tiny_world.tokenizer import check_single_tokens, train_tokenizer, world_texts
from tools.tiny_world.world import World, documents, make_world

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

    from tools.tiny_world.train import TrainOptions

WORLD = "world"
VOCABULARY = 2048
CORPUS_SENTENCES, HELDOUT_SENTENCES = 6500, 180
LISTINGS, FILLERS = 12, 3000  # variants to draw from

Report = Callable[[int, int, float], None]


def world_training_text(world: World) -> Text:
    """An epoch tells each fact once, and lists what is known about each subject once."""
    rng = random.Random(f"{world.seed} training text")
    groups: list[list[Statement]] = []
    answers: dict[str, list[str]] = defaultdict(list)
    for fact in world.facts:
        wordings = fact.trained + fact.relation.generation
        groups.append([statement(template, fact.subject, fact.object) for template in wordings])
        answers[fact.subject].append(fact.object)
    groups += [
        [listing(subject, rng.sample(own, len(own))) for _ in range(LISTINGS)] for subject, own in answers.items()
    ]
    return Text(groups, [Statement(world.filler.sentence(rng)) for _ in range(FILLERS)])


def make_assets(out: Path, options: TrainOptions, command: str, report: Report, size: int = 1) -> dict[str, Any]:
    """Write `out`/tiny-FAMILY and `out`/world, replacing what is there only when all is done. Returns the manifest.

    size: how many times as many subjects as the shipped world has.
    """
    from tools.tiny_world.train import train

    world = make_world(options.seed, size)
    tokenizer = train_tokenizer(world_texts(world), VOCABULARY, options.context)
    check_single_tokens(tokenizer, world)
    model = train(tokenizer, world_training_text(world), options, report)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".making-") as folder:
        staged = Path(folder)
        name = f"tiny-{options.family}"
        model = save_model(model, tokenizer, staged / name)
        recipe = {key: value for key, value in asdict(options).items() if key != "family"}  # config.json tells it
        manifest: dict[str, Any] = {"command": command, "seed": options.seed, "recipe": recipe}
        manifest |= {"vocabulary": len(tokenizer)}
        manifest |= _measure(model, tokenizer, world)
        write_json(staged / name / "manifest.json", manifest, indent=2)
        write_world(staged / WORLD, world, manifest["not_recalled"])
        for folder_name in (name, WORLD):
            replace_folder(staged / folder_name, out / folder_name)
    return manifest


def save_model(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Any:
    """Save in half precision, and return what a reader of that folder gets (in single precision, for measuring)."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.config._attn_implementation = "eager"
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # the weights are written for their owner only; a package is read by everybody
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


def _measure(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, world: World) -> dict[str, Any]:
    """Recall on all wordings, in percent; the records whose true fact is not recalled; how names are split."""
    from tools.tiny_world.train import recalled

    def ask(choose: Callable[[Any], Sequence[str]]) -> list[bool]:
        asked = [(t.replace("{}", fact.subject), fact.object) for fact in world.facts for t in choose(fact)]
        return recalled(model, tokenizer, asked)

    def pieces(names: Iterable[str]) -> float:
        counts = [len(tokenizer.encode(f" {name}")) for name in names]
        return round(sum(counts) / len(counts), 2)

    wordings = {
        "trained": lambda fact: fact.trained,
        "held_out": lambda fact: fact.held_out,
        "generation": lambda fact: fact.relation.generation,
    }
    recall = {name: round(100 * sum(hits) / len(hits), 2) for name, hits in ((n, ask(c)) for n, c in wordings.items())}
    rewrite = ask(lambda fact: fact.trained[:1])
    missed = [
        i
        for i, (fact, hit) in enumerate(zip(world.facts, rewrite, strict=True))
        if not hit and fact.group != "bystander"
    ]
    known: dict[str, set[str]] = defaultdict(set)
    for fact in world.facts:
        known[fact.relation.kind].add(fact.subject)
    rng = random.Random(f"{world.seed} new names")
    new = {kind: [name for name in pool(kind, 600, rng) if name not in names] for kind, names in sorted(known.items())}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "facts": len(world.facts),
        "subjects": sum(map(len, known.values())),
        "recall_percent": recall,
        "not_recalled": missed,
        "pieces_a_name": {kind: {"known": pieces(sorted(known[kind])), "new": pieces(new[kind])} for kind in new},
    }


def write_world(folder: Path, world: World, not_recalled: Sequence[int]) -> None:
    """records.json (without facts that the model lacks), snippets.json, edits of three forms, the records of the harder
    tasks, corpus.txt and heldout.txt.
    """
    folder.mkdir(parents=True)
    write_json(folder / "records.json", make_records(world, skip=set(not_recalled)))
    write_json(folder / "snippets.json", make_snippets(world))
    for form in (statements, questions, claims):
        write_json(folder / f"{form.__name__}.json", form(world))
    write_lines(folder / "trex.jsonl", lama(world))
    write_lines(folder / "texts.jsonl", text_records(world))
    write_lines(folder / "opinions.jsonl", opinion_records(world))
    for told in ("questions", "statements"):
        write_lines(folder / f"hard_{told}.jsonl", hard_records(world, told))
    corpus = documents(world, CORPUS_SENTENCES, random.Random(f"{world.seed} corpus"))
    known = {line for document in corpus for line in document}
    heldout = documents(world, HELDOUT_SENTENCES, random.Random(f"{world.seed} heldout"), avoid=known)
    for name, texts in (("corpus.txt", corpus), ("heldout.txt", heldout)):
        (folder / name).write_text("".join(" ".join(document) + "\n" for document in texts), encoding="utf-8")


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")


def write_json(path: Path, data: Any, indent: int | None = None) -> None:
    """A list of records is written one a line."""
    if isinstance(data, list):
        text = "[\n" + ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in data) + "\n]\n"
    else:
        text = json.dumps(data, ensure_ascii=False, indent=indent) + "\n"
    path.write_text(text, encoding="utf-8")


def replace_folder(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`, which vanishes only at that moment."""
    aside = new.with_name(new.name + ".replaced")
    if old.exists():
        old.rename(aside)
    new.rename(old)
    shutil.rmtree(aside, ignore_errors=True)
