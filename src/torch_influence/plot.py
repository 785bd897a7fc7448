"""Pictures of examples, scores, refits, solves and spectra, drawn with matplotlib (extra ``[plot]``).

Each function draws into the axes or the figure that it is given, or else into new ones, and returns them; none shows
or saves anything.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

from torch_influence.exhibits import Exhibit, Image, Words, binned, exhibit, label_of, numbers, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from torch_influence.diagnostics import Spectrum
    from torch_influence.scores import TopInfluences
    from torch_influence.solvers import SolveReport
    from torch_influence.verification import Refits, Verification

__all__ = ["examples", "refits", "scores", "solves", "spectrum"]

HELPFUL, HARMFUL, NEITHER = "tab:blue", "tab:orange", "tab:gray"
_IMAGE, _OTHER = (1.5, 1.85), (2.4, 2.2)  # inches for an example, and what is written under it
_LINES, _LETTERS = 11, 28  # of a text or row
_UNDER_IMAGE, _UNDER_OTHER = 19, 30  # letters of a label


def examples(
    queries: Sequence[Any],
    train: Any,
    top: TopInfluences,
    *,
    query_labels: Sequence[Any] | None = None,
    train_labels: Any = None,
    feature_names: Sequence[str] | None = None,
    highlight: Collection[int] = (),
    cmap: str = "gray",
    figure: Figure | SubFigure | None = None,
) -> Any:
    """Draws each query with its most helpful and its most harmful training examples beside it: one row a query.

    Under an example are its label, its index, and its score: by how much removing it is predicted to raise (+) or
    lower (-) the query's test loss. Its frame is blue where that is positive, orange where it is negative.

    Args:
        queries: what to show of each query, in the order of the rows of ``top``: images [C, h, w] or [h, w], texts, or
            rows of numbers [d].
        train: what to show of training examples, likewise: ``train[i]`` for an index i of the training data.
        top: what ``influence_matrix(test_idxs=..., top_k=...)`` has returned.
        query_labels: a label for each query.
        train_labels: ``train_labels[i]`` is that of training example i.
        feature_names: of the numbers of a row.
        highlight: indices of training examples that are labelled in red.
        cmap: matplotlib's colour map of images without colours; "gray_r" for ink on paper.
        figure: to draw into; a new one of a fitting size by default.

    Returns:
        The figure. Its axes are in reading order, 1 + 2 k for each query.

    Raises:
        ValueError: the numbers of queries, their labels and the rows of ``top`` differ; there are none.
        ImportError: matplotlib is not installed.

    Examples:
        >>> top = module.influence_matrix(test_idxs=[3, 4], top_k=4)
        >>> (queries, _), (x, y) = test_loader.dataset[[3, 4]], train_loader.dataset[:]
        >>> figure = plot.examples(queries, x, top, train_labels=y)
    """
    q, k = top.helpful.values.shape
    for name, given in (("queries", queries), ("query_labels", query_labels)):
        if given is not None and len(given) != q:
            raise ValueError(f"{name}: expected {q}, one for each row of top, got {len(given)}")
    if q == 0 or k == 0:
        raise ValueError(f"top: expected at least one query and one example of each, got values of shape [{q}, {k}]")
    shown = [exhibit(query, feature_names) for query in queries]
    width, height = _IMAGE if isinstance(shown[0], Image) else _OTHER
    if figure is None:
        figure = _pyplot("plot.examples").figure(figsize=(width * (1 + 2 * k), height * q + 0.9), layout="constrained")
    grid = figure.subplots(q, 1 + 2 * k, squeeze=False)
    for row in range(q):
        _draw(grid[row, 0], shown[row], cmap)
        _caption(grid[row, 0], "" if query_labels is None else label_of(query_labels[row]), "", "black")
        cells = iter(grid[row, 1:])
        for side in (top.helpful, top.harmful):
            for score, i in zip(side.values[row].tolist(), side.indices[row].tolist(), strict=True):
                cell = next(cells)
                _draw(cell, exhibit(train[i], feature_names), cmap)
                label = "" if train_labels is None else label_of(train_labels[i])
                _caption(cell, label, f"#{i}  {score:+.3g}", "crimson" if i in highlight else "black")
                color = HELPFUL if score > 0 else HARMFUL if score < 0 else NEITHER
                for spine in cell.spines.values():
                    spine.set(color=color, linewidth=2)
    for column, heading in ((0, "query"), (1, "most helpful"), (1 + k, "most harmful")):
        grid[0, column].set_title(heading, loc="left", fontsize=10, fontweight="bold")
    figure.supxlabel(
        "+ helpful: without it the query's loss rises by so much\n- harmful: without it that falls by so much",
        fontsize=8.5,
    )
    return figure


def scores(values: Any, *, bins: int = 41, log: bool = True, ax: Axes | None = None) -> Axes:
    """Draws how the scores of one query are distributed, helpful and harmful examples in two colours.

    No bar has scores of both signs; those that are exactly zero have a narrow gray bar at zero.

    Args:
        values: scores [n] of the training examples, a column of ``influence_matrix()``.
        bins: how many bars, about.
        log: a logarithmic axis for the counts: most scores are close to zero, those that matter few.
        ax: axes to draw into; new ones by default.

    Returns:
        The axes.

    Raises:
        ValueError: scores that are not of shape [n]; bins less than 1.
        ImportError: matplotlib is not installed.

    Examples:
        >>> ax = plot.scores(module.influence_matrix(test_idxs=[3])[:, 0])
    """
    found = binned(values, bins)
    ax = _axes(ax, "plot.scores")
    from matplotlib.patches import Patch

    left, width = found.edges[:-1], float(found.edges[-1] - found.edges[0]) / max(len(found.counts), 1)
    for side, color in ((left >= 0, HELPFUL), (left < 0, HARMFUL)):
        ax.bar(left[side], found.counts[side], width=width, align="edge", color=color)
    if found.zero:
        ax.bar([0.0], [found.zero], width=(width or 1.0) / 4, color=NEITHER)
    told = [
        (HELPFUL, f"+ helpful, removing one raises the loss: {found.helpful}"),
        (HARMFUL, f"- harmful, removing one lowers it: {found.harmful}"),
        (NEITHER, f"exactly zero: {found.zero}" if found.zero else ""),
        ("none", f"not finite, not drawn: {found.lost}" if found.lost else ""),
    ]
    patches = [Patch(color=color, label=label) for color, label in told if label]
    bottom, most = (0.5 if log else 0.0), max(float(max(found.counts, default=0)), found.zero, 1.0)
    bars = 1 - 0.08 * len(patches)  # of the height; the legend is above them
    if log:
        ax.set_yscale("log", nonpositive="clip")
    ax.set_ylim(bottom, bottom * (most / bottom) ** (1 / bars) if log else most / bars)
    ax.axvline(0.0, color="black", linewidth=0.8)
    ax.set_xlabel("score: predicted change of the test loss without the example")
    ax.set_ylabel("training examples")
    ax.legend(handles=patches, fontsize=8, loc="upper left")
    return ax


def refits(found: Verification | Refits | Any, actual: Any = None, *, ax: Axes | None = None) -> Axes:
    """Draws actual changes of the test loss, after refits without an example, against predicted ones.

    With the line on which both are the same; the legend has Pearson's correlation and the slope of actual on predicted
    changes through the origin, 1 where the size is right.

    Args:
        found: what ``module.verify(fit=...)`` has returned, or its ``refits``; or predicted changes [m].
        actual: the actual changes [m], where predicted ones are given.
        ax: axes to draw into; new ones by default.

    Returns:
        The axes.

    Raises:
        ValueError: a ``Verification`` without refits; fewer than two changes, or not as many actual as predicted ones.
        ImportError: matplotlib is not installed.

    Examples:
        >>> ax = plot.refits(module.verify(fit=train_my_model))
        >>> ax = plot.refits([0.11, -0.20, 0.05], [0.12, -0.18, 0.04])  # predicted, actual
    """
    from torch_influence.verification import Refits, Verification  # here: it imports the solvers, which draw with this

    if isinstance(found, Verification):
        if found.refits is None:
            raise ValueError("found: expected a Verification with refits, got one without; call verify(fit=...)")
        found = found.refits
    if not isinstance(found, Refits):
        if actual is None:
            raise ValueError("actual: expected changes of the test loss, one for each predicted one, got None")
        pair = [torch.from_numpy(numbers(values)) for values in (found, actual)]
        found = Refits(tuple(range(len(pair[0]))), pair[0], pair[1], math.nan, math.nan, math.nan)
    predicted, changes = found.predicted, found.actual
    if predicted.dim() != 1 or predicted.shape != changes.shape or len(predicted) < 2:
        raise ValueError(
            f"found, actual: expected as many predicted as actual changes, [m] with m >= 2, got shapes "
            f"{list(predicted.shape)} and {list(changes.shape)}"
        )
    ax = _axes(ax, "plot.refits")
    ends = torch.cat([predicted, changes]).aminmax()
    line = [float(ends.min), float(ends.max)]
    ax.plot(line, line, color=NEITHER, linestyle="--", linewidth=1, label="actual = predicted")
    label = f"{len(predicted)} examples: Pearson r = {found.correlation:.3f}, slope {found.slope:.3f}"
    ax.plot(predicted.numpy(), changes.numpy(), "o", color=HELPFUL, markersize=5, alpha=0.8, label=label)
    ax.set_xlabel("predicted change of the test loss")
    ax.set_ylabel("actual change, after a refit")
    ax.legend(fontsize=8)
    return ax


def solves(report: SolveReport, *, ax: Axes | None = None) -> Axes:
    """Draws how a solve went: residuals by iteration if ``history`` was asked for, else each row's last one.

    Args:
        report: ``module.last_report``, or what a solver has returned.
        ax: axes to draw into; new ones by default.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    ax = _axes(ax, "SolveReport.plot")
    if report.history is not None:
        alpha = max(0.2, 1 / max(len(report.iterations), 1) ** 0.5)
        ax.semilogy(report.history.numpy(), color="tab:blue", linewidth=1, alpha=alpha)
    limited = report.precision_limit
    for which, marker, color, label in (
        (report.converged, "o", "tab:green", "converged"),
        (limited, "s", "tab:orange", "limit of the arithmetic"),
        (~(report.converged | limited), "x", "tab:red", "not converged"),
    ):
        if which.any():
            across = report.iterations if report.history is not None else torch.arange(len(which), device="cpu")
            label = f"{label} ({int(which.sum())})"
            ax.semilogy(across[which].numpy(), report.residual[which].numpy(), marker, color=color, label=label)
    ax.set_xlabel("iteration" if report.history is not None else "right-hand side")
    ax.set_ylabel("|b - Ax| / |b|" + (", by the recurrence" if report.history is not None else ""))
    if report.rtol == report.rtol:
        ax.axhline(report.rtol, color="gray", linestyle="--", linewidth=1, label=f"rtol = {report.rtol:g}")
    ax.set_title(report.method)
    ax.legend()
    return ax


def spectrum(found: Spectrum, *, ax: Axes | None = None) -> Axes:
    """Draws the eigenvalues of H with their errors, and where -damp is: what lies left of it makes A indefinite.

    Args:
        found: what ``module.spectrum()`` has returned.
        ax: axes to draw into; new ones by default.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    ax = _axes(ax, "Spectrum.plot")
    values = torch.cat([found.smallest, found.largest]).numpy()
    errors = torch.cat([found.smallest_errors, found.largest_errors]).numpy()
    ax.errorbar(values, list(range(len(values))), xerr=errors, fmt="o", color="tab:blue", label="eigenvalues")
    ax.axvline(-found.damp, color="tab:red", linestyle="--", linewidth=1, label=f"-damp = {-found.damp:g}")
    ax.set_xscale("symlog", linthresh=max(float(errors.max()), torch.finfo(torch.float64).tiny))
    ax.set_xlabel("eigenvalue of the undamped curvature")
    ax.set_yticks([])
    ax.legend()
    return ax


def _pyplot(who: str) -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(f"{who} needs matplotlib: pip install 'torch-influence[plot]'") from error
    return plt


def _axes(ax: Axes | None, who: str) -> Axes:
    return _pyplot(who).subplots(layout="constrained")[1] if ax is None else ax


def _draw(cell: Any, shown: Exhibit, cmap: str) -> None:
    cell.set_xticks([])
    cell.set_yticks([])
    if isinstance(shown, Image):
        cell.imshow(shown.pixels, cmap=cmap, vmin=0, vmax=255, interpolation="nearest")
        return
    if isinstance(shown, Words):
        lines = textwrap.wrap(shown.text, _LETTERS, max_lines=_LINES, placeholder=" …") or [""]
    else:
        row = shortened(shown, _LINES)
        names = [name if len(name) <= 15 else name[:14] + "…" for name in row.names]
        lines = [f"{name:<15} {value:>10}" for name, value in zip(names, row.values, strict=True)]
    family = "sans-serif" if isinstance(shown, Words) else "monospace"
    cell.text(
        0.04, 0.95, "\n".join(lines), transform=cell.transAxes, va="top", fontsize=7.5, family=family, parse_math=False
    )


def _caption(cell: Any, label: str, score: str, color: str) -> None:
    most = _UNDER_IMAGE if cell.images else _UNDER_OTHER
    label = label if len(label) <= most else label[: most - 1] + "…"
    text = "\n".join(line for line in (label, score) if line)
    cell.set_xlabel(text, fontsize=8.5, color=color, labelpad=3, parse_math=False)
