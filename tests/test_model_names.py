"""Which model a name stands for: files of another architecture do not pass for a published model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from embedded import embedded_lm
from families import tiny
from omegaconf import OmegaConf

from edit_cli.config import catalog
from edit_cli.config.build import register_resolvers
from edit_cli.edits import store as edit_store
from edit_cli.experiment import saved_edits

FACT = ("edit.prompt={} plays the", "edit.subject=Ada Lund", "edit.target=violin")
FT = ("edit", "method=ft", "method.steps=1", "method.layers=[1]", *FACT)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A copy of the embedded model, a model of the same family with other sizes, and one of another family."""
    root = tmp_path_factory.mktemp("models")
    lm = embedded_lm()
    parts: dict[str, Any] = {"my copy": (lm.model, lm.tokenizer), "small": tiny("gpt2"), "llama": tiny("llama")}
    for name, (model, words) in parts.items():
        model.save_pretrained(root / name)
        words.save_pretrained(root / name)
    return root


def test_packaged_models_say_what_they_are_for():
    for name in catalog.names("model"):
        settings = OmegaConf.load(catalog.conf_dir() / "model" / f"{name}.yaml")
        if name != "hf":
            assert settings.name == name  # or its runs would lie, and be called, like another's
            shapes = {"num_hidden_layers", "hidden_size"}, {"depths", "hidden_sizes"}
            assert any({"model_type"} | shape <= set(settings.made_for) for shape in shapes)


def test_the_embedded_models_are_what_their_settings_say():
    for name in ("tiny-gpt2", "tiny-t5", "tiny-bart", "tiny-bert", "tiny-vit", "tiny-resnet"):
        from edit_cli.lm.loading import ModelOptions

        settings = OmegaConf.load(catalog.conf_dir() / "model" / f"{name}.yaml")
        ModelOptions(name, settings.id, made_for=dict(settings.made_for)).read_kind()


@pytest.mark.parametrize("folder", ["small", "llama"])
def test_another_model_does_not_pass_for_the_named_one(cli, folders, folder):
    ended = cli(*FT, f"model.id={folders / folder}", quick=True)
    assert ended.code == 2
    assert f"model.id={folders / folder} is no tiny-gpt2 (model_type gpt2, num_hidden_layers 6" in ended.err
    assert f"write model=hf model.id={folders / folder}" in ended.err
    assert not Path("runs").exists() or not list(Path("runs").rglob("edits/*"))


def test_a_local_copy_of_the_named_model_is_taken(cli, folders):
    ended = cli(*FT, f"model.id={folders / 'my copy'}", quick=True)
    assert (ended.code, "ft on tiny-gpt2: 1 fact edited" in ended.out) == (0, True)


def test_with_a_name_of_its_own_a_model_keeps_what_was_chosen(cli, folders):
    ended = cli(*FT, f"model.id={folders / 'llama'}", "model.name=mine", quick=True)
    assert (ended.code, "ft on mine: 1 fact edited" in ended.out) == (0, True)
    assert ended.last.startswith("runs/edit/inline/mine/ft-")


def test_models_of_ones_own_lie_apart_under_their_names(cli, folders):
    first = cli(*FT, "model=hf", f"model.id={folders / 'my copy'}", quick=True)
    second = cli(*FT, "model=hf", f"model.id={folders / 'llama'}", quick=True)
    third = cli(*FT, "model=hf", f"model.id={folders / 'llama'}", "model.name=mine", quick=True)
    assert [ended.code for ended in (first, second, third)] == [0, 0, 0]
    assert [Path(ended.last).parent.name for ended in (first, second, third)] == ["my_copy", "llama", "mine"]
    assert [ended.out.split(":")[0].strip() for ended in (first, second, third)] == [
        "ft on my copy",
        "ft on llama",
        "ft on mine",
    ]
    assert json.loads(Path(third.last, "manifest.json").read_text())["model"] == "mine"


@pytest.mark.parametrize(
    ("model_id", "name"),
    [("openai-community/gpt2", "gpt2"), ("/path/to/model/", "model"), ("embedded:tiny-gpt2", "tiny-gpt2"), ("a", "a")],
)
def test_a_model_is_called_by_the_last_part_of_its_id(model_id, name):
    register_resolvers()
    assert OmegaConf.create({"id": model_id, "name": "${last_part:${id}}"}).name == name


def test_here_is_called_by_its_own_name(monkeypatch, tmp_path):
    register_resolvers()
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    for here in (".", "./", "../model"):
        assert OmegaConf.create({"id": here, "name": "${last_part:${id}}"}).name == "model"


def test_an_edit_names_its_model_at_the_revision_that_it_was_made_for(monkeypatch, tmp_path):
    about = {"name": "mine", "id": "owner/mine", "revision": "abc123", "dtype": "float16"}
    monkeypatch.setattr(edit_store, "read_manifest", lambda path: {"base_model": about})
    options = saved_edits.Base().options(tmp_path)
    assert (options.id, options.revision, options.made_for, options.dtype) == ("owner/mine", "abc123", None, "float16")
