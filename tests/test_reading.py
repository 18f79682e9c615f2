"""Reading activations at one token of each row, and upwards block by block."""

from __future__ import annotations

import pytest
import torch
from families import tiny_lm

from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.lm.hooks import on_input
from edit_cli.lm.reading import HookPoint, LayerwiseReader, read

TEXTS = [
    "The capital of France is",
    "Ada Lund",
    "The old lighthouse of Marlow stands on the northern shore",
    "Ada Lund",
    "Therefore",
]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "bloom", "opt"])
def test_climbing_reads_what_a_whole_pass_reads_while_layers_are_edited(family):
    lm = tiny_lm(family)
    rows = lm.head.encode([(text, None) for text in TEXTS])
    positions = [len(row.ids) - 1 for row in rows]
    reader = LayerwiseReader(lm, rows, positions)
    generator = torch.Generator().manual_seed(0)
    for layer in range(lm.layout.depth):
        points = [
            HookPoint(lm.layout.mlp_out(layer), "input"),
            HookPoint(lm.layout.block(lm.layout.depth - 1), "output"),
        ]
        reader.start_at(layer)
        for climbed, whole in zip(reader.read(points), read(lm, rows, positions, points), strict=True):
            torch.testing.assert_close(climbed, whole, rtol=1e-4, atol=1e-4)
        width = lm.key_width(layer)
        update = Factors(
            torch.randn(lm.layout.width, 2, generator=generator), 0.1 * torch.randn(2, width, generator=generator)
        )
        lm.attach(WeightDelta({f"{lm.layout.mlp_out(layer)}.weight": update}))


def test_identical_rows_run_once_and_rows_are_cut():
    lm = tiny_lm("gpt2")
    assert lm.takes_shortcuts  # asked now, since finding out takes passes of its own
    rows = lm.head.encode([(text, None) for text in TEXTS])
    seen = []
    with on_input(lm.module(lm.layout.block(0)), lambda hidden: seen.append(hidden.shape[0])):
        (found,) = read(lm, rows, [0] * len(rows), [HookPoint(lm.layout.mlp_out(1), "input")])
    assert sum(seen) == len({row.ids[0] for row in rows}) and found.shape == (len(TEXTS), lm.key_width(1))


def test_mean_over_tokens():
    lm = tiny_lm("gpt2")
    (row,) = lm.head.encode([(TEXTS[2], None)])
    states = [read(lm, [row], [at], [HookPoint(lm.layout.final_norm, "output")])[0][0] for at in range(5)]
    (mean,) = read(lm, [row], [4], [HookPoint(lm.layout.final_norm, "output")], reduce="mean")
    torch.testing.assert_close(mean[0], torch.stack(states).mean(0), rtol=1e-4, atol=1e-5)
