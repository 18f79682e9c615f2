"""`doctor`: what a model is like, one edit with each method, and a file of settings for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import tiny_lm

from edit_cli.commands import doctor
from edit_cli.config import catalog
from edit_cli.config.overrides import Kind, regroup
from edit_cli.editors.memory.grace import GRACE
from edit_cli.errors import UsageError
from edit_cli.lm.anatomy import described, kind_of_blocks


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("llama", "plain: attention, then the MLP"),
        ("gptj", "parallel: MLP and attention read the same state"),
        ("gemma2", "post-norm or scaled"),
        ("granite", "post-norm or scaled"),
        ("mixtral", "without an MLP that every token passes (layers 0, 1, 2)"),
        ("qwen2_moe", "mixtures of experts beside an MLP that every token passes"),
    ],
)
def test_the_kind_of_blocks_is_measured(family, words):
    assert words in kind_of_blocks(tiny_lm(family))


def test_the_parts_of_a_model_are_named_as_they_are_stored():
    llama, gpt2 = (dict(described(tiny_lm(family))) for family in ("llama", "gpt2"))
    assert llama["MLP"] == "mlp.gate_proj and mlp.up_proj, then mlp.down_proj (88 to 32, stored (out, in))"
    assert gpt2["MLP"] == "mlp.c_fc, then mlp.c_proj (88 to 32, stored (in, out))"
    assert llama["attention"] == "writes through self_attn.o_proj" and "model.layers, 3 layers" in llama["blocks"]
    assert "nothing is put before every text" in llama["text"] and "no chat template" in llama["text"]


def test_every_method_has_a_line_and_the_model_a_file(cli, tmp_path, monkeypatch):
    """One that breaks is a line with the reason; the next one is tried all the same."""

    def broken(*_, **__):
        raise RuntimeError("it broke")

    monkeypatch.setattr(GRACE, "edit", broken)
    (tmp_path / "model").mkdir()
    model = "model=hf", "model.id=embedded:tiny-gpt2", "model.name=mine"
    ended = cli("doctor", "methods=[grace,rome,ft,lookup,mend]", "--out", "model/mine.yaml", *model)
    assert ended.code == 0, ended.err
    verdicts = dict(line.split(":", 1) for line in ended.out.splitlines() if ":" in line)
    assert verdicts["grace"].strip() == "FAILED: RuntimeError: it broke"
    for method in ("rome", "ft", "lookup"):
        assert "undo bit-exact, save and load exact" in verdicts[method]
    assert "settings by relative depth, tried with C = I" in verdicts["rome"] and "layers=[" in verdicts["ft"]
    assert "train it by `edit-cli train-editor method=mend model=hf model.id=embedded:tiny-gpt2`" in verdicts["mend"]
    assert "NOT RESTORED" not in ended.out
    fact = "edit.prompt={} plays the", "edit.subject=Ada", "edit.target=organ"
    dry = cli("edit", "--config-dir", ".", "model=mine", "method=lookup", *fact, "--dry-run")
    assert dry.code == 0 and "mine: 1,484,800 parameters" in dry.out


@pytest.mark.parametrize(
    ("named", "told"), [((), "not tried: it goes through all that"), (("methods=[retrain]",), "tried;")]
)
def test_a_method_that_trains_the_model_anew_is_tried_only_if_it_is_named(named, told, cli, monkeypatch):
    every = [entry for entry in catalog.entries("method") if entry.name == "retrain"]
    monkeypatch.setattr(catalog, "entries", lambda _: every)
    monkeypatch.setattr(doctor, "examined", lambda *_: "tried")
    ended = cli("doctor", *named)
    (verdict,) = [line.split(":", 1)[1] for line in ended.out.splitlines() if line.startswith("retrain:")]
    assert verdict.strip().startswith(told) and ("; methods=[retrain] tries it" in verdict) is not bool(named)


def test_flags_of_settings():
    assert regroup(["--dry-run", "--out", "a b.yaml"], {"out": Kind.FILE}) == ["dry_run=true", "out='a b.yaml'"]
    with pytest.raises(UsageError, match="--out needs a file"):
        regroup(["--out"])


def test_a_file_of_something_else_is_kept(cli):
    Path("mine.yaml").write_bytes(b"\x89PNG")
    ended = cli("doctor", "methods=[none]", "--out", "mine.yaml")
    assert ended.code == 0 and "mine.yaml held something else, which is kept as mine.yaml.old" in ended.err
    assert Path("mine.yaml.old").read_bytes() == b"\x89PNG" and "ModelOptions" in Path("mine.yaml").read_text()


def test_an_unknown_method_is_named(cli):
    ended = cli("doctor", "methods=[romy]")
    assert ended.code == 2 and "there is no method romy" in ended.err
