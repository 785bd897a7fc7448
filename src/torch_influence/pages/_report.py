"""One analysis as a page: module.report()."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torch_influence.batches import Batches
from torch_influence.exhibits import Exhibit, binned, exhibit, split
from torch_influence.pages._page import Entry, Page, Query, write
from torch_influence.problem import Problem
from torch_influence.scores import Ranking, Tile, TopInfluences, check_top_k, top
from torch_influence.solvers import SolveReport
from torch_influence.turns import WARNINGS, alone_with

if TYPE_CHECKING:
    from torch_influence.base import BaseInfluenceModule

_BARS = 41  # of a distribution of scores


def report(
    module: BaseInfluenceModule,
    problem: Problem,
    path: str | os.PathLike[str],
    test_idxs: Sequence[int],
    *,
    k: int,
    train_idxs: Sequence[int] | None,
    show: Callable[[Any], Any] | None,
    feature_names: Sequence[str] | None,
    self_influences: int,
    title: str | None,
) -> Path:
    """Writes the page; see BaseInfluenceModule.report, whose arguments these are."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: expected a file in a folder that exists, got {path}; create {path.parent}")
    indices = problem.train.indices(train_idxs, "train_idxs")
    queries = problem.test.indices(test_idxs, "test_idxs")
    if not queries or not indices:
        raise ValueError("test_idxs, train_idxs: expected at least one index, got none")
    k = check_top_k(k)
    if self_influences < 0:
        raise ValueError(f"self_influences: expected a number of examples, at least 0, got {self_influences}")

    shown = _Shown(show, feature_names)
    looks = [shown(problem.test, problem.test_loader, q) for q in queries]
    shown(problem.train, problem.train_loader, indices[0])  # before the work: what show() does wrong should show soon

    def entries(ranking: Ranking, row: int) -> list[Entry]:
        pairs = zip(ranking.indices[row].tolist(), ranking.values[row].tolist(), strict=True)
        return [Entry(i, score, *shown(problem.train, problem.train_loader, i)) for i, score in pairs]

    with problem.evaluation.alone(), _noted() as given:
        plan = module.explain(len(queries))
        scores, solved = module._reported(lambda: module.influence_matrix(indices, queries))
        best, solves = _best(scores, indices, k), [("Solves for the scores", _in_words(solved))]
        selves: list[Entry] | None = None
        losses = [problem.mean_test_loss([q]) for q in queries]
        if self_influences:
            own, solved = module._reported(lambda: module.self_influences(indices))
            selves = entries(_best(own[:, None], indices, self_influences).helpful, 0)
            solves.append(("Solves for self-influence", _in_words(solved)))
    sides = [(entries(best.helpful, row), entries(best.harmful, row)) for row in range(len(queries))]
    page = Page(
        title=title or "Which training examples helped, which harmed?",
        asked=_asked(module, problem, indices, queries, k),
        plan=[(step.part, step.summary(), [": ".join(pair) for pair in step.why_not]) for step in plan.steps],
        solves=solves,
        warnings=[f"{warning.category.__name__}: {warning.message}" for warning in given],
        queries=[
            Query(q, losses[row], *looks[row], *sides[row], binned(scores[:, row], _BARS))
            for row, q in enumerate(queries)
        ],
        self_influences=selves,
        made=_made(),
    )
    write(path, page.html())
    return path


def _in_words(report: SolveReport | None) -> str:
    return "no report: this module's inverse_hvp makes none" if report is None else str(report)


def _asked(
    module: BaseInfluenceModule, problem: Problem, indices: list[int], queries: list[int], k: int
) -> list[tuple[str, str]]:
    chosen = ", ".join(problem.space.names[:8]) + (", …" if len(problem.space.names) > 8 else "")
    pool = "" if len(indices) == problem.train.n else f", {len(indices):,} of them to choose from"
    return [
        ("module", type(module).__name__),
        ("model", f"{type(module.model).__name__}; {problem.space.size:,} parameters differentiated: {chosen}"),
        ("objective", type(problem.objective).__name__),
        ("curvature", f"{'Gauss-Newton' if problem.gnh else 'Hessian'} of the training objective"),
        ("damping", f"{problem.damp:g}, added once to the curvature"),
        ("data", f"{problem.train.n:,} training examples{pool}; {problem.test.n:,} test examples"),
        ("queries", f"{len(queries)}, each with the {k} most helpful and the {k} most harmful training examples"),
        ("arithmetic", f"{str(problem.space.pass_dtype).removeprefix('torch.')} on {problem.device}"),
    ]


class _Shown:
    """The exhibits of examples of a data set, and their labels."""

    def __init__(self, show: Callable[[Any], Any] | None, feature_names: Sequence[str] | None) -> None:
        self._show, self._feature_names = show, feature_names

    def __call__(self, batches: Batches, loader: Any, i: int) -> tuple[str, Exhibit]:
        with batches.quietly():
            example = loader.dataset[i]
            thing, label = split(example if self._show is None else self._show(example))
            return label, exhibit(thing, self._feature_names)


def _best(scores: Tensor, indices: list[int], k: int) -> TopInfluences:
    """Ranks scores [n, q], as ``influence_matrix(top_k=k)`` does."""
    n, q = scores.shape
    return top([Tile(range(n), range(q), scores)], indices, q, k, scores.dtype, scores.device)


@contextlib.contextmanager
def _noted() -> Iterator[list[warnings.WarningMessage]]:
    """Notes the warnings that are given meanwhile, each once, and gives them at the end."""
    found: list[warnings.WarningMessage] = []
    try:
        with alone_with(WARNINGS), warnings.catch_warnings(record=True) as caught:
            try:
                yield found
            finally:
                first: dict[Any, warnings.WarningMessage] = {}
                for warning in caught:
                    first.setdefault((warning.category, str(warning.message)), warning)
                found += first.values()
    finally:
        for w in found:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


def _made() -> str:
    now = datetime.datetime.now().astimezone()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch-influence", "torch", "numpy"))
    return f"Made on {now:%Y-%m-%d at %H:%M %Z} with {versions} and Python {platform.python_version()}."
