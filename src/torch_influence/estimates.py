"""Scores of a solver that repeats itself, with the standard errors that its repeats tell."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_influence.solving import SolvingModule


class Estimate(NamedTuple):
    """Scores, and how much they would differ in another run of as many repeats.

    Attributes:
        scores: as without standard errors.
        standard_error: of each score, of the same shape: the standard deviation over the repeats, divided by
            √repeats. NaN where fewer than two repeats came to an end.
    """

    scores: Tensor
    standard_error: Tensor


class EstimatingModule(SolvingModule):
    """A module whose solver averages ``repeat`` runs, and tells of each by ``after_repeat``."""

    repeat: int
    _spreads: list[_Spread] | None = None  # one for each solve, while standard errors are wanted
    _spread_examples: list[int]

    def estimated_influences(self, train_idxs: Sequence[int], test_idxs: Sequence[int] | None) -> Estimate:
        """Scores as ``influences`` has them, and their standard errors.

        standard_error[i] = √(Σ_r (score_r[i] - mean)² / (R - 1) / R) with score_r those of repeat r of R alone. It
        tells of sampling, not of the bias that too small a depth leaves (``last_report.residual`` does).

        Args:
            train_idxs: distinct indices of training examples.
            test_idxs: distinct indices of test examples.

        Returns:
            An ``Estimate`` of two vectors [len(train_idxs)] on the CPU; scores, seeded, are those of ``influences``.

        Raises:
            ValueError: a module with a single repeat; and as ``influences``.

        Cost:
            that of ``influences``, and a pass over the training examples named for each repeat.

        Examples:
            >>> scores, error = module.estimated_influences(range(10), [0])
        """
        return self._estimate(functools.partial(super().influences, train_idxs, test_idxs), train_idxs)

    def estimated_influence_matrix(
        self, train_idxs: Sequence[int] | None = None, test_idxs: Sequence[int] | None = None
    ) -> Estimate:
        """Scores as ``influence_matrix`` has them, and their standard errors, see ``estimated_influences``.

        Args:
            train_idxs: distinct indices of training examples (default: all).
            test_idxs: distinct indices of test examples, each of them a query (default: all).

        Returns:
            An ``Estimate`` of two matrices [n_train, n_query] on the CPU; the scores, seeded, are those of
            ``influence_matrix``.

        Raises:
            ValueError: a module with a single repeat; and as ``influence_matrix``.

        Cost:
            that of ``influence_matrix``, a pass over the training examples for each repeat of each solve, and the
            memory of three more matrices.

        Examples:
            >>> scores, error = module.estimated_influence_matrix(test_idxs=[0, 1])
        """
        return self._estimate(functools.partial(super().influence_matrix, train_idxs, test_idxs), train_idxs)

    def influences(
        self,
        train_idxs: Sequence[int],
        test_idxs: Sequence[int] | None,
        stest: Tensor | None = None,
        *,
        standard_error: bool = False,
    ) -> Any:
        """Scores as BaseInfluenceModule's ``influences`` has them; with ``standard_error`` ``estimated_influences``.

        Args:
            train_idxs: distinct indices of training examples.
            test_idxs: distinct indices of test examples; None if ``stest`` is given.
            stest: a result of ``stest`` to use again, [d].
            standard_error: whether standard errors are wanted.

        Returns:
            [len(train_idxs)] on the CPU, in the order given; with ``standard_error`` an ``Estimate``.

        Raises:
            ValueError: standard errors of an stest that is given, or of a single repeat; and as BaseInfluenceModule's.

        Cost:
            that of BaseInfluenceModule's, or of ``estimated_influences``.

        Examples:
            >>> scores, error = module.influences(range(10), [0], standard_error=True)
        """
        if not standard_error:
            return super().influences(train_idxs, test_idxs, stest)
        if stest is not None:
            raise ValueError(
                "standard_error: the repeats of an stest that is given are not known; give test_idxs alone"
            )
        return self.estimated_influences(train_idxs, test_idxs)

    def influence_matrix(
        self,
        train_idxs: Sequence[int] | None = None,
        test_idxs: Sequence[int] | None = None,
        *,
        top_k: int | None = None,
        score_rtol: float | None = None,
        max_products: int | None = None,
        standard_error: bool = False,
    ) -> Any:
        """Scores as BaseInfluenceModule's; with ``standard_error`` ``estimated_influence_matrix``.

        Args:
            train_idxs: distinct indices of training examples.
            test_idxs: distinct indices of test examples, each of them a query.
            top_k: keep only this many of each query's most helpful and most harmful training examples.
            score_rtol: expected None: LiSSA ends after its depth.
            max_products: likewise.
            standard_error: whether standard errors are wanted. Not with ``top_k``.

        Returns:
            [n_train, n_query] on the CPU; two rankings with ``top_k``, an ``Estimate`` with ``standard_error``.

        Raises:
            ValueError: standard errors with ``top_k``, or of a single repeat; score_rtol or max_products; and as
                BaseInfluenceModule's.

        Cost:
            that of BaseInfluenceModule's, or of ``estimated_influence_matrix``.

        Examples:
            >>> scores, error = module.influence_matrix(test_idxs=[0, 1], standard_error=True)
        """
        if not standard_error or score_rtol is not None or max_products is not None:
            ends: dict[str, Any] = {"score_rtol": score_rtol, "max_products": max_products}  # which are refused there
            return super().influence_matrix(train_idxs, test_idxs, top_k=top_k, **ends)
        if top_k is not None:
            raise ValueError("standard_error: expected no top_k with it; rank the matrix that comes with its errors")
        return self.estimated_influence_matrix(train_idxs, test_idxs)

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        """An estimate of A⁻¹ v for [d] or rows [k, d]; rows share the minibatches."""
        if self._spreads is not None:
            queries = len(vec) if vec.dim() == 2 else 1
            self._spreads.append(_Spread(len(self._spread_examples), queries, self._problem.space.dtype))
        return super().inverse_hvp(vec)

    def _after_repeat(self) -> Callable[[int, Tensor], None] | None:
        """Returns the function that the solver is to call after each repeat, with its estimate."""
        return None if self._spreads is None else self._score_repeat

    # -- private ------------------------------------------------------------------------------------------------------

    def _estimate(self, compute: Callable[[], Tensor], train_idxs: Sequence[int] | None) -> Estimate:
        """Computes scores, and the spread of those that the repeats of the solves would have given."""
        if self.repeat < 2:
            raise ValueError(f"standard_error: expected a module with repeat of at least 2, got repeat={self.repeat}")
        with self._problem.evaluation.alone():
            self._spread_examples = self._problem.train.indices(train_idxs, "train_idxs")
            self._spreads = []
            try:
                scores = compute()
                spreads = [spread.standard_error() for spread in self._spreads]
            finally:
                self._spreads = None
        errors = torch.cat([scores.new_empty(len(scores), 0), *spreads], dim=1)
        if errors.numel() != scores.numel():
            raise TypeError(
                f"standard_error: {type(self).__name__} overrides how stests are solved for; expected one solve by "
                f"LiSSAInfluenceModule.inverse_hvp for each, got {errors.shape[1]} for scores {list(scores.shape)}"
            )
        return Estimate(scores, errors.reshape(scores.shape))

    def _score_repeat(self, run: int, stests: Tensor) -> None:
        assert self._spreads is not None  # or nobody would ask
        spread = self._spreads[-1]
        with self._problem.train.quietly():  # the next repeat draws what it would have drawn
            scores = torch.empty_like(spread.mean)
            for tile in self._tiles_of(self._spread_examples, stests):
                scores[tile.where()] = tile.scores.cpu()
        spread.add(run, scores)


class _Spread:
    """The mean of scores [n, q] over runs, and the sum of squared differences from it, by Welford's recurrence."""

    def __init__(self, n: int, queries: int, dtype: torch.dtype) -> None:
        self.mean, self.squares = torch.zeros(2, n, queries, dtype=dtype, device="cpu")
        self.runs = 0

    def add(self, run: int, scores: Tensor) -> None:
        """Run 0 begins anew."""
        if run == 0:
            self.mean.zero_()
            self.squares.zero_()
        self.runs = run + 1
        before = scores - self.mean
        self.mean.add_(before, alpha=1 / self.runs)
        self.squares.addcmul_(before, scores - self.mean)

    def standard_error(self) -> Tensor:
        """Returns the standard error of the mean, [n, q]."""
        if self.runs < 2:
            return torch.full_like(self.squares, torch.nan)
        return (self.squares / (self.runs - 1) / self.runs).sqrt()
