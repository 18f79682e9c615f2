"""What is refused, and told, before a run costs anything."""

from __future__ import annotations

import re
import shlex

import pytest
import torch
from test_loading import folder  # noqa: F401 - a fixture

from edit_cli.config.by_depth import first_layers
from edit_cli.editors.finetune.ft import FT
from edit_cli.editors.locate.memit import MEMIT
from edit_cli.experiment.run_directory import memory_remedy
from edit_cli.lm.loading import ModelOptions
from edit_cli.monitor import Monitor, failed_in

FACT = "edit.prompt={} lives in", "edit.subject=Ada", "edit.target=Paris"


@pytest.mark.parametrize("depth", [12, 30, 80])
def test_layers_by_relative_depth_are_those_of_other_models(depth):
    """ROME's one, MEMIT's side by side and up to it, none of a method that nobody published layers of."""
    (rome,) = first_layers("rome", depth)["layers"]
    memit = first_layers("memit", depth)["layers"]
    assert memit == list(range(memit[0], memit[-1] + 1)) and 4 <= len(memit) <= 5
    assert rome < depth / 2 and memit[-1] < depth / 2
    assert isinstance(first_layers("grace", depth)["layer"], int) and first_layers("lookup", depth) == {}


@pytest.mark.parametrize("depth", [3, 6, 12, 30])
def test_layers_that_stand_above_another_wherever_they_were_published_do_so_by_depth_too(depth):
    found = first_layers("melo", depth)
    assert found["layer"] < min(found["lora_layers"]) <= max(found["lora_layers"]) < depth


def test_a_method_without_layers_says_where_to_begin(cli, folder):  # noqa: F811
    ended = cli("edit", "method=memit", "model=hf", f"model.id={folder}", *FACT)
    assert ended.code == 2 and "'method.layers=[" in ended.err and "of its 3 layers" in ended.err
    assert "edit-cli tune method=memit" in ended.err and "edit-cli trace" in ended.err
    ended = cli("edit", "method=memit", "model=hf", f"model.id={folder}", "method.layers=[7]", *FACT)
    assert ended.code == 2 and "layer 7 does not exist: this model has layers 0 to 2" in ended.err


@pytest.mark.parametrize(
    ("phase", "key"),
    [("statistics", "stats.batch_tokens"), ("value", "method.value.batch_tokens"), ("ask after", "model.batch_tokens")],
)
def test_running_out_of_memory_names_the_key_of_what_was_being_done(phase, key):
    monitor = Monitor()
    with pytest.raises(torch.OutOfMemoryError) as caught, monitor.phase("edit"), monitor.phase(phase):
        raise torch.OutOfMemoryError("no memory left")
    known = {"stats": {"batch_tokens": 1}, "model": {"batch_tokens": None}, "method": {"value": {"batch_tokens": None}}}
    line = memory_remedy(caught.value, known)
    assert (
        failed_in(caught.value) == phase and f"in the phase '{phase}': lower {key}, or load the model smaller" in line
    )


DRY = {
    "evaluate method=memit limit=3": ("3 records", "second moments:", "asked after:", "memory:", "time:"),
    "edit method=ft edit.prompt='{} lives' edit.subject=Ada edit.target=in": ("Ada lives → in", "run:", "memory:"),
    "sequential method=rome limit=4 protocol.batch_size=2": (
        "2 batches",
        "checkpoints: after 2, 4 facts",
        "asked after each step: ",
    ),
    "precompute-stats method=memit corpus=embedded stats.tokens=500": ("second moments:", "memory:"),
    "train-editor method=mend dataset=world limit=30": ("30 records", "steps of", "not known: how large"),
    "inspect limit=9": ("9 documents of embedded", "6 layers; triggers of 10 keys"),
    "trace limit=2": ("restored states", "not known: how many of the facts the model knows"),
    "calibrate limit=5": ("at 6 layers, mlp_in, mlp_out", "time:"),
    "tune method=memit trials=3": ("3 trials", "covariance_weight", "3 times"),
    "evaluate method=mend limit=2": ("REFUSED: this editor has not been trained",),
}


SELDOM = ("calibrate", "edit", "inspect", "precompute-stats", "trace")  # whose plans hold nothing that others do not


@pytest.mark.parametrize(
    "command",
    [pytest.param(line, marks=[pytest.mark.slow] if line.split()[0] in SELDOM else []) for line in DRY],
)
def test_a_dry_run_tells_what_would_be_done_and_does_nothing(cli, tmp_path, monkeypatch, command):
    def barred(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(ModelOptions, "load", barred)
    ended = cli(*shlex.split(command), "--dry-run", f"cache_dir={tmp_path / 'cache'}")
    assert ended.code == 0, ended.err
    told = re.sub(" +", " ", ended.out)
    assert all(words in told for words in (*DRY[command], "model:", "6 layers of width 128"))
    columns = {len(found[0]) for line in ended.out.splitlines()[1:] if (found := re.match(r"[^:]+: +", line))}
    assert len(columns) == 1  # sentences begin below each other
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.slow
def test_a_dry_run_tells_what_becomes_of_a_run_that_is_there(cli, tmp_path):
    command = "evaluate", "method=lookup", "limit=2", "run_dir=there", "protocol.observe.generate=false"
    assert "there: new" in cli(*command, "--dry-run").out
    assert cli(*command, "protocol.observe.sample=false").code == 0
    assert "there: complete (2 lines)" in cli(*command, "protocol.observe.sample=false", "--dry-run").out
    ended = cli(*command, "--dry-run")
    assert ended.code == 0 and "REFUSED: it holds a run with other settings (protocol.observe.sample was" in ended.out
    assert "2 lines, which are deleted first" in cli(*command, "overwrite=true", "--dry-run").out


def test_what_an_edit_takes_grows_with_its_facts_and_its_settings():
    """Estimates; docs/before.md compares them with runs."""
    outline = ModelOptions("tiny", "embedded:tiny-gpt2").outline
    assert outline is not None
    memit = MEMIT.Config(layers=[1, 2])
    few, many = (MEMIT.cost(memit, outline, [8] * count) for count in (10, 1000))
    assert few is not None and many is not None
    assert many.passes == pytest.approx(100 * few.passes) and many.bytes > few.bytes >= 2 * 2 * 512 * 512 * 8
    out = FT.cost(FT.Config(layers=[1]), outline, [8])
    block = FT.cost(FT.Config(layers=[1], part="block"), outline, [8])
    assert out is not None and block is not None
    more = sum(weight.numel() for weight in outline.model.transformer.h[1].parameters()) - 512 * 128 - 128
    assert block.bytes - out.bytes == 24 * more


def test_what_a_method_does_before_its_first_edit_is_told_with_the_key_that_makes_it_shorter(cli):
    ended = cli("evaluate", "method=tpatcher", "method.memory_size=300", "limit=1", "--dry-run")
    (line,) = [line for line in ended.out.splitlines() if line.startswith("beforehand:")]
    assert "tpatcher first fills a memory of up to 300 states" in line and "method.memory_size" in line
