"""The figure of what patches say of facts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edit_cli.report.figures import patch_heatmap

MATRIX = np.array([[2.0, -5.0, -4.0], [3.0, 1.0, -6.0]])
NEURONS, ROWS = [(0, 0), (1, 0)], [(0, 0), (1, 0), (2, 0)]


SMALL = (
    "method.memory_size=500",
    "method.validation_size=100",
    "method.top_memory=50",
    "method.steps=101",
    "protocol.observe.generate=false",
)


@pytest.mark.slow
def test_every_sequential_run_of_a_patch_method_draws_it(cli):
    """Also a run that was complete but for its summary, which takes its edits from disk; other methods draw nothing
    of the kind.
    """
    run = (
        "sequential",
        "method=tpatcher",
        *SMALL,
        "protocol.batch_size=1",
        "protocol.holdout=1",
        "dataset=world",
        "limit=3",
        "run_dir=run",
        "figures=true",
    )
    assert cli(*run, quick=True).code == 0
    kept = np.load("run/patches.npz")
    assert (
        kept["activations"].shape == (3, 3)
        and kept["others"].shape == (3, 100)
        and kept["others"].max() < kept["activations"].diagonal().min()
    )
    assert kept["neurons"].tolist() == kept["rows"].tolist() == [[0, 0], [1, 0], [2, 0]]
    assert Path("run/patches.png").read_bytes().startswith(b"\x89PNG") and "<svg" in Path("run/patches.svg").read_text()
    for name in ("summary.json", "patches.npz"):
        Path("run", name).unlink()
    assert cli(*run, quick=True).code == 0
    np.testing.assert_allclose(np.load("run/patches.npz")["activations"], kept["activations"], atol=1e-4)


def test_clarity_by_hand():
    """The first fact is louder in the other's neuron; the third has none of its own and counts for nothing."""
    found = patch_heatmap.clarity(MATRIX, NEURONS, ROWS)
    assert found == {"diagonal": 1.5, "elsewhere": pytest.approx((-5 - 4 + 3 - 6) / 4), "own_is_loudest": 0.5}


def test_the_figure_and_its_numbers_are_written(tmp_path):
    assert patch_heatmap.draw(MATRIX, -MATRIX[:, :2], NEURONS, ROWS, tmp_path, "title") == patch_heatmap.clarity(
        MATRIX, NEURONS, ROWS
    )
    assert (tmp_path / "patches.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (
        tmp_path / "patches.svg"
    ).read_text()
    kept = np.load(tmp_path / "patches.npz")
    assert (
        np.array_equal(kept["activations"], MATRIX)
        and np.array_equal(kept["others"], -MATRIX[:, :2])
        and kept["neurons"].tolist() == [[0, 0], [1, 0]]
    )
