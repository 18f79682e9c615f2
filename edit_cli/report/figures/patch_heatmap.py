"""What patch neurons say of the facts they were made for and of others (T-Patcher): a figure, and how clear its
diagonal is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edit_cli.report.figures import style
from edit_cli.wording import many

NAME = "patches"


def draw(
    matrix: Any,
    others: Any,
    neurons: Sequence[tuple[int, int]],
    rows: Sequence[tuple[int, int]],
    directory: Path,
    title: str = "",
) -> dict[str, float]:
    """Write patches.png, patches.svg and patches.npz; neurons from below in the order of their making.

    matrix: activations (neurons, rows) on edited facts; others: (neurons, inputs) on what was never edited. neurons,
    rows: (number of the fact, place in its answer). Returns `clarity` of what is drawn.
    """
    from matplotlib.colors import TwoSlopeNorm

    values, beyond = np.asarray(matrix, dtype=float), np.asarray(others, dtype=float)
    every = np.concatenate([values.ravel(), beyond.ravel()])
    # what lets a neuron speak is narrow beside what keeps it silent
    low, high = min(every.min(), -1e-3), max(every.max(), 1e-3)
    norm = TwoSlopeNorm(0.0, low, high)
    facts = len({fact for fact, _ in rows})
    figure = style.new(8.4, 4.4, f"{title}, {many(values.shape[0], 'neuron')} of {many(facts, 'fact')}")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, part, what in zip(
        panels, (values, beyond), ("edited fact, in order", "input of other records or text"), strict=True
    ):
        image = panel.imshow(part, aspect="auto", cmap="RdBu_r", norm=norm, origin="lower", interpolation="nearest")
        panel.set(xlabel=what)
    panels[0].set(ylabel="added neuron, in order")
    figure.colorbar(
        image,
        ax=panels,
        label="pre-activation",
        ticks=[low, low / 2, 0.0, high / 2, high],
        format="%.1f",
    )
    style.save(figure, directory, NAME)
    np.savez_compressed(
        directory / f"{NAME}.npz", activations=values, others=beyond, neurons=np.array(neurons), rows=np.array(rows)
    )
    return clarity(values, neurons, rows)


def clarity(matrix: Any, neurons: Sequence[tuple[int, int]], rows: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Mean on the diagonal and off it, and the share of rows with a neuron of their own in which it is the loudest."""
    values = np.asarray(matrix, dtype=float)
    own = np.array([[neuron == row for row in rows] for neuron in neurons])
    patched = own.any(axis=0)
    loudest = own[values.argmax(axis=0), np.arange(values.shape[1])][patched]
    return {
        "diagonal": float(values[own].mean()),
        "elsewhere": float(values[~own].mean()),
        "own_is_loudest": float(loudest.mean()),
    }
