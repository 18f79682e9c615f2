"""The figure of what patches say of facts."""

from __future__ import annotations

import numpy as np
import pytest

from edit_cli.report import patch_heatmap

MATRIX = np.array([[2.0, -5.0, -4.0], [3.0, 1.0, -6.0]])
NEURONS, ROWS = [(0, 0), (1, 0)], [(0, 0), (1, 0), (2, 0)]


def test_clarity_by_hand():
    """The first fact is louder in the other's neuron; the third has none of its own and counts for nothing."""
    found = patch_heatmap.clarity(MATRIX, NEURONS, ROWS)
    assert found == {"diagonal": 1.5, "elsewhere": pytest.approx((-5 - 4 + 3 - 6) / 4), "own_is_loudest": 0.5}


def test_the_figure_and_its_numbers_are_written(tmp_path):
    assert patch_heatmap.draw(MATRIX, NEURONS, ROWS, tmp_path, "title") == patch_heatmap.clarity(MATRIX, NEURONS, ROWS)
    assert (tmp_path / "patches.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (tmp_path / "patches.svg").read_text()
    kept = np.load(tmp_path / "patches.npz")
    assert np.array_equal(kept["activations"], MATRIX) and kept["neurons"].tolist() == [[0, 0], [1, 0]]
