"""Pictures show the right numbers: read back from the axes, against the numbers themselves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from problems import module

from torch_influence import Check, Refits, TopInfluences, Verification, plot
from torch_influence.scores._ranking import Ranking

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba

pytestmark = pytest.mark.filterwarnings("error")
IMAGES = torch.rand(20, 4, 4, generator=torch.Generator().manual_seed(0))
TEXTS = [f"example {i} costs $5_{{ and " + "goes on and on " * i for i in range(20)]
ROWS = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _close() -> Any:
    yield
    plt.close("all")


def top_of(q: int, k: int) -> TopInfluences:
    """Of random scores of 20 training examples."""
    scores = torch.randn(q, 20, generator=torch.Generator().manual_seed(q + k), dtype=torch.float64)
    return TopInfluences(Ranking(*scores.topk(k)), Ranking(*scores.topk(k, largest=False)))


def legend(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


# -- examples ---------------------------------------------------------------------------------------------------------


def test_examples_are_in_order_with_their_labels_and_scores() -> None:
    top, labels = top_of(2, 3), torch.arange(20) % 10
    figure = plot.examples(IMAGES[:2], IMAGES, top, query_labels=["first", "second"], train_labels=labels)
    assert len(figure.axes) == 2 * 7
    for row in range(2):
        cells = figure.axes[7 * row : 7 * row + 7]
        assert cells[0].get_xlabel() == ["first", "second"][row]
        indices = torch.cat([top.helpful.indices[row], top.harmful.indices[row]]).tolist()
        scores = torch.cat([top.helpful.values[row], top.harmful.values[row]]).tolist()
        for cell, i, score in zip(cells[1:], indices, scores, strict=True):
            assert cell.get_xlabel() == f"{i % 10}\n#{i}  {score:+.3g}"
            frame = to_rgba("tab:blue" if score > 0 else "tab:orange")
            assert all(spine.get_edgecolor() == frame for spine in cell.spines.values())
        for cell, image in zip(cells, [IMAGES[row], *IMAGES[indices]], strict=True):
            (drawn,) = cell.images
            np.testing.assert_array_equal(drawn.get_array(), (255 * image).round())
            assert drawn.get_clim() == (0, 255)
    headings = {i: cell.get_title(loc="left") for i, cell in enumerate(figure.axes) if cell.get_title(loc="left")}
    assert headings == {0: "query", 1: "most helpful", 4: "most harmful"}


def test_examples_of_a_module() -> None:
    it = module()
    x = it.train_loader.dataset.tensors[0]
    top = it.influence_matrix(test_idxs=[4], top_k=2)
    figure = plot.examples(it.test_loader.dataset.tensors[0][[4]], x, top, feature_names=["a", "b", "c", "d"])
    values, indices = it.helpful([4], k=2)
    assert figure.axes[1].get_xlabel() == f"#{int(indices[0, 0])}  {float(values[0, 0]):+.3g}"
    (drawn,) = figure.axes[1].texts
    lines = [line.split() for line in drawn.get_text().splitlines()]
    assert [name for name, _ in lines] == ["a", "b", "c", "d"]
    assert [value for _, value in lines] == [f"{value:.4g}" for value in x[indices[0, 0]].tolist()]


def test_highlighted_examples_are_labelled_in_red() -> None:
    top = top_of(1, 2)
    chosen = int(top.harmful.indices[0, 0])
    figure = plot.examples(IMAGES[:1], IMAGES, top, highlight={chosen})
    assert [cell.xaxis.label.get_color() for cell in figure.axes] == ["black"] * 3 + ["crimson", "black"]


def test_images_with_colours_and_a_map_for_those_without() -> None:
    colours = torch.rand(20, 3, 4, 4)
    figure = plot.examples(colours[:1], colours, top_of(1, 1))
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), (255 * colours[0]).round().permute(1, 2, 0))
    figure = plot.examples(IMAGES[:1], IMAGES, top_of(1, 1), cmap="gray_r")
    assert {cell.images[0].get_cmap().name for cell in figure.axes} == {"gray_r"}


@pytest.mark.parametrize("data", [IMAGES, TEXTS, ROWS], ids=["images", "texts", "rows"])
@pytest.mark.parametrize(("q", "k"), [(1, 1), (2, 4)])
def test_nothing_is_cut_or_overlaps(data: Any, q: int, k: int) -> None:
    labels = ["a label that is much too long for the place it has"] * 20
    figure = plot.examples(data[:q], data, top_of(q, k), query_labels=labels[:q], train_labels=labels)
    figure.canvas.draw()
    whole = figure.bbox
    texts = [figure._supxlabel, *(cell.xaxis.label for cell in figure.axes)]
    texts += [text for cell in figure.axes for text in (*cell.texts, cell._left_title) if text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    for text, box in zip(texts, boxes, strict=True):
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1, text
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1, text
        assert text.get_fontsize() >= 7
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i]), texts[i]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": IMAGES[:3]}, "queries: expected 2, one for each row of top, got 3"),
        ({"query_labels": ["one"]}, "query_labels: expected 2, one for each row of top, got 1"),
        ({"queries": [], "top": TopInfluences(*[Ranking(torch.empty(0, 3), torch.empty(0, 3))] * 2)}, "top: expected"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot.examples(**({"queries": IMAGES[:2], "train": IMAGES, "top": top_of(2, 3)} | change))


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", [True, False])
def test_bars_are_as_high_as_there_are_scores_in_them(log: bool) -> None:
    scores = torch.randn(500, dtype=torch.float64)
    scores[:7] = 0.0
    ax = plot.scores(scores, bins=20, log=log)
    zero = [bar for bar in ax.patches if bar.get_x() < 0 < bar.get_x() + bar.get_width() * (1 - 1e-9)]
    assert [bar.get_height() for bar in zero] == [7]
    bars = [bar for bar in ax.patches if bar not in zero]
    assert sum(bar.get_height() for bar in bars) == 493
    for bar in bars:
        low, high = bar.get_x(), bar.get_x() + bar.get_width()
        inside = ((scores > low) & (scores < high) & (scores != 0)).sum()
        assert abs(bar.get_height() - int(inside)) <= 1  # the one at either end, by rounding
        assert bar.get_facecolor() == to_rgba("tab:blue" if low + high > 0 else "tab:orange")
    assert ax.get_yscale() == ("log" if log else "linear")
    assert legend(ax) == [
        f"+ helpful, removing one raises the loss: {int((scores > 0).sum())}",
        f"- harmful, removing one lowers it: {int((scores < 0).sum())}",
        "exactly zero: 7",
    ]


def test_scores_that_are_not_finite_are_told() -> None:
    assert legend(plot.scores([1.0, float("nan"), -1.0]))[-1] == "not finite, not drawn: 1"


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [2.0]], ids=str)
def test_few_scores(values: list[float]) -> None:
    ax = plot.scores(values)
    ax.figure.canvas.draw()
    assert sum(bar.get_height() for bar in ax.patches) == len(values)


# -- refits -----------------------------------------------------------------------------------------------------------

PREDICTED = torch.linspace(-1, 2, 9, dtype=torch.float64)
ACTUAL = 0.8 * PREDICTED + 0.1 * torch.tensor([1.0, -1, 2, 0, 1, -2, 0, 1, -1], dtype=torch.float64)
REFITS = Refits(tuple(range(9)), PREDICTED, ACTUAL, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "given",
    [
        (PREDICTED, ACTUAL),
        (PREDICTED.tolist(), ACTUAL.numpy()),
        (REFITS,),
        (Verification([Check("slope", True, 1.0, 2.0, "")], REFITS),),
    ],
    ids=["tensors", "arrays", "refits", "verification"],
)
def test_refits_are_points_beside_the_line_of_slope_one(given: tuple[Any, ...]) -> None:
    ax = plot.refits(*given)
    line, points = ax.lines
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    assert line.get_xdata()[0] == float(torch.cat([PREDICTED, ACTUAL]).min())
    assert line.get_xdata()[1] == float(torch.cat([PREDICTED, ACTUAL]).max())
    np.testing.assert_array_equal(points.get_xdata(), PREDICTED)
    np.testing.assert_array_equal(points.get_ydata(), ACTUAL)
    r = np.corrcoef(PREDICTED, ACTUAL)[0, 1]
    slope = np.linalg.lstsq(PREDICTED[:, None].numpy(), ACTUAL.numpy(), rcond=None)[0][0]
    assert legend(ax)[1] == f"9 examples: Pearson r = {r:.3f}, slope {slope:.3f}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((Verification([]),), "found: expected a Verification with refits"),
        ((PREDICTED,), "actual: expected changes of the test loss"),
        ((PREDICTED, ACTUAL[1:]), r"got shapes \[9\] and \[8\]"),
        (([1.0], [1.0]), "m >= 2"),
    ],
)
def test_no_pairs_no_picture(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot.refits(*given)


# -- all of them ------------------------------------------------------------------------------------------------------


def into_axes() -> dict[str, Callable[..., Any]]:
    it = module()
    it.influence_matrix()
    found, report = it.spectrum(), it.last_report
    return {
        "plot.scores": lambda **ax: plot.scores(torch.randn(9), **ax),
        "plot.refits": lambda **ax: plot.refits(PREDICTED, ACTUAL, **ax),
        "SolveReport.plot": report.plot,
        "Spectrum.plot": found.plot,
    }


def test_given_axes_are_drawn_into_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plt, "show", lambda: pytest.fail("shown"))
    before = dict(mpl.rcParams)
    figure, others = plt.subplots(2)
    for draw in into_axes().values():
        ax = figure.add_subplot()
        plt.sca(others[1])
        assert draw(ax=ax) is ax
        assert ax.has_data()
        assert plt.gca() is others[1]
    part = figure.subfigures(1, 2)[0]
    assert plot.examples(IMAGES[:1], IMAGES, top_of(1, 1), figure=part) is part
    assert len(part.axes) == 3
    assert plt.get_fignums() == [figure.number]
    for draw in into_axes().values():
        assert draw().figure is not figure
    assert dict(mpl.rcParams) == before


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = into_axes()
    draws["plot.examples"] = lambda: plot.examples(IMAGES[:1], IMAGES, top_of(1, 1))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for name, draw in draws.items():
        with pytest.raises(ImportError, match=rf"{name} needs matplotlib: pip install 'torch-influence\[plot\]'"):
            draw()


def test_importing_the_package_does_not_import_matplotlib() -> None:
    code = "import sys, torch_influence; torch_influence.plot.scores; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
