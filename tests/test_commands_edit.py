"""`edit` and `apply`: one fact, a file of facts, an edit on top of another, a plain checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import Killed, exact
from embedded import embedded_lm

from edit_cli.edits import store as edit_store
from edit_cli.writing import bare, joined

FACT = ("edit.prompt={} plays the", "edit.subject=Ada Lund", "edit.target=violin")
OTHER = ("edit.prompt={} was born in", "edit.subject=Bo", "edit.target=Paris")
FT = ("edit", "method=ft", "method.steps=12")


def edit_dir(run: str) -> Path:
    return Path(run, "edits", "0000")


def test_one_fact_is_shown_before_and_after_and_kept(cli):
    ended = cli(*FT, *FACT, "edit.target_true=flute", quick=True)
    assert ended.code == 0
    assert ended.last.startswith("runs/edit/inline/tiny-gpt2/ft-Ada_Lund-violin-")
    expected = (
        "ft on tiny-gpt2: 1 fact edited",
        "Ada Lund plays the",
        "P(violin)",
        "P(flute)",
        f"edit: {edit_dir(ended.last)}",
    )
    for told in expected:
        assert told in ended.out
    manifest = edit_store.read_manifest(edit_dir(ended.last))
    request = {"prompt": "{} plays the", "subject": "Ada Lund", "target_new": "violin", "target_true": "flute"}
    assert manifest["requests"] == [request]
    assert manifest["method"]["name"] == "ft"
    line = json.loads(Path(ended.last, "results.jsonl").read_text())
    before, after = (line[side]["probes"][0]["target_nll"] for side in ("before", "after"))
    assert after < before
    lm = embedded_lm()
    edit_store.attach(edit_dir(ended.last), lm)
    assert lm.loglikelihood([("Ada Lund plays the", "violin")])[0].nll == pytest.approx(after, abs=1e-4)


def test_an_edit_that_is_no_number_is_not_kept(cli):
    ended = cli("edit", "method=ft", "method.lr=1.0e30", *FACT, "run_dir=r", quick=True)
    assert ended.code == 5
    assert "NaN" in ended.err + ended.out and "method.lr" in ended.err + ended.out
    assert not edit_dir("r").exists()
    (line,) = Path("r", "results.jsonl").read_text().splitlines()
    assert "NaN" in json.loads(line)["error"] and json.loads(line)["after"] is None


def test_a_method_of_many_facts_says_what_one_alone_lacks(cli):
    ended = cli("edit", "method=ultraedit", *FACT, "run_dir=r", quick=True)
    assert ended.code == 2
    assert "a first turn of 1 shows too little" in ended.error and "method.begin_with=0" in ended.error
    assert not edit_dir("r").exists()


def test_texts_are_taken_as_they_are(cli):
    fact = (
        'edit.prompt={}\'s motto, "(all: {x=1}, [y])", is',
        "edit.subject=Ada, Bo & Co",
        "edit.target=it's fine, really",
    )
    ended = cli(*FT, *fact, "run_dir=r", quick=True)
    assert ended.code == 0
    (request,) = edit_store.read_manifest(edit_dir("r"))["requests"]
    assert (request["subject"], request["target_new"]) == ("Ada, Bo & Co", "it's fine, really")
    assert request["prompt"] == '{}\'s motto, "(all: {x=1}, [y])", is'


def test_the_subject_may_stand_in_the_prompt(cli):
    assert (
        cli(
            *FT,
            "edit.prompt=Ada Lund plays the",
            "edit.subject=Ada Lund",
            "edit.target=violin",
            "run_dir=r",
            quick=True,
        ).code
        == 0
    )
    assert edit_store.read_manifest(edit_dir("r"))["requests"][0]["prompt"] == "{} plays the"


def test_a_killed_edit_of_several_facts_goes_on_to_the_same_bits(cli, kill_after):
    facts = [{"prompt": "{} plays the", "subject": name, "target_new": "violin"} for name in ("Ada Lund", "Bo", "Cai")]
    Path("facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    command = (*FT, "dataset.path=facts.jsonl")
    assert cli(*command, "run_dir=whole", quick=True).code == 0
    for lines in (1, 1):
        kill_after(lines)
        with pytest.raises(Killed):
            cli(*command, "run_dir=cut", quick=True)
    assert cli(*command, "run_dir=cut", quick=True).code == 0
    assert exact(Path("cut")) == exact(Path("whole"))
    assert edit_store.read_manifest(edit_dir("cut"))["id"] == edit_store.read_manifest(edit_dir("whole"))["id"]


@pytest.mark.parametrize(
    ("fact", "request_"),
    [
        (
            ("edit.prompt=Where does {} live?\n", "edit.subject= Ada Lund ", "edit.target= Oslo ", "edit.target_true="),
            ("Where does {} live?\n", "Ada Lund", "Oslo", None),
        ),
        (
            ("edit.prompt=The Parisian mayor of Paris is", "edit.subject=Paris", "edit.target=Ada", "edit.join=none"),
            ("The Parisian mayor of {} is", "Paris", joined("Ada", "none"), None),
        ),
    ],
)
def test_a_fact_of_the_command_line_is_read_as_one_of_a_file(cli, fact, request_):
    ended = cli("edit", "method=lookup", *fact, "run_dir=r", quick=True)
    assert ended.code == 0
    (found,) = edit_store.read_manifest(edit_dir("r"))["requests"]
    assert tuple(found[key] for key in ("prompt", "subject", "target_new", "target_true")) == request_
    assert f"P({bare(request_[2])})" in ended.out
    (line,) = map(json.loads, Path("r", "results.jsonl").read_text().splitlines())
    (probe,) = line["after"]["probes"]
    assert probe["generated"] == bare(request_[2])  # nothing stands before it
    lm = embedded_lm()
    edit_store.attach(edit_dir("r"), lm)
    assert lm.generate([probe["prompt"]], 3) == [bare(request_[2])]


def test_other_facts_lie_elsewhere_and_the_same_one_is_not_repeated(cli):
    first = cli(*FT, *FACT, quick=True)
    other = cli(*FT, *FACT[:2], "edit.target=piano", quick=True)
    again = cli(*FT, *FACT, quick=True)
    assert first.last != other.last
    assert again.last == first.last
    assert "this edit is there already" in again.err
    assert again.out == first.out


def test_a_file_of_facts_is_edited_at_once(cli):
    rows = [
        {"prompt": "{} plays the", "subject": "Ada", "target_new": "violin", "target_true": "flute"},
        {"prompt": "{} was born in", "subject": "Bo", "target_new": "Paris"},
        {"prompt": "{} was born in", "subject": "Bo", "target_new": ""},
    ]
    Path("facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = cli(*FT, "dataset.path=facts.jsonl", quick=True)
    assert ended.code == 0
    assert re.fullmatch(r"runs/edit/facts/tiny-gpt2/ft-facts-[0-9a-f]{6}", ended.last)
    assert "2 facts edited, all at once" in ended.out
    assert "2 of 3 records (1 unusable)" in ended.out
    assert "line 3" in ended.err
    assert len(edit_store.read_manifest(edit_dir(ended.last))["requests"]) == 2
    shown = cli("show", ended.last)
    assert "Bo was born in" in shown.out


def test_edits_stand_on_each_other(cli):
    first = cli(*FT, *FACT, "run_dir=first", quick=True)
    second = cli(*FT, *OTHER, f"base_edit={edit_dir('first')}", "run_dir=second", quick=True)
    assert (first.code, second.code) == (0, 0)
    assert [path.name for path in edit_store.chain(edit_dir("second"))] == ["base", "0000"]
    lm = embedded_lm()
    assert len(edit_store.attach(edit_dir("second"), lm)) == 2
    line = json.loads(Path("second/results.jsonl").read_text())
    for probe in line["after"]["probes"]:
        assert lm.loglikelihood([(probe["prompt"], probe["target"])])[0].nll == pytest.approx(
            probe["target_nll"], abs=1e-4
        )
    lm.detach()
    for probe in line["before"]["probes"]:
        assert lm.loglikelihood([(probe["prompt"], probe["target"])])[0].nll == pytest.approx(
            probe["target_nll"], abs=1e-4
        )


def facts_file(name: str, *rows: tuple[str, str, str]) -> str:
    keys = ("prompt", "subject", "target_new")
    Path(name).write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    return f"dataset.path={name}"


ADA, BO = ("{} plays the", "Ada Lund", "violin"), ("{} was born in", "Bo", "Paris")


def test_a_second_file_goes_on_top_of_the_first_and_both_edits_stay(cli):
    first = cli(*FT, facts_file("facts.jsonl", ADA), quick=True)
    base = edit_dir(first.last)
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    second = cli(*FT, facts_file("more.jsonl", BO), f"base_edit={base}", quick=True)
    assert (first.code, second.code) == (0, 0)
    assert re.fullmatch(r".*/ft-more-on-[0-9a-f]{6}-[0-9a-f]{6}", second.last)
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before
    assert len(edit_store.chain(edit_dir(second.last))) == 2
    assert cli(*FT, facts_file("more.jsonl", BO), quick=True).last not in (first.last, second.last)
    shutil.copy("more.jsonl", "copy (1).jsonl")
    assert cli(*FT, "dataset.path=copy (1).jsonl", quick=True).last.startswith("runs/edit/facts/tiny-gpt2/ft-copy_1-")


@pytest.mark.slow
def test_nothing_that_is_still_needed_is_cleared(cli):
    assert cli(*FT, facts_file("facts.jsonl", ADA), "run_dir=here", quick=True).code == 0
    shutil.copy("facts.jsonl", "here/facts.jsonl")
    before = {path: path.read_bytes() for path in Path("here").rglob("*") if path.is_file() and path.suffix != ".txt"}
    again = ("run_dir=here", "overwrite=true")
    for needed in (
        f"base_edit={edit_dir('here')}",
        "dataset.path=here/facts.jsonl",
        "model.perplexity_text=here/results.jsonl",
    ):
        ended = cli(*FT, facts_file("more.jsonl", BO), needed, *again, quick=True)
        key = needed.partition("=")[0]
        assert (ended.code, f"overwrite=true would delete here, in which {key}=" in ended.err) == (2, True), ended.err
    damaged = Path("damaged")
    shutil.copytree(edit_dir("here"), damaged)
    (damaged / "edit.safetensors").write_bytes(b"cut")
    for wrong, code in ((f"base_edit={damaged}", 3), ("model.id=/nowhere", 3), ("stats.import_npz=/nowhere", 3)):
        ended = cli("edit", "method=rome", "dataset.path=more.jsonl", wrong, *again, quick=True)
        assert (ended.code, wrong.partition("=")[2] in ended.err) == (code, True)
    after = {path: path.read_bytes() for path in Path("here").rglob("*") if path.is_file() and path.suffix != ".txt"}
    assert after == before
    assert cli(*FT, "dataset.path=more.jsonl", *again, quick=True).code == 0
    assert edit_store.read_manifest(edit_dir("here"))["requests"][0]["subject"] == "Bo"


def test_a_fact_that_did_not_take_is_named(cli):
    rows = facts_file("facts.jsonl", ("{} plays the", "Jormia Stenenen", "organ"), ("{} was born in", "Bo", "quantum"))
    ended = cli("edit", "method=ft", "method.steps=1", "method.lr=1.0e-7", rows, quick=True)
    assert ended.code == 0  # it was made, as asked for
    assert "0 of 2 facts took. These DID NOT:" in ended.out
    assert "Bo was born in → quantum (did not take)" in ended.out
    summary = json.loads(Path(ended.last, "summary.json").read_text())
    assert summary["took"] == {"n": 2, "took": 0, "failed": ["0", "1"]}
    assert cli("show", ended.last).out.splitlines()[:6] == ended.out.splitlines()[:6]
    strict = cli("edit", "method=ft", "method.steps=1", "method.lr=1.0e-7", rows, "must_take=true", quick=True)
    assert (strict.code, strict.last) == (5, ended.last)
    took = cli(*FT, facts_file("other.jsonl", ADA), "must_take=true", quick=True)
    assert (took.code, "It took." in took.out) == (0, True)
    assert cli(*FT, *FACT, "must_take=perhaps").code == 2


# --- apply
# ----------------------------------------------------------------------------------------------------------------------


def logits(model, tokenizer, text: str):
    import torch

    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits


def test_an_applied_edit_is_a_plain_checkpoint(cli):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cli(*FT, *FACT, "run_dir=first", quick=True)
    cli(*FT, *OTHER, f"base_edit={edit_dir('first')}", "run_dir=second", quick=True)
    ended = cli("apply", str(edit_dir("second")), "--out", "baked")
    assert (ended.code, ended.last) == (0, "baked")
    lm = embedded_lm()
    edit_store.attach(edit_dir("second"), lm)
    plain = AutoModelForCausalLM.from_pretrained("baked", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("baked")
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, lm.parameter(name)), name
    text = "Ada Lund plays the"
    assert torch.equal(logits(plain, tokenizer, text), logits(lm.model, lm.tokenizer, text))


def test_a_run_can_be_applied_if_it_holds_one_model(cli):
    cli(*FT, *FACT, "run_dir=one", quick=True)
    assert cli("apply", "one", "--out", "a").code == 0
    whole_course = (
        "sequential",
        "method=ft",
        "limit=4",
        "protocol.batch_size=1",
        "protocol.holdout=0",
        "protocol.edits_room=1",
    )
    cli(*whole_course, "run_dir=steps", quick=True)
    assert list(Path("steps/edits").glob("state-*"))  # the first steps are no longer there one by one
    assert "with 4 edited facts" in cli("apply", "steps", "--out", "b").err
    cli("evaluate", "method=ft", "limit=2", "protocol.save_edits=true", "run_dir=apart", quick=True)
    refused = cli("apply", "apart", "--out", "c")
    assert (refused.code, "made apart from each other" in refused.err) == (2, True)
    assert not Path("c").exists()


def test_what_cannot_be_baked_is_refused_with_the_reason(cli):
    made = cli("edit", "method=lookup", *FACT, "run_dir=route", quick=True)
    assert made.code == 0
    refused = cli("apply", "route", "--out", "baked")
    assert refused.code == 2
    assert "answers in front of the model" in refused.err
    assert not Path("baked").exists()


def test_apply_refuses_a_used_place_and_another_model(cli):
    cli(*FT, *FACT, "run_dir=one", quick=True)
    Path("full").mkdir()
    Path("full/file").write_text("")
    used = cli("apply", "one", "--out", "full")
    assert (used.code, "is there already" in used.err) == (2, True)
    assert cli("apply", "one", "--out", "baked").code == 0
    other = cli("apply", "one", "--out", "twice", "--model", "baked")
    assert (other.code, "was made for" in other.err) == (3, True)
    assert not Path("twice").exists()
    nowhere = cli("apply", "one", "--out", "twice", "--model", "nothing")
    assert (nowhere.code, "--model nothing" in nowhere.err) == (3, True)
