"""Scores as users ask for them: of a set of queries, of each query, the ends of each query's ranking, of oneself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, overload

import torch
from torch import Tensor

from torch_influence.examples import ExampleGradients
from torch_influence.ranking import Ranking, TopInfluences, check_top_k, top
from torch_influence.resident import free_memory
from torch_influence.scores import Tile, from_stests, from_training_rows, whole

if TYPE_CHECKING:
    from torch_influence.batches import Batches
    from torch_influence.evaluation import Evaluation
    from torch_influence.parameters import ParameterSpace

_VECTORS_OF_A_SOLVE = 8  # conjugate gradients keep 5 for each right-hand side; and what goes in and comes out


class InfluenceMethods:
    """Mixed into BaseInfluenceModule, which says what a score is."""

    either_side: ClassVar[bool]
    device: torch.device
    _space: ParameterSpace
    _evaluation: Evaluation
    _train: Batches

    if TYPE_CHECKING:  # what BaseInfluenceModule has

        @property
        def _test(self) -> Batches: ...
        @property
        def _row_bytes(self) -> int: ...
        def stest(self, test_idxs: Sequence[int]) -> Tensor: ...  # noqa: D102
        def stests(self, test_idxs: Sequence[int] | None = None) -> Tensor: ...  # noqa: D102
        def _as_rows(self, vecs: Tensor | None, argument: str, vectors_only: bool = False) -> Tensor: ...
        def _check_mean(self, loss: str, batches: Batches) -> None: ...
        def _examples(self) -> ExampleGradients: ...
        def _inverse_rows(self, rows: Tensor) -> Tensor: ...
        def _overridden(self, method: str) -> bool: ...

    def influences(
        self, train_idxs: Sequence[int], test_idxs: Sequence[int] | None, stest: Tensor | None = None
    ) -> Tensor:
        """Scores of training examples with respect to the mean test loss over a set of test examples.

        score[i] = (1/n) ∇(ℓᵢ + reg)(θ) · s: the predicted change of the mean test loss when example i is removed and
        the model trained again. Positive: i is helpful. Per-example gradients are those of batches of one.

        Args:
            train_idxs: distinct indices of training examples.
            test_idxs: distinct indices of test examples; None if ``stest`` is given.
            stest: a result of ``stest`` to use again, [d].

        Returns:
            [len(train_idxs)] on the CPU, in the order given.

        Raises:
            ValueError: duplicates, wrong shapes, no queries.
            IndexError: an index out of range.
            TypeError: indices that are not integers.

        Cost:
            one solve, unless ``stest`` is given, and one pass over the training examples named.

        Source:
            Koh and Liang 2017, eq. 2, with the sign of removal and the factor 1/n.

        Examples:
            >>> scores = module.influences(train_idxs=range(5), test_idxs=[0])
        """
        indices = self._train.indices([] if train_idxs is None else train_idxs, "train_idxs")
        if train_idxs is None:
            raise ValueError("train_idxs: expected indices, got None; influence_matrix() takes None for all examples")
        if stest is None and test_idxs is None:
            raise ValueError("test_idxs: expected indices of test examples, got None without an stest")
        with self._evaluation.session():
            s = self.stest(test_idxs) if stest is None and test_idxs is not None else stest
            tiles = self._tiles_of(indices, self._as_rows(s, "stest", vectors_only=True))
            return whole(tiles, indices, 1, self._space.dtype).squeeze(1)

    @overload
    def influence_matrix(
        self, train_idxs: Sequence[int] | None = None, test_idxs: Sequence[int] | None = None, *, top_k: None = None
    ) -> Tensor: ...

    @overload
    def influence_matrix(
        self, train_idxs: Sequence[int] | None = None, test_idxs: Sequence[int] | None = None, *, top_k: int
    ) -> TopInfluences: ...

    def influence_matrix(
        self,
        train_idxs: Sequence[int] | None = None,
        test_idxs: Sequence[int] | None = None,
        *,
        top_k: int | None = None,
    ) -> Tensor | TopInfluences:
        """score[i, q] for training examples i and test examples q (default: all): [n_train, n_query] on the CPU.

        Column q is ``influences(train_idxs, [test_idxs[q]])``; columns are solved together, as far as memory allows.
        With fewer training examples than queries the modules of this package but LiSSA solve for the training examples
        instead, A being symmetric.

        Args:
            train_idxs: distinct indices of training examples.
            test_idxs: distinct indices of test examples, each of them a query.
            top_k: keep only so many of each query's most helpful and of its most harmful training examples, while
                scores are computed. All, where there are fewer training examples: an example may be in both.

        Returns:
            The matrix; with ``top_k`` two rankings, ``.helpful`` and ``.harmful``, each of them ``(values, indices)``
            like torch.topk's, [n_query, top_k] on the CPU. Helpful: largest score first. Harmful: most negative first.
            Indices are those of the training data. Of equal scores the smaller index comes first; NaN comes last.

        Raises:
            ValueError: duplicates; top_k less than 1.
            IndexError: an index out of range.
            TypeError: indices, or top_k, that are not integers.

        Warns:
            RuntimeWarning: scores that are not finite.

        Cost:
            a solve of min(n_train, n_query) right-hand sides, in tiles whose vectors take a quarter of the free memory
            at the most, and one pass over the other side for each tile. Memory: the matrix; with ``top_k`` a tile of
            it, of at most 2048 examples and the queries of a solve, and 24 top_k n_query bytes in float32.

        Examples:
            >>> top = module.influence_matrix(test_idxs=[0, 1], top_k=10)
            >>> values, indices = top.harmful  # both [2, 10]
        """
        k = None if top_k is None else check_top_k(top_k)
        indices = self._train.indices(train_idxs, "train_idxs")
        queries = self._test.indices(test_idxs, "test_idxs")
        with self._evaluation.session():
            tiles = self._tiles(indices, queries)
            if k is None:
                return whole(tiles, indices, len(queries), self._space.dtype)
            return top(tiles, indices, len(queries), k, self._space.dtype, self.device)

    def helpful(
        self, test_idxs: Sequence[int] | None = None, k: int = 10, train_idxs: Sequence[int] | None = None
    ) -> Ranking:
        """The k training examples that help each query most: removing them raises its test loss most.

        Row q has the largest score[i, q] = (1/n) ∇(ℓᵢ + reg)(θ) · A⁻¹∇f_q(θ), largest first. Where fewer than k
        examples are helpful, others follow: those of ``values`` that are not positive.

        Args:
            test_idxs: distinct indices of test examples, each of them a query, as in influence_matrix (default: all).
            k: how many; all, where there are fewer training examples.
            train_idxs: the training examples to choose from (default: all).

        Returns:
            ``(values, indices)``, each [n_query, k] on the CPU; indices are those of the training data.

        Raises:
            ValueError, IndexError, TypeError: as ``influence_matrix`` does with ``top_k=k``.

        Cost:
            that of ``influence_matrix`` with ``top_k=k``, which is this and ``harmful`` in one.

        Examples:
            >>> values, indices = module.helpful([0], k=5)  # both [1, 5]
        """
        return self.influence_matrix(train_idxs, test_idxs, top_k=k).helpful

    def harmful(
        self, test_idxs: Sequence[int] | None = None, k: int = 10, train_idxs: Sequence[int] | None = None
    ) -> Ranking:
        """The k training examples that harm each query most: removing them lowers its test loss most.

        Row q has the smallest score[i, q], most negative first. Where fewer than k examples are harmful, others follow:
        those of ``values`` that are not negative.

        Args:
            test_idxs: distinct indices of test examples, each of them a query (default: all).
            k: how many; all, where there are fewer training examples.
            train_idxs: the training examples to choose from (default: all).

        Returns:
            ``(values, indices)``, as ``helpful``.

        Raises:
            ValueError, IndexError, TypeError: as ``helpful``.

        Cost:
            that of ``helpful``; ``influence_matrix(..., top_k=k)`` is both for the price of one.

        Examples:
            >>> values, indices = module.harmful([0, 1], k=5)  # both [2, 5]
        """
        return self.influence_matrix(train_idxs, test_idxs, top_k=k).harmful

    def self_influences(self, train_idxs: Sequence[int] | None = None) -> Tensor:
        """(1/n) gᵢᵀA⁻¹gᵢ with gᵢ = ∇(ℓᵢ + reg)(θ), for training examples i (default: all): [n_train] on the CPU.

        By how much the model's loss on example i grows when i is removed: large for examples that the rest of the
        data does not explain, mislabelled ones first. Never negative where A is positive definite.

        Args:
            train_idxs: distinct indices of training examples.

        Returns:
            [n_train] on the CPU, in the order given.

        Raises:
            ValueError: duplicates.
            IndexError: an index out of range.
            TypeError: indices that are not integers.

        Cost:
            a right-hand side per example, and a pass over these examples.

        Source:
            Koh and Liang (2017), section 5.4, for mislabelled examples.

        Examples:
            >>> suspects = module.self_influences().argsort(descending=True)[:10]
        """
        indices = self._train.indices(train_idxs, "train_idxs")
        scores = torch.empty(len(indices), dtype=self._space.dtype, device="cpu")
        with self._evaluation.session():
            if indices:
                self._check_mean("train_loss", self._train)
            for positions, rows in self._examples().rows(indices):
                scores[positions] = (rows * self._inverse_rows(rows)).sum(dim=-1).to(scores)
        return scores.div_(self._train.n)

    # -- private ------------------------------------------------------------------------------------------------------

    def _tiles(self, indices: list[int], queries: list[int]) -> Iterator[Tile]:
        """The scores, from whichever side has fewer right-hand sides."""
        if self.either_side and len(indices) < len(queries) and not self._overridden("stests"):
            if indices:
                self._check_mean("train_loss", self._train)
            self._check_mean("test_loss", self._test)
            tests = ExampleGradients(self._evaluation.test_loss, self._evaluation, self._test, "test gradients")
            yield from from_training_rows(self._examples(), indices, tests, queries, self._inverse_rows, self._train.n)
            return
        at_once = self._rows_that_fit()
        for first in range(0, len(queries), at_once):
            yield from self._tiles_of(indices, self.stests(queries[first : first + at_once]), first)

    def _tiles_of(self, indices: list[int], stests: Tensor, first: int = 0) -> Iterator[Tile]:
        if indices:
            self._check_mean("train_loss", self._train)
            yield from from_stests(self._examples(), indices, stests, self._train.n, first)

    def _rows_that_fit(self) -> int:
        """Right-hand sides that can be solved for at once: a solver keeps some vectors for each."""
        return max(1, free_memory(self.device) // 4 // (_VECTORS_OF_A_SOLVE * self._row_bytes))
