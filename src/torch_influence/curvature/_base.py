"""The data loop that every curvature shares."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_influence.batches import Batches
from torch_influence.evaluation import Evaluation
from torch_influence.gradients import PullBack
from torch_influence.linop import LinearOperator


class Curvature(LinearOperator):
    """Mean over the training data of a per-batch curvature, without damping: product(V)[j] = (1/n) Σ_b |b| C_b V[j].

    A subclass says what one batch contributes. Cost: one pass over the data per product, however many rows.
    """

    def __init__(self, evaluation: Evaluation, batches: Batches, device: torch.device) -> None:
        self.evaluation = evaluation
        self.batches = batches
        self.size, self.dtype, self.device = evaluation.space.size, evaluation.space.dtype, device
        self._pull_back = PullBack(evaluation.space.pass_dtype)

    @abc.abstractmethod
    def batch_product(self, batch: Any, rows: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """Curvature of the loss of one batch, regulariser included, times rows [k, d]."""

    def product(self, rows: Tensor) -> Tensor:
        return self._mean_product(rows)

    def dense(self) -> Tensor:
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        matrix = self._mean_product(eye, describe="curvature")
        del eye
        return matrix.add_(matrix.mT.clone()).mul_(0.5)

    def sampled(self, steps: int, generator: torch.Generator | None) -> Iterator[LinearOperator]:
        """``steps`` minibatch estimates, drawn with replacement at the loader's batch size."""
        for batch, _ in self.batches.sample(steps, generator=generator):
            yield _OfBatch(self, batch)

    def _mean_product(self, rows: Tensor, describe: str | None = None) -> Tensor:
        with self.evaluation.session():
            leaves = self.evaluation.leaves()
            return self.batches.mean(lambda batch: self.batch_product(batch, rows, leaves), describe=describe)


class _OfBatch(LinearOperator):
    """The curvature of one batch."""

    def __init__(self, whole: Curvature, batch: Any) -> None:
        self._whole, self._batch = whole, batch
        self.size, self.dtype, self.device = whole.size, whole.dtype, whole.device

    def product(self, rows: Tensor) -> Tensor:
        with self._whole.evaluation.session():
            return self._whole.batch_product(self._batch, rows, self._whole.evaluation.leaves())
