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
    ],
)
def test_what_is_wrong_is_named(lm, wrong, named):
    with pytest.raises(UsageError, match=re.escape(named)):
        edit_cli.edit(lm, wrong.pop("facts", FACTS), **wrong)


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
