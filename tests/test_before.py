"""What is refused, and told, before a run costs anything."""

from __future__ import annotations

import pytest
import torch
from test_loading import folder  # noqa: F401 - a fixture

from edit_cli.config.by_depth import first_layers
from edit_cli.experiment.run_directory import memory_remedy
from edit_cli.monitor import Monitor, failed_in

FACT = "edit.prompt={} lives in", "edit.subject=Ada", "edit.target=Paris"


@pytest.mark.parametrize("depth", [12, 30, 80])
def test_layers_by_relative_depth_are_those_of_other_models(depth):
    """ROME's one, MEMIT's side by side and up to it, none of a method that nobody published layers of."""
    (rome,) = first_layers("rome", depth)["layers"]
    memit = first_layers("memit", depth)["layers"]
    assert memit == list(range(memit[0], memit[0] + 5)) and rome in memit and memit[-1] < depth / 2
    assert isinstance(first_layers("grace", depth)["layer"], int) and first_layers("lookup", depth) == {}


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
