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

import torch
from torch import Tensor, nn

from torch_influence.exhibits import Exhibit, binned, exhibit, split
from torch_influence.page import Entry, Page, Query, write
from torch_influence.ranking import Ranking, TopInfluences, check_top_k, top
from torch_influence.scores import Tile
from torch_influence.turns import WARNINGS, alone_with

if TYPE_CHECKING:
    from torch_influence.batches import Batches
    from torch_influence.evaluation import Evaluation
    from torch_influence.parameters import ParameterSpace
    from torch_influence.plan import Plan
    from torch_influence.solvers import SolveReport

_BARS = 41  # of a distribution of scores


class ReportMethods:
    """Mixed into BaseInfluenceModule."""

    device: torch.device
    model: nn.Module
    objective: Any
    damp: float
    gnh: bool
    train_loader: Any
    test_loader: Any
    _space: ParameterSpace
    _evaluation: Evaluation
    _train: Batches
    _reports: list[SolveReport]

    if TYPE_CHECKING:  # what BaseInfluenceModule has

        @property
        def _test(self) -> Batches: ...
        @property
        def last_report(self) -> SolveReport | None: ...  # noqa: D102
        def explain(self, queries: int = 1) -> Plan: ...  # noqa: D102
        def influence_matrix(self, train_idxs: Any = None, test_idxs: Any = None) -> Tensor: ...  # noqa: D102
        def self_influences(self, train_idxs: Any = None) -> Tensor: ...  # noqa: D102
        def _mean_test_loss(self, evaluation: Evaluation, queries: list[int]) -> float: ...

    def report(
        self,
        path: str | os.PathLike[str],
        test_idxs: Sequence[int],
        *,
        k: int = 6,
        train_idxs: Sequence[int] | None = None,
        show: Callable[[Any], Any] | None = None,
        feature_names: Sequence[str] | None = None,
        self_influences: int = 0,
        title: str | None = None,
    ) -> Path:
        """Writes one HTML page on some queries: what helps them, what harms them, how that was computed, how well.

        For each query: its test loss, its k most helpful and k most harmful training examples with their scores, as
        ``helpful`` and ``harmful`` have them, and the distribution of all scores. Beside that the settings, the way
        taken (``explain()``), the residuals of the solves, the warnings, versions and date. The page holds all that it
        shows and asks for nothing from elsewhere; it needs no extra package. The file is written whole or not at all.

        Args:
            path: of the file; an older one is replaced.
            test_idxs: distinct indices of test examples, each of them a query; at least one.
            k: how many training examples on either side.
            train_idxs: the training examples to choose from (default: all).
            show: show(example) returns what to show of an example ``loader.dataset[i]``: an image [C, h, w], [h, w, C]
                or [h, w], a text, a row of numbers, or a pair of one of these and a label. By default the example
                itself, if it is of that kind: a pair, a mapping with a text or an array and a label. Numbers within
                0..1 and bytes are brightness; other images are spread from their least to their largest number.
            feature_names: of the numbers of a row.
            self_influences: list so many training examples of the largest self-influence, too.
            title: of the page.

        Returns:
            The path.

        Raises:
            ValueError: no query, duplicates; k less than 1; self_influences negative; feature_names that do not fit.
            IndexError: an index out of range.
            FileNotFoundError: the folder does not exist. Known, as are the others, before anything is computed.

        Warns:
            what ``influence_matrix`` warns of; the page lists it, too.

        Cost:
            that of ``explain()``, of ``influence_matrix`` with its memory, n_train n_query numbers, and, if asked for,
            of ``self_influences``. The page: some kB for an image of 100 x 100.

        Examples:
            >>> path = module.report("why.html", test_idxs=[3, 4])
            >>> path = module.report("why.html", [3, 4], show=lambda example: (example[0].reshape(2, 2), example[1]))
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"path: expected a file in a folder that exists, got {path}; create {path.parent}")
        indices = self._train.indices(train_idxs, "train_idxs")
        queries = self._test.indices(test_idxs, "test_idxs")
        if not queries or not indices:
            raise ValueError("test_idxs, train_idxs: expected at least one index, got none")
        k = check_top_k(k)
        if self_influences < 0:
            raise ValueError(f"self_influences: expected a number of examples, at least 0, got {self_influences}")

        shown = _Shown(show, feature_names)
        looks = [shown(self._test, self.test_loader, q) for q in queries]
        shown(self._train, self.train_loader, indices[0])  # before the work: what show() does wrong should show soon

        def entries(ranking: Ranking, row: int) -> list[Entry]:
            pairs = zip(ranking.indices[row].tolist(), ranking.values[row].tolist(), strict=True)
            return [Entry(i, score, *shown(self._train, self.train_loader, i)) for i, score in pairs]

        with self._evaluation.alone(), _noted() as given:
            plan = self.explain(len(queries))
            scores, solved = self._reported(lambda: self.influence_matrix(indices, queries))
            best, solves = _best(scores, indices, k), [("Solves for the scores", solved)]
            selves: list[Entry] | None = None
            losses = [self._mean_test_loss(self._evaluation, [q]) for q in queries]
            if self_influences:
                own, solved = self._reported(lambda: self.self_influences(indices))
                selves = entries(_best(own[:, None], indices, self_influences).helpful, 0)
                solves.append(("Solves for self-influence", solved))
        sides = [(entries(best.helpful, row), entries(best.harmful, row)) for row in range(len(queries))]
        page = Page(
            title=title or "Which training examples helped, which harmed?",
            asked=self._asked(indices, queries, k),
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

    # -- private ------------------------------------------------------------------------------------------------------

    def _reported(self, compute: Callable[[], Tensor]) -> tuple[Tensor, str]:
        """What is computed, and the report of the solves that took."""
        before = self._reports
        result = compute()
        report = self.last_report if self._reports is not before else None
        return result, "no report: this module's inverse_hvp makes none" if report is None else str(report)

    def _asked(self, indices: list[int], queries: list[int], k: int) -> list[tuple[str, str]]:
        chosen = ", ".join(self._space.names[:8]) + (", …" if len(self._space.names) > 8 else "")
        pool = "" if len(indices) == self._train.n else f", {len(indices):,} of them to choose from"
        return [
            ("module", type(self).__name__),
            ("model", f"{type(self.model).__name__}; {self._space.size:,} parameters differentiated: {chosen}"),
            ("objective", type(self.objective).__name__),
            ("curvature", f"{'Gauss-Newton' if self.gnh else 'Hessian'} of the training objective"),
            ("damping", f"{self.damp:g}, added once to the curvature"),
            ("data", f"{self._train.n:,} training examples{pool}; {self._test.n:,} test examples"),
            ("queries", f"{len(queries)}, each with the {k} most helpful and the {k} most harmful training examples"),
            ("arithmetic", f"{str(self._space.pass_dtype).removeprefix('torch.')} on {self.device}"),
        ]


class _Shown:
    """What is shown of examples of a data set, and their labels."""

    def __init__(self, show: Callable[[Any], Any] | None, feature_names: Sequence[str] | None) -> None:
        self._show, self._feature_names = show, feature_names

    def __call__(self, batches: Batches, loader: Any, i: int) -> tuple[str, Exhibit]:
        with batches.quietly():
            example = loader.dataset[i]
            thing, label = split(example if self._show is None else self._show(example))
            return label, exhibit(thing, self._feature_names)


def _best(scores: Tensor, indices: list[int], k: int) -> TopInfluences:
    """Of scores [n, q], as if they had been ranked while they were computed."""
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
