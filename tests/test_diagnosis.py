"""What an edit says of how it went: one line, with the key to turn."""

from __future__ import annotations

import json

import pytest
import torch
from embedded import embedded_lm, prepared, requests

from edit_cli.editors.locate.context_prefixes import ContextConfig
from edit_cli.editors.locate.memit import MEMIT
from edit_cli.editors.locate.rome import ROME
from edit_cli.editors.locate.value_batch import ValueConfig
from edit_cli.edits.diagnosis import told
from edit_cli.edits.edit import Factors, WeightDelta

PLAIN = {"layers": [1, 2], "use_covariance": False, "context": ContextConfig(prefixes=[])}
KEYS = {"reached": "raise method.value.steps", "written": "lower method.covariance_weight", "size": "be gentle"}


@pytest.mark.parametrize(
    ("found", "line"),
    [
        ([], None),
        ([{}], None),
        ([{"values": 2, "reached": 2, "written": 0.95, "size": 0.1, "keys": KEYS}],
         "2 of 2 target values reached; 95 % of the wanted change was written."),
        ([{"values": 3, "reached": 1, "written": 0.5, "keys": KEYS}, {"values": 1, "reached": 1, "written": 0.9}],
         "2 of 4 target values reached (raise method.value.steps);"
         " 60 % of the wanted change was written (lower method.covariance_weight)."),
        ([{"values": 1, "reached": 1, "written": 0.02, "keys": KEYS}],
         "1 of 1 target value reached; NEGLIGIBLE: 2 % of the wanted change was written"
         " (lower method.covariance_weight)."),
        ([{"size": 4.0, "keys": KEYS}, {"size": 0.5}],
         "may disable the model: 1 edit is up to 4.0 times as large as the weight (be gentle)."),
        ([{"values": 3, "reached": 3, "taken": 2}],
         "3 of 3 target values reached; an earlier run had found 2 of them, and that time is not counted here."),
        ([{"size": 0.0}], "NEGLIGIBLE: no weight was changed."),
    ],
)  # fmt: skip
def test_one_line_says_what_came_of_edits_and_what_to_turn(found, line):
    assert told(found) == line


def test_any_edit_of_weights_knows_its_size():
    lm = embedded_lm()
    name = f"{lm.layout.mlp_out(1)}.weight"
    twice = WeightDelta({name: -2 * lm.parameter(name).detach()})
    rows, columns = lm.weight(lm.layout.mlp_out(1)).shape
    nothing = WeightDelta({name: Factors(torch.zeros(rows, 1), torch.zeros(1, columns))})
    assert twice.diagnosis(lm) == {"size": pytest.approx(2.0)} and nothing.diagnosis(lm) == {"size": 0.0}


@pytest.mark.parametrize("weight", [1e-9, 1e9])
def test_memit_tells_how_much_of_the_wanted_change_it_wrote(weight):
    lm = embedded_lm()
    said = prepared(MEMIT, **PLAIN, covariance_weight=weight).edit(lm, requests(2)).diagnosis(lm)
    assert (said["values"], said["reached"]) == (2, 2)
    assert said["written"] == pytest.approx(1.0 if weight < 1 else 0.0, abs=1e-3)
    assert ("NEGLIGIBLE" in (told([said]) or "")) == (weight > 1)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (ValueConfig(steps=2, clamp_norm_factor=1e3), "method.value.steps"),
        (ValueConfig(clamp_norm_factor=1e-3, steps=6), "method.value.clamp_norm_factor"),
    ],
)
@pytest.mark.parametrize("method", [MEMIT, ROME])
def test_the_key_is_the_one_that_stood_in_the_way(method, options, key):
    lm = embedded_lm()
    said = prepared(method, **PLAIN, value=options).edit(lm, requests(1)).diagnosis(lm)
    assert said["reached"] < said["values"] and f"(raise {key})" in (told([said]) or "")


FACT = ("edit.prompt={} plays the", "edit.subject=Jormia Stenenen", "edit.target=organ")


@pytest.mark.parametrize("command", [("edit", *FACT), ("evaluate", "limit=2", "protocol.batch_size=1")])
def test_commands_show_it_and_keep_it(command, cli, tmp_path):
    ended = cli(*command, "method=memit", "run_dir=here", "method.covariance_weight=1e9", quick=True)
    line = json.loads((tmp_path / "here" / "summary.json").read_text())["diagnosis"]
    assert ended.code == 0 and line in ended.words and "NEGLIGIBLE: 0 % of the wanted change was written" in line
