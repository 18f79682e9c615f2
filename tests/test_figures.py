"""What a reader must find in every figure: a whole title with model and number of facts, and every line."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from edit_cli.report import compare, learning, sequence, sme, tuning
from edit_cli.report.compare import Point
from edit_cli.report.comparison import COMPARED
from edit_cli.report.figures import before_after, curves, heatmap, patch_heatmap, style
from edit_cli.report.measures import measures

ENTRY = {"mean": 90.0, "ci95": [80.0, 95.0], "n": 16}
ABOUT = {
    "method": "memit-merge",
    "model": "a-model-with-a-long-name-7b",
    "dataset": {"name": "multi_counterfact"},
    "n": 16,
}
SEQUENCE: dict[str, Any] = {
    **ABOUT,
    "protocol": {"batch_size": 2, "batches": 8},
    "metrics": {},
    "collapse": None,
    "cost": [(2, 0.1), (4, 0.1)],
    "checkpoints": [
        {"edits": n, "metrics": {"efficacy_success": ENTRY}, "model": {}, "first": {}, "held_out": {}} for n in (2, 4)
    ],
    "retention": {"tested": [2, 4], "edited": [(1, 2), (3, 4)], "values": [[100.0, 50.0], [None, 100.0]]},
}
TRACE = {
    **ABOUT,
    "traced": 16,
    "protocol": {"window": 2},
    "trace": {"indirect_effect": {"mlp": {"last": {"mean": [1.0, 2.0, 30.0]}, "first": {"mean": [0.0, 0.0, 1.0]}}}},
}
TRAINING = {
    **ABOUT,
    "protocol": {"cases": 16, "validation": 5},
    "best": {"step": 2},
    "series": {
        "train": {"loss": [[1, 2.0], [2, 1.0]]},
        "validation": {"loss": [[2, 1.5]], "locality_same_subject_drawdown": [[2, 1.5]]},
    },
}
RATES = {"edits": 2, "SR": {"mean": 1.0, "std": 0.0}, "ER": {"mean": 1.0, "std": 0.0}}
SME = {**ABOUT, "sme": {"folds": [{}], "course": [RATES, {**RATES, "edits": 4}]}}
TRIAL = {"trial": 0, "objective": 80.0, "parts": {"efficacy": 90.0, "neighborhood": 70.0}}
TUNING = {**ABOUT, "ranked": [TRIAL, {**TRIAL, "trial": 1, "objective": 60.0}]}
SIDES = {"before": {**ENTRY, "mean": 0.0, "ci95": [0.0, 5.0]}, "after": ENTRY}
EDITED = {**SEQUENCE, "metrics": {"efficacy_success": SIDES, "efficacy_magnitude": SIDES, "score": {"after": ENTRY}}}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> list[Any]:
    """All figures, drawn once."""
    found: list[Any] = []
    real = style.new

    def new(*arguments: Any) -> Any:
        found.append(real(*arguments))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "new", new)
        draw_all(tmp_path_factory.mktemp("figures"))
    return found


def draw_all(folder: Path) -> None:
    curves.draw(SEQUENCE, folder)
    heatmap.draw(TRACE, folder)
    learning.draw(TRAINING, folder)
    sme.draw(SME, folder)
    tuning.draw(TUNING, folder)
    before_after.draw(EDITED, folder)
    title = "tpatcher on a-model-with-a-long-name-7b: multi_counterfact"
    patch_heatmap.draw([[1.0, -2.0], [-3.0, 1.0]], [[-1.0], [-2.0]], [(0, 0), (1, 0)], [(0, 0), (1, 0)], folder, title)
    points = [Point("memit", n, "efficacy_success", ENTRY) for n in (1, 2)]
    compare.draw(
        points,
        "facts",
        ["efficacy_success"],
        [folder / "c.png"],
        "a-model-with-a-long-name-7b, n = 16 facts; bands: 95 %",
    )


def test_every_title_is_whole_and_names_model_and_number(drawn):
    assert len(drawn) == 9
    for figure in drawn:
        title = figure._suptitle
        said = title.get_text().replace("\n", " ")
        assert "a-model-with-a-long-name-7b" in said.replace("- ", "-")
        assert any(number in said for number in ("16 facts", "16 cases", "16 examples", "2 facts"))
        box = title.get_window_extent(FigureCanvasAgg(figure).get_renderer())
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1


def test_titles_of_panels_stay_on_the_page(drawn):
    titles = [(figure, axes.title) for figure in drawn for axes in figure.axes if axes.get_title()]
    assert len(titles) == 4
    for figure, title in titles:
        box = title.get_window_extent(FigureCanvasAgg(figure).get_renderer())
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, title.get_text()


def test_long_titles_of_a_comparisons_panels_do_not_meet(monkeypatch, tmp_path):
    """Of those that take two lines, and of those that just fit into one."""
    figure = style.new(10.8, 6.7, "six panels")
    monkeypatch.setattr(style, "new", lambda *_: figure)
    long = sorted(measures(), key=lambda name: len(measures()[name].label))[-3:]
    long += [f"{where}_generated_unchanged" for where in ("locality", "locality_random", "neighborhood")]
    points = [Point("memit", n, name, ENTRY) for n in (1, 2) for name in long]
    compare.draw(points, "facts", long, [tmp_path / "c.png"], "six panels")
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [axes.title.get_window_extent(renderer) for axes in figure.axes]
    assert len(boxes) == 6
    for row in (boxes[:3], boxes[3:]):
        assert all(left.x1 < right.x0 for left, right in pairwise(row))
        assert row[0].x0 >= 0 and row[-1].x1 <= figure.bbox.x1


def test_names_of_curves_and_of_progress_are_in_one_line():
    """Headings of a table may take two."""
    row = {"edits": 2, "metrics": dict.fromkeys(COMPARED, ENTRY), "model": {}, "first": {}, "held_out": {}}
    names = [*sequence.curve_series({"checkpoints": [row]}), sequence.told(row)]
    assert "paraphrase" in names and len(names) > 6 and not any("\n" in name for name in names)


def test_a_color_bar_says_what_it_counts(drawn):
    labels = {axes.get_ylabel() for figure in drawn for axes in figure.axes if axes.get_label() == "<colorbar>"}
    assert labels == {"%", "points", "pre-activation", "objective, %"}


def test_bands_and_bars_are_explained(drawn):
    with_bands = [
        figure for figure in drawn if any(axes.collections and not axes.images and axes.lines for axes in figure.axes)
    ]
    assert len(with_bands) >= 3
    for figure in with_bands:
        said = figure._suptitle.get_text().replace("\n", " ")
        assert re.search("(bands|bars): (95 %|± 1 standard deviation)", said), said


def test_before_and_after_are_told_apart_without_color(drawn, tmp_path):
    (plot,) = next(axes for axes in (figure.axes for figure in drawn) if axes[0].containers)
    assert [label.get_text() for label in plot.get_yticklabels()] == ["Efficacy success", "Score S"]  # shares alone
    markers = {bars[0].get_marker() for bars in plot.containers}
    assert len(markers) == 2 and before_after.draw(ABOUT | {"metrics": {}}, tmp_path) == []


def test_files_are_the_same_whenever_they_are_drawn(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        sme.draw(SME, tmp_path / folder)
    for name in ("sme.svg", "sme.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_band_of_several_seeds_reaches_one_deviation_to_either_side():
    from matplotlib.figure import Figure

    plot = Figure().subplots()
    several = {"mean": 50.0, "ci95": None, "n": 16, "sd": 5.0, "seeds": 3}
    curves.line(plot, [(1, several), (2, {**several, "sd": 0.0})], "of seeds")
    (band,) = plot.collections
    corners = {(float(x), float(y)) for x, y in np.asarray(band.get_paths()[0].vertices)}
    assert {(1.0, 45.0), (1.0, 55.0), (2.0, 50.0)} <= corners
    assert max(y for _, y in corners) == 55.0
    curves.line(plot, [(1, {**several, "sd": None})], "of means that are not finite")
    assert len(plot.collections) == 1


@pytest.mark.parametrize("count", [2, 5, 9])
def test_equal_lines_are_seen_beside_each_other(count):
    """The one above is thinner, and leaves gaps where the one below is whole."""
    styles = [style.style(number, count) for number in range(count)]
    widths = [style["linewidth"] for style in styles]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == count
    assert all(a["linestyle"] != b["linestyle"] for a, b in pairwise(styles))
    assert all(a["marker"] != b["marker"] for a, b in pairwise(styles))


def test_a_line_alone_is_plain():
    assert style.style(0, 1)["linewidth"] < style.style(0, 2)["linewidth"]
