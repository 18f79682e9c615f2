"""What a command lacks is told before a model is loaded, with what to do about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edit_cli.lm.loading import ModelOptions

LOCAL = "corpus=file corpus.path=FILE"
LACKING = [
    # (command, what the line says: first what is missing, then every remedy)
    ("evaluate method=rome corpus=wikipedia", ("corpus.id=wikimedia/wikipedia", LOCAL, "method.use_covariance=false")),
    ("edit method=memit corpus=wikipedia", ("corpus.id=", LOCAL, "method.use_covariance=false")),
    ("sequential method=emmet corpus=wikipedia", ("corpus.id=", LOCAL, "method.use_covariance=false")),
    ("evaluate method=memit corpus=file corpus.path=/no.txt", ("corpus.path=/no.txt", "method.use_covariance=false")),
    ("evaluate method=alphaedit corpus=wikipedia", ("corpus.id=", LOCAL)),
    (
        "evaluate method=alphaedit method.use_covariance=false",
        ("method.use_covariance=false leaves alphaedit nothing",),
    ),
    ("evaluate method=rome stats.import_npz=/no.npz", ("stats.import_npz=/no.npz", "method.use_covariance=false")),
    ("precompute-stats method=rome corpus=wikipedia", ("corpus.id=", LOCAL)),
    ("evaluate method=tpatcher method.negatives=corpus corpus=wikipedia", ("corpus.id=", LOCAL)),
    ("evaluate method=tpatcher method.negatives=examples", ("method.negatives=examples", "method.negatives=corpus")),
    ("evaluate method=wise method.elsewhere=corpus corpus=wikipedia", ("corpus.id=", LOCAL)),
    ("evaluate method=retrain method.corpus=/no.txt", ("corpus.path=/no.txt",)),
    ("evaluate method=mend", ("has not been trained", "edit-cli train-editor method=mend", "method.checkpoint=DIR")),
    ("sequential method=ke dataset=world", ("has not been trained", "edit-cli train-editor method=ke")),
    ("edit method=enn", ("has not been trained", "edit-cli train-editor method=enn")),
    (
        "evaluate method=mend model=hf model.id=embedded:tiny-gpt2 dataset=world method.layers=[1,2] method.edits=3",
        (
            "`edit-cli train-editor method=mend model=hf",
            " model.id=embedded:tiny-gpt2 'method.layers=[1,2]' method.edits=3",
        ),
    ),
    ("evaluate method=serac method.checkpoint=/no/editor", ("/no/editor holds no trained editor",)),
    (
        "train-editor method=serac method.training.edits=2 method.counterfactual.checkpoint=/no/t5",
        ("method.counterfactual.checkpoint=/no/t5",),
    ),
    (
        "train-editor method=serac method.training.edits=2 method.scope.model.checkpoint=/no/bert",
        ("method.scope.model.checkpoint=/no/bert",),
    ),
    ("evaluate method=ike method.embedding.model=/no/sbert", ("method.embedding.model=/no/sbert",)),
    ("evaluate method=ft model.perplexity_text=/no.txt", ("model.perplexity_text=/no.txt",)),
    ("evaluate method=rome method.variant=x", ("method.variant=x: choose",)),
    ("evaluate method=grace method.replace=x", ("method.replace=x: choose",)),
    ("evaluate method=ft method.objective=x", ("method.objective=x: choose",)),
    ("evaluate method=memit method.context.weighting=x", ("method.context.weighting=x: choose",)),
    ("trace model.id=/no/model", ("model.id=/no/model: no such folder",)),
    ("calibrate model.id=/no/model", ("model.id=/no/model: no such folder",)),
]


@pytest.fixture(autouse=True)
def barred():
    """The hub is not to be reached, and no model may be loaded, until it is undone."""
    from huggingface_hub import HfApi

    def unreachable(*_, **__):
        raise ConnectionError("no network")

    def loaded(*_, **__):
        raise AssertionError("the model was loaded first")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, "dataset_info", unreachable)
        patch.setattr(ModelOptions, "load", loaded)
        yield patch


@pytest.mark.thin(3)
@pytest.mark.parametrize(("command", "told"), LACKING, ids=[command for command, _ in LACKING])
def test_what_is_missing_is_told_before_the_model_is_loaded(cli, command, told):
    words = command.split()
    if words[0] == "edit":
        words += ["edit.prompt={} plays the", "edit.subject=Ada", "edit.target=violin"]
    ended = cli(*words, "limit=2", f"cache_dir={Path.cwd() / 'empty'}")
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert ended.code in (2, 3)
    for part in told:
        assert part in line
    assert not list(Path.cwd().rglob("edits/*"))


def test_statistics_that_are_there_need_no_text(cli, barred, monkeypatch):
    barred.undo()
    fact = ("edit.prompt={} plays the", "edit.subject=Ada", "edit.target=violin")
    assert cli("edit", "method=rome", "method.layers=[0]", *fact, "run_dir=a", quick=True).code == 0
    monkeypatch.setattr(
        "edit_cli.statistics.corpora.TextFile.require", lambda self: pytest.fail("the text was asked for")
    )
    assert cli("edit", "method=rome", "method.layers=[0]", *fact, "run_dir=b", quick=True).code == 0


def test_a_finished_run_lacks_nothing(cli, barred, monkeypatch):
    barred.undo()
    run = ("evaluate", "method=ft", "method.steps=1", "limit=1", "run_dir=r")
    assert cli(*run, quick=True).code == 0
    monkeypatch.setattr(ModelOptions, "read_kind", lambda self: pytest.fail("the model was asked for"))
    assert cli(*run, quick=True).code == 0
