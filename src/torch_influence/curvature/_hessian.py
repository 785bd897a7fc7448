"""The exact Hessian, by differentiating the gradient (Pearlmutter 1994)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torch_influence.curvature._base import Curvature
from torch_influence.gradients import differentiate


class Hessian(Curvature):
    """∇² of ``train_loss``: H_b v = ∂/∂θ (∇ℓ_b(θ)·v), reverse over reverse."""

    def batch_product(self, batch: Any, rows: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        space = self.evaluation.space
        loss = self.evaluation.train_loss(leaves, batch)
        gradient = differentiate(loss, leaves, create_graph=True)
        return space.flatten(self._pull_back("hessian", gradient, leaves, space.split(rows)))
