"""The exact Hessian, by differentiating the gradient (Pearlmutter 1994)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_influence.curvature._double_backward import DoubleBackward, Linearized
from torch_influence.curvature._plain import Tangents
from torch_influence.gradients import Graph, differentiate
from torch_influence.linop import DualCost
from torch_influence.plan import NotPossible


class Hessian(DoubleBackward):
    """∇² of the training loss: H_b v = ∂/∂θ (∇ℓ_b(θ)·v), reverse over reverse."""

    title = "Hessian"

    def linearize(self, batch: Any, leaves: Tangents, at: Callable[[], Tangents] | None = None) -> Linearized:
        with self.convolutions(fixed=False):
            loss = self.loss(leaves, batch)
        inputs = leaves if at is None else at()
        if not loss.requires_grad and self.regularizer is not None:  # then the regulariser is all there is
            return Linearized(
                loss,
                lambda tangents: [torch.zeros_like(t) for t in tangents],
                lambda: [torch.zeros_like(x) for x in inputs],
                (),
            )
        slope = differentiate(loss, inputs, create_graph=True)
        graph = Graph("hessian" if at is None else "hessian at the outputs", slope, inputs)
        return Linearized(
            loss.detach(),
            product=lambda tangents: self._pull_back(graph, tangents),
            gradient=lambda: [g.detach() for g in slope],
            roots=slope,
            besides=self._kept_anyway(batch),
        )

    def loss(self, leaves: Tangents, batch: Any) -> Tensor:
        loss = self.evaluation.train_loss if self.regularized_loss else self.evaluation.data_loss
        return loss(leaves, batch)

    def dual_cost(self, shift: float) -> DualCost:
        raise NotPossible("a Hessian that is not that of a linear head has no dual; that of gnh=True has")

    @property
    def regularized_loss(self) -> bool:  # type: ignore[override]
        """True for an overridden train_loss: its regulariser is then not known separately."""
        return self.evaluation.overrides_train_loss
