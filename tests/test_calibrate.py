"""`calibrate`: distances between keys, and the settings that follow from them."""

from __future__ import annotations

import torch

from edit_cli.editors.memory.calibration import Separation


def test_the_chance_and_the_radius_by_hand():
    place = Separation(0, "mlp_in", "input", 1.0, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.5, 8.0]))
    assert place.auc == 5 / 6  # of six pairs only (3, 2.5) is the wrong way round
    assert place.radius == 3.0  # holds all three; 2.5 is within twice of 2 already, 8 is not within 6
    apart = Separation(0, "mlp_in", "input", 1.0, torch.tensor([1.0, 2.0]), torch.tensor([9.0, 10.0]))
    assert (apart.auc, apart.radius) == (1.0, 2.0)


def test_the_last_line_can_be_pasted(cli):
    ended = cli(
        "calibrate",
        "dataset=counterfact",
        "dataset.split=tune",
        "limit=15",
        "layers=[3,5]",
        "modules=[mlp_in]",
        "model.device=cpu",
    )
    assert ended.code == 0
    assert ended.last.startswith("method.layer=5 method.module=mlp_in method.radius=")
    assert 2.0 < float(ended.last.rpartition("=")[2]) < 6.0
    assert "told apart" in ended.out


def test_wrong_settings_are_refused_by_name(cli):
    for wrong, message in (
        ("modules=[]", "modules=[]: give a list"),
        ("side=top", "side=top: choose input or output"),
        ("layers=[9]", "layer 9"),
    ):
        ended = cli("calibrate", "limit=3", wrong, "model.device=cpu")
        assert ended.code == 2 and message in ended.err
