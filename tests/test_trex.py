"""T-REx facts and their modification, constrained fine-tuning, and its two metrics (Zhu et al., 2020)."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from embedded import embedded_lm

from edit_cli.datasets.trex import TREx
from edit_cli.editors.base import Context
from edit_cli.editors.finetune.ft import FT, FTConfig
from edit_cli.edits.edit import Factors
from edit_cli.errors import MissingError, UsageError
from edit_cli.metrics.published import published_values
from edit_cli.requests import Case, EditRequest


def fact(subject: str, object_: str, relation: str = "P19", **more) -> dict:
    sentence = f"{subject} was born in [MASK]."
    return {
        "uuid": f"{relation}-{subject}",
        "predicate_id": relation,
        "sub_label": subject,
        "obj_label": object_,
        "evidences": [{"masked_sentence": f"In [MASK], {subject} lived."}, {"masked_sentence": sentence}],
    } | more


BORN = [fact("Ada", "London"), fact("Kurt", "Brünn"), fact("Emmy", "Erlangen"), fact("Alan", "London")]


def written(folder: Path, rows: list, name: str = "P19.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder / name


def test_a_fact_gets_the_object_of_another_one_of_its_relation(tmp_path):
    path = written(tmp_path, [*BORN, fact("Rome", "Italy", "P17")])
    loaded = TREx("trex", path=str(path), locality=1, split="all").load()
    assert [case.id for case in loaded.cases] == [f"P19-{name}" for name in ("Ada", "Kurt", "Emmy", "Alan")]
    for case, row in zip(loaded.cases, BORN, strict=True):
        (request,) = case.requests
        assert (request.text, request.target_true) == (f"{row['sub_label']} was born in", row["obj_label"])
        assert request.target_new in {"London", "Brünn", "Erlangen"} - {row["obj_label"]}
        kept = [probe for probe in case.probes if probe.kind == "locality"]
        assert kept and all(probe.prompt != request.text for probe in kept)
        assert {(probe.prompt, probe.target) for probe in kept} <= {
            (f"{other['sub_label']} was born in", other["obj_label"]) for other in BORN
        }


def test_templates_stand_for_sentences_and_a_folder_for_its_files(tmp_path):
    folder = tmp_path / "TREx"
    written(folder, BORN)
    written(folder, [fact("Rome", "Italy", "P36"), fact("Oslo", "Norway", "P36")], "P36.jsonl")
    templates = [
        {"relation": "P19", "template": "[X] comes from [Y] ."},
        {"relation": "P36", "template": "[Y] has the capital [X] ."},  # its object does not stand at the end
    ]
    file = written(folder, templates, "relations.jsonl")
    loaded = TREx("trex", path=str(folder), templates=str(file), split="all", locality=0).load()
    assert [case.requests[0].text for case in loaded.cases] == [f"{row['sub_label']} comes from" for row in BORN]
    assert [str(drop) for drop in loaded.dropped] == [
        f"P36.jsonl, line {line} (id P36-{name}): predicate_id has no template whose object stands at the end"
        for line, name in ((1, "Rome"), (2, "Oslo"))
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sub_label": None}, "sub_label is missing"),
        ({"sub_label": " "}, "sub_label is empty"),
        ({"obj_label": 7}, "obj_label is not text"),
        ({"predicate_id": None}, "predicate_id is missing"),
        ({"predicate_id": ["P19"]}, "predicate_id is not text"),
        ({"evidences": None}, "evidences is missing"),
        ({"evidences": "[MASK]"}, "evidences is not a list of objects"),
        ({"evidences": []}, "evidences has no sentence that names the subject and ends with the object"),
        ({"evidences": [{"masked_sentence": "[MASK] is Ada's home."}]}, "evidences has no sentence that names"),
        ({"evidences": [{"masked_sentence": "He was born in [MASK]."}]}, "evidences has no sentence that names"),
        ({"uuid": {}}, "uuid is neither a number nor text"),
    ],
)
def test_malformed_records_are_named_by_line_and_field(tmp_path, change, told):
    path = written(tmp_path, [BORN[0] | change, *BORN[1:]])
    (dropped,) = TREx("trex", path=str(path), split="all").load().dropped
    assert dropped.where == "line 1" and told in str(dropped)


def test_what_cannot_be_modified_is_refused(tmp_path):
    path = written(tmp_path, [fact("Ada", "London"), fact("Rome", "Italy", "P17")])
    with pytest.raises(MissingError, match="no relation has two objects"):
        TREx("trex", path=str(path), split="all").load()
    (tmp_path / "none").mkdir()
    with pytest.raises(MissingError, match="a folder without files"):
        TREx("trex", path=str(tmp_path / "none")).load()


def test_the_embedded_twin_asks_what_the_embedded_model_knows():
    loaded = TREx("trex", records="world").load(5)
    assert loaded.split == "test" and len(loaded.cases) == 5
    lm = embedded_lm()
    requests = [case.requests[0] for case in loaded.cases]
    answers = lm.loglikelihood([(request.text, request.target_true or "") for request in requests])
    assert sum(all(answer.hits) for answer in answers) >= 4


REQUESTS = [
    EditRequest("{} was born in", "Jormia Stenenen", "Rome"),
    EditRequest("{} plays the", "Jortia Hovofeld", "organ"),
]


def dense(update: torch.Tensor | Factors) -> torch.Tensor:
    assert isinstance(update, torch.Tensor)
    return update


@pytest.mark.parametrize("part", ["mlp_out", "block"])
def test_the_l2_constraint_holds_for_all_tuned_weights_together(part):
    config = FTConfig(layers=[1, 2], part=part, steps=6, norm_constraint=0.05, norm="l2", stop_loss=0.0)
    edit = FT(config, embedded_lm()).edit(REQUESTS)
    moves = [dense(update).double() for update in edit.updates.values()]
    assert math.sqrt(sum(float(move.square().sum()) for move in moves)) == pytest.approx(0.05, rel=1e-4)


def test_within_the_ball_nothing_is_shortened():
    free = FTConfig(layers=[1], steps=3, stop_loss=0.0)
    wide = replace(free, norm_constraint=1e3, norm="l2")
    first, second = (FT(config, embedded_lm()).edit(REQUESTS) for config in (free, wide))
    assert all(torch.equal(dense(first.updates[name]), dense(second.updates[name])) for name in first.updates)


class Others:
    """Records that are neither edited nor asked about."""

    def __call__(self, split):
        return []

    def others(self):
        return [Case(str(n), (EditRequest(f"Fact {n} is", None, "x", f"kept {n}"),), ()) for n in range(3)]


def test_unmodified_facts_are_learnt_along_with_the_modified_ones():
    editor = FT(FTConfig(layers=[1], unmodified=1), embedded_lm(), Context(Others()))
    facts = editor.facts(REQUESTS)
    assert facts[::2] == [(request.text, request.target_new) for request in REQUESTS]
    known = {(f"Fact {n} is", f"kept {n}") for n in range(3)}
    assert set(facts[1::2]) <= known and len(set(facts[1::2])) == 2
    assert editor.facts(REQUESTS) == facts
    with pytest.raises(UsageError, match="method.unmodified=2"):
        FT(FTConfig(layers=[1], unmodified=2), embedded_lm(), Context(Others())).facts(REQUESTS)
    with pytest.raises(UsageError, match="method.unmodified=1"):
        FT(FTConfig(layers=[1], unmodified=1), embedded_lm()).facts(REQUESTS)


def asked(kind: str, hits: list[bool], said: str, target: str = "Rome") -> dict:
    return {"kind": kind, "prompt": f"{kind}?", "target": target, "target_hits": hits, "generated": said}


def test_unmodified_facts_are_those_that_the_model_knew():
    before = [
        asked("rewrite", [False], " Oslo."),
        asked("locality", [True, True], " Rome."),
        asked("locality", [True], " Paris."),
        asked("locality", [False], " Rome."),
    ]
    after = [
        asked("rewrite", [True], " Rome."),
        asked("locality", [True, False], " Rome."),
        asked("locality", [True], " Paris."),
        asked("locality", [True], " Oslo."),
    ]
    line = {"before": {"probes": before}, "after": {"probes": after}}
    found = published_values(line, "after", {"efficacy_accuracy": 100.0, "efficacy_generated_exact": 100.0})
    assert {name: found[name] for name in ("modified_accuracy", "modified_written")} == {
        "modified_accuracy": 100.0,
        "modified_written": 100.0,
    }
    assert found["unmodified_accuracy"] == 50.0  # of the first two, which it knew
    assert found["unmodified_written"] == 50.0  # of the first and the third, which it wrote
    assert published_values(line, "before", {})["unmodified_accuracy"] == 100.0
