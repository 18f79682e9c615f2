"""The shipped tiny model and world: form of the records, recall, size, and that the seed reproduces the world."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import edit_cli
from tools.tiny_world.assets import HELDOUT_SENTENCES
from tools.tiny_world.names import SYLLABLES, pool
from tools.tiny_world.records import BLOCK, make_records, make_snippets
from tools.tiny_world.world import GROUPS, Fact, World, documents, load_relations, make_world

ASSETS = Path(edit_cli.__file__).parent / "assets"


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return json.loads((ASSETS / "world" / "records.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def manifest() -> dict:
    return json.loads((ASSETS / "tiny-gpt2" / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def world(manifest: dict) -> World:
    return make_world(manifest["seed"])


def test_relations_have_enough_clean_templates() -> None:
    relations, _ = load_relations()
    assert len(relations) >= 19
    for relation in relations:
        templates = relation.templates + relation.generation
        assert len(relation.templates) >= 10 and len(relation.generation) >= 3, relation.id
        assert len(set(templates)) == len(templates), relation.id
        assert all(template.count("{}") == 1 and template == template.strip() for template in templates), relation.id
        assert len(set(relation.objects)) == len(relation.objects) >= 5, relation.id


def test_every_record_has_counterfacts_full_schema(records: list[dict]) -> None:
    assert len({record["case_id"] for record in records}) == len(records)
    for record in records:
        rewrite = record["requested_rewrite"]
        assert rewrite["prompt"].count("{}") == 1 and rewrite["relation_id"] and isinstance(record["pararel_idx"], int)
        assert rewrite["target_new"]["str"] != rewrite["target_true"]["str"]
        assert rewrite["target_new"]["id"] != rewrite["target_true"]["id"]
        assert len(record["paraphrase_prompts"]) == 2
        assert 5 <= len(record["neighborhood_prompts"]) <= 10 and 5 <= len(record["attribute_prompts"]) <= 10
        assert len(record["generation_prompts"]) >= 3
        assert record["split"] in ("tune", "test")
        about_subject = record["paraphrase_prompts"] + record["generation_prompts"]
        assert all(rewrite["subject"] in prompt for prompt in about_subject)
        others = record["neighborhood_prompts"] + record["attribute_prompts"]
        assert not any(rewrite["subject"] in prompt for prompt in others)
        texts = [rewrite["prompt"], rewrite["subject"], rewrite["target_new"]["str"], rewrite["target_true"]["str"]]
        assert all(text == text.strip() and text for text in texts + about_subject + others)


def test_there_are_enough_records_and_the_splits_share_no_subject(records: list[dict]) -> None:
    subjects = {
        split: [r["requested_rewrite"]["subject"] for r in records if r["split"] == split] for split in ("test", "tune")
    }
    assert len(subjects["test"]) >= 1000 and len(subjects["tune"]) >= 300
    assert not set(subjects["test"]) & set(subjects["tune"])
    for own in subjects.values():
        for start in range(0, len(own), BLOCK):
            block = own[start : start + BLOCK]
            assert len(set(block)) == len(block), "a hundred edits at once would hold two of one subject"


def test_no_run_edits_a_neighbor(records: list[dict]) -> None:
    for split in ("test", "tune"):
        own = [record for record in records if record["split"] == split]
        edited = {record["requested_rewrite"]["subject"] for record in own}
        prompts = [prompt for record in own for prompt in record["neighborhood_prompts"] + record["attribute_prompts"]]
        assert not [prompt for prompt in prompts if any(subject in prompt for subject in edited)]


def test_paraphrases_use_templates_that_never_told_the_fact(records: list[dict], world: World) -> None:
    def ends_with(prompt: str, template: str, fact: Fact) -> bool:
        return prompt.endswith(template.replace("{}", fact.subject))

    for record in records:
        fact = world.facts[record["case_id"]]
        assert (
            fact.subject == record["requested_rewrite"]["subject"]
            and record["requested_rewrite"]["prompt"] in fact.trained
        )
        assert not set(fact.trained) & set(fact.held_out)
        for prompt in record["paraphrase_prompts"]:
            assert any(ends_with(prompt, template, fact) for template in fact.held_out)
            assert not any(ends_with(prompt, template, fact) for template in fact.trained + fact.relation.generation)


def test_the_seed_makes_the_shipped_world(records: list[dict], manifest: dict, world: World) -> None:
    folder = ASSETS / "world"
    assert make_records(world, skip=set(manifest["not_recalled"])) == records
    assert make_snippets(world) == json.loads((folder / "snippets.json").read_text(encoding="utf-8"))
    corpus = (folder / "corpus.txt").read_text(encoding="utf-8").splitlines()
    again = documents(world, 50, random.Random(f"{world.seed} corpus"))
    assert [" ".join(document) for document in again] == corpus[: len(again)]
    assert make_world(manifest["seed"] + 1).facts != world.facts


def test_a_larger_world_has_as_many_times_the_subjects(world: World) -> None:
    larger = make_world(world.seed, 3)
    for group in GROUPS:
        subjects, own = ({fact.subject for fact in one.facts if fact.group == group} for one in (larger, world))
        assert len(subjects) == 3 * len(own)


def test_heldout_text_is_not_in_the_corpus() -> None:
    folder = ASSETS / "world"
    corpus, heldout = ((folder / name).read_text(encoding="utf-8") for name in ("corpus.txt", "heldout.txt"))
    assert len(heldout.splitlines()) * 8 >= HELDOUT_SENTENCES
    told, kept_back = (set(text.replace(".\n", ". ").split(". ")) - {""} for text in (corpus, heldout))
    assert told and kept_back and not told & kept_back


def test_every_new_target_has_reference_texts(records: list[dict], world: World) -> None:
    snippets = {(entry["relation_id"], entry["target_id"]): entry["samples"] for entry in make_snippets(world)}
    for record in records:
        rewrite = record["requested_rewrite"]
        samples = snippets[rewrite["relation_id"], rewrite["target_new"]["id"]]
        assert samples
        assert all(
            sample["name"] in sample["text"] and rewrite["target_new"]["str"] in sample["text"] for sample in samples
        )


def test_assets_are_small_and_free_of_pickle() -> None:
    files = [path for path in (ASSETS / "tiny-gpt2").iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5e6
    assert (ASSETS / "world" / "records.json").stat().st_size <= 3.5e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_names_are_distinct_and_a_pool_has_an_end() -> None:
    for kind in SYLLABLES:
        names = pool(kind, 500, random.Random(0))
        assert len(set(names)) == 500 and names == pool(kind, 500, random.Random(0))
    with pytest.raises(ValueError, match="can be built"):
        pool("city", 10**6, random.Random(0))
