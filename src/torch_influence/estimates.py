"""Scores of a solver that repeats itself, with the standard errors that its repeats tell."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from torch_influence.influences import InfluenceMethods
from torch_influence.ranking import TopInfluences


class Estimate(NamedTuple):
    """Scores, and how much they would differ in another run of as many repeats.

    Attributes:
        scores: as without standard errors.
        standard_error: of each score, of the same shape: the standard deviation over the repeats, divided by
            √repeats. NaN where fewer than two repeats came to an end.
    """

    scores: Tensor
    standard_error: Tensor


class EstimateMethods(InfluenceMethods):
    """Mixed into a module whose solver averages ``repeat`` runs, and tells of each by ``_after_repeat``."""

    repeat: int
    _spreads: list[_Spread] | None = None  # one for each solve, while standard errors are wanted
    _spread_examples: list[int]

    @overload
    def influences(
        self,
        train_idxs: Sequence[int],
        test_idxs: Sequence[int] | None,
        stest: Tensor | None = None,
        *,
        standard_error: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def influences(
        self,
        train_idxs: Sequence[int],
        test_idxs: Sequence[int] | None,
        stest: None = None,
        *,
        standard_error: Literal[True],
    ) -> Estimate: ...

    def influences(
        self,
        train_idxs: Sequence[int],
        test_idxs: Sequence[int] | None,
        stest: Tensor | None = None,
        *,
        standard_error: bool = False,
    ) -> Tensor | Estimate:
        """Scores as BaseInfluenceModule's ``influences`` has them, and their standard errors if they are asked for.

        standard_error[i] = √(Σ_r (score_r[i] - mean)² / (R - 1) / R) with score_r those of repeat r of R alone. It
        tells of sampling, not of the bias that too small a depth leaves (``last_report.residual`` does).

        Args:
            train_idxs: distinct indices of training examples.
            test_idxs: distinct indices of test examples; None if ``stest`` is given.
            stest: a result of ``stest`` to use again, [d].
            standard_error: whether standard errors are wanted.

        Returns:
            [len(train_idxs)] on the CPU, in the order given; with ``standard_error`` an ``Estimate`` of two of these,
            whose scores, seeded, are the same as without.

        Raises:
            ValueError: standard errors of an stest that is given, or of a single repeat; and as BaseInfluenceModule's.

        Cost:
            with standard errors, a pass over the training examples named for each repeat besides.

        Examples:
            >>> scores, error = module.influences(range(10), [0], standard_error=True)
        """
        if not standard_error:
            return super().influences(train_idxs, test_idxs, stest)
        if stest is not None:
            raise ValueError(
                "standard_error: the repeats of an stest that is given are not known; give test_idxs alone"
            )
        return self._estimate(functools.partial(super().influences, train_idxs, test_idxs), train_idxs)

    @overload
    def influence_matrix(
        self,
        train_idxs: Sequence[int] | None = None,
        test_idxs: Sequence[int] | None = None,
        *,
        top_k: None = None,
        standard_error: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def influence_matrix(
        self,
        train_idxs: Sequence[int] | None = None,
        test_idxs: Sequence[int] | None = None,
        *,
        top_k: int,
        standard_error: Literal[False] = False,
    ) -> TopInfluences: ...

    @overload
    def influence_matrix(
        self,
        train_idxs: Sequence[int] | None = None,
        test_idxs: Sequence[int] | None = None,
        *,
        top_k: None = None,
        standard_error: Literal[True],
    ) -> Estimate: ...

    def influence_matrix(
        self,
        train_idxs: Sequence[int] | None = None,
        test_idxs: Sequence[int] | None = None,
        *,
        top_k: int | None = None,
        standard_error: bool = False,
    ) -> Tensor | TopInfluences | Estimate:
        """Scores as BaseInfluenceModule's ``influence_matrix`` has them, and their standard errors if asked for.

        Args:
            train_idxs: distinct indices of training examples.
            test_idxs: distinct indices of test examples, each of them a query.
            top_k: keep only so many of each query's most helpful and most harmful training examples.
            standard_error: whether standard errors are wanted; see ``influences``. Not with ``top_k``.

        Returns:
            [n_train, n_query] on the CPU; with ``standard_error`` an ``Estimate`` of two such matrices, whose scores,
            seeded, are the same as without.

        Raises:
            ValueError: standard errors with ``top_k``, or of a single repeat; and as BaseInfluenceModule's.

        Cost:
            with standard errors, a pass over the training examples for each repeat of each solve, and the memory of
            three more matrices.

        Examples:
            >>> scores, error = module.influence_matrix(test_idxs=[0, 1], standard_error=True)
        """
        if not standard_error:
            if top_k is None:
                return super().influence_matrix(train_idxs, test_idxs)
            return super().influence_matrix(train_idxs, test_idxs, top_k=top_k)
        if top_k is not None:
            raise ValueError("standard_error: expected no top_k with it; rank the matrix that comes with its errors")
        return self._estimate(functools.partial(super().influence_matrix, train_idxs, test_idxs), train_idxs)

    # -- for the module -----------------------------------------------------------------------------------------------

    def _after_repeat(self, queries: int) -> Callable[[int, Tensor], None] | None:
        """What is to be called after each repeat of a solve of so many queries, with its estimate."""
        if self._spreads is None:
            return None
        self._spreads.append(_Spread(len(self._spread_examples), queries, self._space.dtype))
        return functools.partial(self._score_repeat, self._spreads[-1])

    # -- private ------------------------------------------------------------------------------------------------------

    def _estimate(self, compute: Callable[[], Tensor], train_idxs: Sequence[int] | None) -> Estimate:
        """What ``compute`` gives, and the spread of what the repeats of its solves would have given."""
        if self.repeat < 2:
            raise ValueError(f"standard_error: expected a module with repeat of at least 2, got repeat={self.repeat}")
        with self._evaluation.alone():
            self._spread_examples = self._train.indices(train_idxs, "train_idxs")
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

    def _score_repeat(self, spread: _Spread, run: int, stests: Tensor) -> None:
        with self._train.quietly():  # the next repeat draws what it would have drawn
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
        """Of the mean, [n, q]."""
        if self.runs < 2:
            return torch.full_like(self.squares, torch.nan)
        return (self.squares / (self.runs - 1) / self.runs).sqrt()
