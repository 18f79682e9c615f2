"""The figures of a run, ready for a page: drawn from its numbers; those that only the run itself could draw are taken
from its folder.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from edit_cli.report import learning, sme, tuning
from edit_cli.report.figures import before_after, curves, heatmap, memories, patch_heatmap
from edit_cli.report.kinds import REPORTS, Summary
from edit_cli.report.page.parts import Figure

CAPTIONS = {
    before_after.NAME: "Means before and after, with 95 % intervals over facts.",
    curves.COURSE: "The course of the run over the number of facts edited, all of them still in place.",
    curves.FORGETTING: "Which facts are still the top choice: when they were edited, by when they were asked again.",
    sme.NAME: "The rates over the mistakes edited in a fold; means over folds with bands of one standard deviation.",
    heatmap.NAME: "Average indirect effect of restoring a state, or the outputs of a window of layers.",
    memories.NAME: "Layer by layer: what fires keys, what values promote, how outputs are composed and refined.",
    learning.NAME: "The training, step by step; the dotted line is where the network that is kept was found.",
    tuning.FIGURE: "What is edited against what stays, trial by trial.",
    patch_heatmap.NAME: "What the added neurons say of the facts that they were made for, and of other inputs.",
}
FROM_FOLDER = (patch_heatmap.NAME,)

Drawer = Callable[[Summary, Path], Sequence[str]]


DRAWERS: dict[str, Drawer] = {"evaluate": before_after.draw, "edit": before_after.draw}  # where a run draws nothing


def pictures(kind: str, summary: Summary, folder: Path) -> list[Figure]:
    """Of a run of that kind, whose directory is `folder`."""
    with TemporaryDirectory(prefix="edit-cli-") as place:
        drawn = {
            name: Path(place) / f"{name}.svg" for name in DRAWERS.get(kind, REPORTS[kind].draw)(summary, Path(place))
        }
        kept = {name: file for name in FROM_FOLDER if (file := folder / f"{name}.svg").is_file()}
        return [picture(file, CAPTIONS[name]) for name, file in (drawn | kept).items()]


def picture(file: Path, caption: str) -> Figure:
    """An SVG file as a data URL."""
    return Figure(f"data:image/svg+xml;base64,{base64.b64encode(file.read_bytes()).decode()}", caption)
