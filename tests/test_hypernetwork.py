"""The network that makes edits of gradients (MEND, MALMEN): how it begins, and the statistics it keeps."""

from __future__ import annotations

import pytest
import torch
from learners import low_rank_layers

from edit_cli.distributed import SINGLE
from edit_cli.editors.meta.factored_gradients import Gradient
from edit_cli.editors.meta.hypernetwork import Hypernetwork, Normalizer
from edit_cli.errors import UsageError


def test_a_fresh_network_gives_back_normalized_factors_and_can_learn():
    torch.manual_seed(0)
    net = Hypernetwork([(4, 3), (4, 3)], rank=5, spread=1.0)
    gradient = [Gradient(torch.randn(2, 6, 4), torch.randn(2, 6, 3), torch.ones(2)) for _ in range(2)]
    gradient[0].outputs[1, 4:] = 0  # padding
    found = net(gradient)
    rows = torch.cat([torch.cat([g.inputs[g.kept], g.outputs[g.kept]], -1) for g in gradient])
    expected = (rows - rows.mean(0)) / (rows.std(0) + 1e-7)
    torch.testing.assert_close(
        torch.cat([found[0][0][gradient[0].kept], found[0][1][gradient[0].kept]], -1),
        expected[:10],
        rtol=1e-4,
        atol=1e-5,
    )
    assert found[0][0][1, 4:].abs().max() == 0 and found[0][1][1, 4:].abs().max() == 0
    sum(part.square().sum() for pair in found for part in pair).backward()
    assert all(layer.up.grad is not None and layer.up.grad.abs().max() > 0 for layer in low_rank_layers(net))


def test_running_statistics_do_not_depend_on_how_rows_come():
    torch.manual_seed(0)
    rows = torch.randn(50, 6) * 3 + 1
    parts, whole = Normalizer(6), Normalizer(6)
    for part in rows.split(7):
        parts.take_in(part, SINGLE)
    whole.take_in(rows, SINGLE)
    torch.testing.assert_close(parts(rows), whole(rows))
    torch.testing.assert_close(whole(rows), (rows - rows.mean(0)) / rows.std(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="train it first"):
        Normalizer(6)(rows)
