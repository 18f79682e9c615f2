"""Prompts put to a model with and without an edit, and lists of saved edits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from embedded import embedded_lm

from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import WeightDelta
from edit_cli.requests import EditRequest

FACT = ("edit.prompt={} plays the", "edit.subject=Jormia Stenenen", "edit.target=organ")
OTHER = ("edit.prompt={} was born in", "edit.subject=Jortia Hovofeld", "edit.target=Paris")
PROMPT, BORN = "Jormia Stenenen plays the", "Jortia Hovofeld was born in"
LONGER = ("--max-new-tokens", "4")
NAME = "transformer.h.1.mlp.c_fc.weight"
HOSTILE = "A\x1b]0;owned\x07B\x1b[2J\x9b31mC\u202eD"


@pytest.fixture(scope="module")
def made(tmp_path_factory, cache_dir) -> Path:
    """A folder with two weight edits, the second on top of the first, and a lookup cache."""
    from conftest import invoke

    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in (
            ("method=ft", *FACT, "run_dir=first"),
            ("method=ft", *OTHER, "run_dir=second", "base_edit=first/edits/0000"),
            ("method=lookup", *OTHER, "run_dir=route"),
        ):
            ended = invoke(cache_dir, "edit", *words, quick=True)
            assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def there(made, cli, monkeypatch):
    """Run commands where those edits lie."""
    monkeypatch.chdir(made)
    return cli


def objects(text: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in text.splitlines()]


def test_both_answers_are_shown_and_are_those_of_the_library(there):
    ended = there("ask", "second", PROMPT, BORN, *LONGER)
    assert ended.code == 0, ended.err
    lm = embedded_lm()
    base = [lm.generate([prompt], 4)[0] for prompt in (PROMPT, BORN)]
    edit_store.attach("second/edits/0000", lm)
    edited = [lm.generate([prompt], 4)[0] for prompt in (PROMPT, BORN)]
    assert edited[0].startswith(" organ") and edited[1].startswith(" Paris") and base != edited
    wanted = []
    for prompt, before, after in zip((PROMPT, BORN), base, edited, strict=True):
        wanted += [prompt, f"  base    {before.strip()}", f"  edited  {after.strip()}"]
    assert ended.out.splitlines() == wanted
    found = objects(there("ask", "second", PROMPT, BORN, *LONGER, "--json").out)
    assert [(each["prompt"], each["base"], each["edited"]) for each in found] == list(
        zip((PROMPT, BORN), base, edited, strict=True)
    )


def test_any_kind_of_edit_can_be_asked_and_the_base_left_alone(there):
    ended = there("ask", "route", BORN, "--edited-only", *LONGER)
    assert (ended.code, ended.out.splitlines()) == (0, [BORN, "  edited  Paris"])


def typed(text: bytes, *words: str):
    """`ask` with standard input."""
    from typer.testing import CliRunner

    from edit_cli.cli.main import app

    result = CliRunner().invoke(app, ["ask", *words], input=text, prog_name="edit-cli")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_prompts_come_from_standard_input_and_a_bad_one_does_not_end_it(there):
    lines = f"{PROMPT}\n\n{'word ' * 600}\n".encode() + b"\xff\x1b[2J is\r\n" + BORN.encode()
    ended = typed(lines, "second", *LONGER)
    assert ended.exit_code == 0
    shown = [line for line in ended.stdout.splitlines() if not line.startswith("  ")]
    assert shown == [PROMPT, "\ufffd\\x1b[2J is", BORN]
    (line,) = [line for line in ended.stderr.splitlines() if "error" in line]
    assert "this prompt cannot be asked" in line and "tokens" in line
    found = objects(typed(lines, "second", *LONGER, "--json").stdout)
    assert [each["prompt"] for each in found] == [PROMPT, "\ufffd\x1b[2J is", BORN]
    assert typed(b"", "second").exit_code == 0


def test_drawn_answers_hang_on_the_seed_alone(there):
    def answers(*words: str) -> list[str]:
        ended = there("ask", "first", PROMPT, BORN, "--edited-only", "--sample", "40", "--json", *words)
        assert ended.code == 0, ended.err
        return [each["edited"] for each in objects(ended.out)]

    first = answers("--seed", "3")
    assert first == answers("--seed", "3") and first != answers("--seed", "4")
    assert not any(text.startswith(PROMPT) for text in first)
    assert answers("--sample", "1")[0] == objects(there("ask", "first", PROMPT, "--json").out)[0]["edited"]


def test_a_model_in_a_folder_is_found_from_anywhere(cli, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    embedded_lm().model.save_pretrained("model")
    embedded_lm().tokenizer.save_pretrained("model")
    words = ("edit", "method=ft", "model=hf", "model.id=model", "method.layers=[1]", *FACT, "run_dir=own")
    assert cli(*words, quick=True).code == 0
    monkeypatch.chdir(tmp_path)
    assert cli("ask", "here/own", PROMPT).code == 0
    Path("here/model").rename("elsewhere")
    ended = cli("ask", "here/own", PROMPT)
    assert (ended.code, "name its folder by --model" in ended.err) == (3, True), ended.err
    assert cli("ask", "here/own", PROMPT, "--model", "elsewhere").code == 0


def test_what_cannot_be_asked_is_refused(there):
    for words, code, told in (
        (("nowhere", "x"), 3, "nowhere"),
        (("first", "word " * 600), 2, "this prompt cannot be asked"),
        (("first", ""), 2, "this prompt cannot be asked"),
        (("first", "x", "--sample", "0"), 2, "--sample"),
        (("first", "x", "--model", "nothing"), 3, "--model nothing"),
    ):
        ended = there("ask", *words)
        assert (ended.code, told in ended.err) == (code, True), ended.err


def test_edits_are_listed_with_their_facts_and_what_they_stand_on(there):
    ended = there("edits", ".", "--json")
    rows = {row["path"]: row for row in json.loads(ended.out)}
    assert list(rows) == ["first/edits/0000", "route/edits/0000", "second/edits/0000"]
    first, route, second = rows.values()
    assert [row["kind"] for row in rows.values()] == ["weights", "route", "weights"]
    assert second["parent"] == first["id"] and first["parent"] is None and route["method"] == "lookup"
    assert second["facts"][0]["target_new"] == "Paris"
    for row in rows.values():
        folder = Path(row["path"])
        assert row["bytes"] == sum((folder / name).stat().st_size for name in ("edit.json", "edit.safetensors"))
    shown = there("edits", "second")
    assert shown.code == 0 and f"{BORN} → Paris" in shown.words and first["id"][:8] in shown.words
    chain = json.loads(there("edits", "second/edits/0000", "--json").out)
    assert [row["id"] for row in chain] == [first["id"], second["id"]]


def test_lists_tell_what_is_damaged_and_send_nothing_to_the_terminal(cli):
    lm = embedded_lm()
    facts = [EditRequest("{} is", f"Ada{HOSTILE}", "old", None)] * 5
    edit_store.save(WeightDelta({NAME: torch.ones(128, 512)}), f"many{HOSTILE}", lm, facts, {"name": "ft"})
    edit_store.save(WeightDelta({NAME: torch.ones(128, 512)}), "torn", lm, facts, {"name": "ft"})
    Path("torn/edit.json").write_text("{")
    ended = cli("edits", ".")
    assert ended.code == 0
    assert "… 2 more" in ended.out and "torn" in ended.words and "edit.json" in ended.words
    sent = ended.out + ended.err + cli("ask", f"many{HOSTILE}", f"x{HOSTILE}", "--max-new-tokens", "1").out
    assert not {character for character in sent if ord(character) < 32 or 127 <= ord(character) < 160} - {"\n"}
    assert "\u202e" not in sent
    for nothing in ("nowhere", "empty"):
        Path("empty").mkdir(exist_ok=True)
        ended = cli("edits", nothing)
        assert (ended.code, nothing in ended.err) == (3, True)
