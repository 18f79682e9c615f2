"""The figure of a causal trace: average indirect effects by layer and token role, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edit_cli.report.figures import style
from edit_cli.report.trace import ROLE_NAMES
from edit_cli.wording import many

NAME = "heatmap"
TITLES = {"hidden": "restoring a state", "mlp": "restoring MLP outputs", "attn": "restoring attention outputs"}
COLORS = {"hidden": "Purples", "mlp": "Greens", "attn": "Reds"}


def draw(summary: Mapping[str, Any], directory: Path) -> list[str]:
    """Write heatmap.png and heatmap.svg: a panel a kind of state, rows are token roles and columns layers."""
    if not summary["traced"]:
        return []
    indirect = summary["trace"]["indirect_effect"]
    facts = f"{many(summary['traced'], 'fact')} of {summary['dataset']['name']}"
    title = f"{summary['model']}: average indirect effect on P(answer) in points, {facts}"
    figure = style.new(1.5 + 3.6 * len(indirect), 3.0, title)
    panels = figure.subplots(1, len(indirect), sharey=True, squeeze=False)[0]
    for panel, (kind, roles) in zip(panels, indirect.items(), strict=True):
        shown = [role for role in ROLE_NAMES if role in roles]
        values = np.array([roles[role]["mean"] for role in shown], dtype=float)
        image = panel.imshow(
            values, aspect="auto", cmap=COLORS[kind], vmin=min(0.0, values.min()), interpolation="nearest"
        )
        panel.set_yticks(range(len(shown)), [ROLE_NAMES[role] for role in shown])
        panel.set(title=TITLES[kind], xlabel=_axis(kind, summary["protocol"]["window"]))
        panel.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=panel, location="right", label="points")
    style.save(figure, directory, NAME)
    return [NAME]


def _axis(kind: str, window: int) -> str:
    return "layer" if kind == "hidden" or window == 1 else f"center of {window} layers"
