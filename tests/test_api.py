"""The commands' work in Python."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from embedded import same_bits, snapshot
from families import tiny

import edit_cli
from edit_cli.errors import MissingError, UsageError

FACTS = [
    {
        "prompt": "{} plays the",
        "subject": "Jormia Stenenen",
        "target_new": "organ",
        "paraphrases": ["Jormia Stenenen produces music on the"],
        "neighbors": ["Jortia Hovofeld plays the"],
    }
]
FT: dict[str, Any] = {"method": "ft", "settings": {"steps": 10}}


@pytest.fixture(scope="module")
def lm():
    return edit_cli.load("tiny-gpt2", device="cpu")


def test_an_edit_is_made_asked_kept_and_put_on_again(lm, tmp_path):
    untouched = snapshot(lm)
    edit = edit_cli.edit(lm, FACTS, **FT)
    assert same_bits(snapshot(lm), untouched)
    with lm.edited(edit):
        (written,) = lm.generate(["Jormia Stenenen plays the"], 2)
    assert written.split()[0].strip(".") == "organ"
    found = edit_cli.evaluate(lm, edit, FACTS, perplexity=False)
    assert found["efficacy_accuracy"]["before"]["mean"] == 0 and found["efficacy_accuracy"]["after"]["mean"] == 100
    assert found["neighborhood_generated_unchanged"]["after"]["n"] == 1
    assert same_bits(snapshot(lm), untouched)
    edit_cli.save(edit, tmp_path / "edit", lm, FACTS, "ft")
    edit_cli.attach(tmp_path / "edit", lm)
    assert lm.generate(["Jormia Stenenen plays the"], 2) == [written]
    lm.detach()
    assert same_bits(snapshot(lm), untouched)
    with pytest.raises(MissingError, match="no edit"):
        edit_cli.attach(tmp_path / "nothing", lm)


def test_it_is_the_edit_that_the_command_makes(lm, cli, tmp_path):
    Path("facts.jsonl").write_text("\n".join(map(json.dumps, FACTS)))
    ended = cli("edit", "method=ft", "method.steps=10", "dataset.path=facts.jsonl", "run_dir=run", quick=True)
    assert ended.code == 0, ended.err
    edit = edit_cli.edit(lm, FACTS, **FT)
    edit_cli.attach("run/edits/0000", lm)
    bits = snapshot(lm)
    lm.detach()
    with lm.edited(edit):
        assert same_bits(snapshot(lm), bits)


def test_a_saved_edit_holds_the_settings_it_was_made_with(lm, tmp_path):
    other = {"prompt": "{} was born in", "subject": "Jortia Hovofeld", "target_new": "Paris"}
    edit_cli.save(edit_cli.edit(lm, [*FACTS, other], **FT), tmp_path / "two", lm)
    made = json.loads((tmp_path / "two" / "edit.json").read_text())
    assert (made["method"]["name"], made["method"]["steps"]) == ("ft", 10)
    assert [request["subject"] for request in made["requests"]] == ["Jormia Stenenen", "Jortia Hovofeld"]
    edit_cli.undo(tmp_path / "two", ["Jormia Stenenen"], tmp_path / "one", lm)
    edit_cli.attach(tmp_path / "one", lm)
    left = snapshot(lm)
    lm.detach()
    with lm.edited(edit_cli.edit(lm, [other], **FT)):
        assert same_bits(snapshot(lm), left)


def test_an_edit_from_elsewhere_is_told_what_it_was_made_for(lm, tmp_path):
    edit = edit_cli.edit(lm, FACTS, **FT)
    edit_cli.save(edit, tmp_path / "renamed", lm, method="mine")
    assert json.loads((tmp_path / "renamed" / "edit.json").read_text())["method"] == {"name": "mine"}
    (again,) = edit_cli.attach(tmp_path / "renamed", lm)
    lm.detach()
    with pytest.raises(UsageError, match="facts: say what the edit was made for"):
        edit_cli.save(again, tmp_path / "again", lm)
    edit_cli.save(again, tmp_path / "again", lm, FACTS)
    told = json.loads((tmp_path / "again" / "edit.json").read_text())
    assert told["method"] == {"name": "python"} and told["requests"][0]["subject"] == "Jormia Stenenen"


def test_a_folder_that_is_in_use_keeps_what_it_holds(lm, tmp_path):
    edit = edit_cli.edit(lm, FACTS, **FT)
    edit_cli.save(edit, tmp_path / "kept", lm)
    before = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    with pytest.raises(UsageError, match="^directory .*kept is there already: name a new folder$"):
        edit_cli.save(edit, tmp_path / "kept", lm, method="other")
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == before


def test_a_model_that_is_loaded_already_can_be_edited():
    model, tokenizer = tiny("llama")
    lm = edit_cli.load(model, tokenizer)
    fact = {"prompt": "{} lives in", "subject": "Ada Lund", "target_new": "Oslo"}
    edit = edit_cli.edit(lm, [fact], method="ft", settings={"layers": [1], "steps": 5, "lr": 1e-2})
    pair = [("Ada Lund lives in", "Oslo")]
    before = lm.loglikelihood(pair)[0].nll
    with lm.edited(edit):
        assert lm.loglikelihood(pair)[0].nll < before
    with pytest.raises(UsageError, match="comes with its tokenizer"):
        edit_cli.load(model)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"method": "nope"}, "method/nope is no option"),
        ({"settings": {"nokey": 1}}, "unknown key method.nokey"),
        ({"method": "ft", "settings": {"steps": "many"}}, "method.steps=many: give a whole number"),
        ({"method": "ft", "settings": {"layers": [77]}}, "layer 77 does not exist"),
        ({"facts": [{"prompt": "x"}]}, "fact 0: subject is missing"),
        ({"facts": []}, "facts: give a list of them"),
        ({"facts": FACTS[0]}, "facts: give a list of them"),
        ({"facts": ["Rome"]}, "facts: give a list of them"),
        ({"chat": {"sytem": "x"}}, "unknown key protocol.sytem; did you mean system?"),
    ],
)
def test_what_is_wrong_is_named(lm, wrong, named):
    with pytest.raises(UsageError, match=re.escape(named)):
        edit_cli.edit(lm, wrong.pop("facts", FACTS), **wrong)


BORN = [{"prompt": "{} was born in", "subject": "Jortia Hovofeld", "target_new": "Paris"}]


def test_an_edit_on_top_of_another_is_kept_with_it(lm, tmp_path):
    asked = ["Jormia Stenenen plays the", "Jortia Hovofeld was born in"]
    first = edit_cli.edit(lm, FACTS, method="ft", settings={"steps": 10, "layers": [1]})
    edit_cli.save(first, tmp_path / "first", lm)
    lm.attach(first)
    with pytest.raises(UsageError, match="this edit is in place"):
        edit_cli.save(first, tmp_path / "wrong", lm)
    with pytest.raises(UsageError, match="this edit is in place"):
        edit_cli.evaluate(lm, first, FACTS)
    second = edit_cli.edit(lm, BORN, method="ft", settings={"steps": 10, "layers": [4]})
    with pytest.raises(UsageError, match="1 edit in place, and base tells of nothing"):
        edit_cli.save(second, tmp_path / "wrong", lm)
    edit_cli.save(second, tmp_path / "second", lm, base=tmp_path / "first")
    with lm.edited(second):
        both = lm.generate(asked, 2)
    lm.detach()
    with pytest.raises(UsageError, match="0 edits in place"):
        edit_cli.save(second, tmp_path / "wrong", lm, base=tmp_path / "first")
    assert not (tmp_path / "wrong").exists()
    assert len(edit_cli.attach(tmp_path / "second", lm)) == 2
    assert lm.generate(asked, 2) == both and [text.split()[0].strip(".") for text in both] == ["organ", "Paris"]
    lm.detach()
    lm.detach()


def test_a_memory_in_front_is_in_place_once(lm):
    edit = edit_cli.edit(lm, FACTS, method="lookup")
    with lm.edited(edit):
        answer = lm.generate(["Jormia Stenenen plays the"], 2)
        with pytest.raises(UsageError, match="in place on a model already"):
            edit_cli.load("tiny-gpt2", device="cpu").attach(edit)
        assert lm.generate(["Jormia Stenenen plays the"], 2) == answer == [" organ"]
    with lm.edited(edit):
        assert lm.generate(["Jormia Stenenen plays the"], 2) == answer


def test_one_fact_can_be_named_without_a_list(lm, tmp_path):
    edit_cli.save(edit_cli.edit(lm, [*FACTS, *BORN], **FT), tmp_path / "two", lm)
    with pytest.raises(UsageError, match="name at least one"):
        edit_cli.undo(tmp_path / "two", [], tmp_path / "none", lm)
    with pytest.raises(UsageError, match="--fact Nobody is none"):
        edit_cli.undo(tmp_path / "two", "Nobody", tmp_path / "none", lm)
    edit_cli.undo(tmp_path / "two", "Jormia Stenenen", tmp_path / "one", lm)
    with pytest.raises(UsageError, match="unknown key protocol.observe.generat"):
        edit_cli.evaluate(lm, edit_cli.edit(lm, BORN, **FT), BORN, generat=False)


def test_a_run_and_a_step_of_it_are_attached_with_what_they_stand_on(lm, cli, tmp_path):
    """The third of three steps has the edits of all three, and the second those of two; none is an edit by itself."""
    words = ("sequential", "method=lookup", "method.mode=exact", "limit=3", "protocol.batch_size=1", "run_dir=steps",
             "protocol.holdout=0", "protocol.observe.generate=false")  # fmt: skip
    assert cli(*words, quick=True).code == 0
    for place, count in (("steps", 3), ("steps/edits", 3), ("steps/edits/00002", 3), ("steps/edits/00001", 2)):
        assert len(edit_cli.attach(place, lm)) == count, place
        for _ in range(count):
            lm.detach()
    first = json.loads(Path("steps/edits/00000/edit.json").read_text())["requests"][0]
    asked = first["prompt"].replace("{}", first["subject"])
    ended = cli("ask", "steps/edits/00002", asked, "--json")
    assert ended.code == 0 and json.loads(ended.out)["edited"].strip().startswith(first["target_new"]), ended.out
    refused = cli("edit", "method=ft", "edit.prompt=x", "edit.target=y", "base_edit=steps/edits/00002", quick=True)
    assert refused.code == 2 and "one of the steps of a sequence" in refused.err


def test_the_package_alone_loads_nothing_heavy():
    code = "import sys, edit_cli; print(sorted({'torch', 'transformers', 'hydra'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError):
        _ = edit_cli.nothing


def test_the_page_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "python.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    said: list[Any] = []
    code = code.replace('"tiny-gpt2")', '"tiny-gpt2", device="cpu")').replace(
        '{"value.steps": 20}', '{"use_covariance": False}'
    )
    exec(code, {"print": said.append})
    assert said[0][0].split()[0].strip(".") == "organ" and said[1]["after"]["mean"] in (0.0, 100.0)
