"""Run directories and edits that come from somebody else: nothing in them names code, settings or the environment, and
nothing in them reaches a terminal as a command.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from embedded import embedded_lm

from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import WeightDelta
from edit_cli.errors import MissingError, UsageError
from edit_cli.lm.embeddings import _refuse_code
from edit_cli.lm.model_files import Source
from edit_cli.requests import EditRequest

NAME = "transformer.h.1.mlp.c_fc.weight"
SECRET = "do-not-tell-5c1f"
CODE = """
from pathlib import Path
from transformers import PretrainedConfig
Path({marker!r}).write_text("code was run")

class Hostile(PretrainedConfig):
    model_type = "hostile"
"""


@pytest.fixture
def edit(tmp_path) -> Path:
    """An edit of the embedded model in a run directory, as it is handed on."""
    lm, folder = embedded_lm(), tmp_path / "run" / "edits" / "0000"
    request = EditRequest("{} is", "Ada", "old", None)
    edit_store.save(WeightDelta({NAME: torch.ones(128, 512)}), folder, lm, [request], {"name": "ft"})
    return folder


@pytest.fixture
def model_with_code(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A model's folder whose own code is run if it is trusted, and the file that the code then writes."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = tmp_path / "hostile", tmp_path / "marker"
    folder.mkdir()
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "hostile", "auto_map": {"AutoConfig": "code.Hostile"}})
    )
    return folder, marker


def say(edit: Path, **base_model: Any) -> None:
    """Let an edit say something else of its model. The id of an edit does not cover it."""
    manifest = json.loads((edit / "edit.json").read_text())
    manifest["base_model"] |= base_model
    (edit / "edit.json").write_text(json.dumps(manifest))


def run_manifest(edit: Path, **model: Any) -> None:
    """A manifest beside the edit, as its run would have left it."""
    about = {"format": 2, "command": "edit", "config_hash": "", "key": ["case_id"], "status": "success"}
    config = {"model": {"type": "model", "name": "m", **model}}
    (edit.parents[1] / "manifest.json").write_text(json.dumps({**about, "config": config}))


def test_code_of_a_foreign_model_is_not_run_unless_it_is_asked_for(cli, edit, model_with_code):
    folder, marker = model_with_code
    say(edit, id=str(folder), name="m", trust_remote_code=True)
    run_manifest(edit, id=str(folder), trust_remote_code=True)
    ended = cli("apply", str(edit), "--out", "baked")
    assert ended.code == 2 and len(ended.err.strip().splitlines()) == 1
    assert "comes with code of its own" in ended.err and "--trust-remote-code" in ended.err
    assert not marker.exists() and not Path("baked").exists()
    cli("apply", str(edit), "--out", "baked", "--trust-remote-code")
    assert marker.read_text() == "code was run"


@pytest.mark.parametrize(
    "words", [("export", "--to", "peft", "--out", "o"), ("export", "--to", "checkpoint", "--out", "o"), ("ask",)]
)
def test_nor_by_the_other_commands_that_take_an_edit(cli, edit, model_with_code, monkeypatch, words):
    monkeypatch.setenv("SECRET", SECRET)
    folder, marker = model_with_code
    say(edit, id=str(folder), name="m", trust_remote_code=True)
    run_manifest(edit, id=str(folder), trust_remote_code=True)
    ended = cli(words[0], str(edit), *(words[1:] or ("x",)))
    assert ended.code == 2 and "comes with code of its own" in ended.err
    assert not marker.exists() and not Path("o").exists()
    say(edit, id="./nowhere", revision="${oc.env:SECRET}")
    ended = cli(words[0], str(edit), *(words[1:] or ("x",)))
    assert ended.code == 3 and SECRET not in ended.err + ended.out


def test_what_a_run_says_of_its_model_is_not_asked(cli, edit, model_with_code, monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    folder, marker = model_with_code
    for settings in ({"id": str(folder), "trust_remote_code": True}, {"id": "${oc.env:SECRET}"}, {"id": 5}):
        run_manifest(edit, **settings)
        assert cli("apply", str(edit), "--out", f"baked{len(list(Path().iterdir()))}").code == 0
    assert not marker.exists()


@pytest.mark.parametrize("field", ["id", "revision", "name"])
def test_nothing_is_filled_in_from_the_environment(cli, edit, monkeypatch, field):
    monkeypatch.setenv("SECRET", SECRET)
    say(edit, **{"name": "m", "id": "./nowhere", field: "${oc.env:SECRET}"})
    ended = cli("apply", str(edit), "--out", "baked")
    assert ended.code == 3 and len(ended.err.strip().splitlines()) == 1
    assert SECRET not in ended.err + ended.out
    assert "model.id=${oc.env:SECRET}" in ended.err if field == "id" else "model.id=./nowhere" in ended.err


def test_the_name_of_a_packaged_model_stands_for_none_of_another_id(cli, edit, model_with_code):
    folder, marker = model_with_code
    say(edit, name="tiny-gpt2", id=str(folder))
    assert cli("apply", str(edit), "--out", "baked").code == 2
    assert not marker.exists()


def test_sentence_models_with_code_of_their_own_are_refused(tmp_path):
    parts = [{"idx": 0, "type": "sentence_transformers.models.Transformer"}, {"idx": 1, "type": "code.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(parts))
    with pytest.raises(UsageError, match=r"comes with code of its own \(code.Pooling\), which is never run"):
        _refuse_code(Source(str(tmp_path), None, True), "x")
    (tmp_path / "modules.json").write_text(json.dumps(parts[:1]))
    _refuse_code(Source(str(tmp_path), None, True), "x")
    for damaged in ("5", "[5]", "{", '[{"name": "x"}]'):
        (tmp_path / "modules.json").write_text(damaged)
        with pytest.raises(MissingError, match=r"modules\.json is damaged"):
            _refuse_code(Source(str(tmp_path), None, True), "x")


def test_names_are_no_formulas_in_figures(cli):
    """A dollar sign begins one for the library that draws, and most texts are none."""
    few = ("method=ft", "method.steps=1", "limit=1", "protocol.observe.generate=false")
    for name in ("$\\frac{1", "a$\x1b$b"):
        ended = cli("evaluate", *few, f"tag={name}", "run_dir=r", "overwrite=true", quick=True)
        assert ended.code == 0, ended.err
        assert cli("compare", "r", "--by", "tag", "--x", "tag", "--out", "figure").code == 0


HOSTILE = "A\x1b]0;owned\x07B\x1b[2J\x9b31mC\u202eD"


def test_control_characters_in_records_do_not_reach_the_terminal(cli):
    fact = {"id": HOSTILE, "prompt": f"{{}} {HOSTILE} is", "subject": f"Ada{HOSTILE}", "target_new": f"old{HOSTILE}"}
    bad = {"id": f"bad{HOSTILE}", "prompt": HOSTILE, "subject": 5, "target_new": "x", f"more{HOSTILE}": 1}
    Path("facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (fact, bad)))
    ended = cli("edit", "method=ft", "method.steps=1", "dataset.path=facts.jsonl", "run_dir=r", quick=True)
    assert ended.code == 0
    shown = [ended, cli("show", "r"), cli("show", "r", "--case", HOSTILE), cli("show", "r", "--case", f"x{HOSTILE}")]
    shown += [cli("show", f"no{HOSTILE}"), cli("ls", "runs", "--runs-dir", ".")]
    assert [each.code for each in shown] == [0, 0, 0, 3, 3, 0]
    for each in shown:
        sent = each.out + each.err
        assert not {character for character in sent if ord(character) < 32 or 127 <= ord(character) < 160} - {"\n"}
        assert "\u202e" not in sent
    assert all(r"\x1b]0;owned\x07" in each.out + each.err for each in shown[:5])
