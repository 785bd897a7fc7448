"""The generalised Gauss-Newton matrix (Schraudolph 2002, eq. 6), not the empirical Fisher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_influence.curvature._base import Curvature
from torch_influence.gradients import differentiate


class GaussNewton(Curvature):
    """Jᵀ H_out J + ∇² reg: J the Jacobian of ``train_outputs``, H_out the Hessian of the loss at the outputs.

    J v comes from differentiating u ↦ Jᵀu twice (reverse mode only: forward mode lacks operators, and is wrong for
    some). Equal to the Hessian where the outputs are linear in the parameters.
    """

    def batch_product(self, batch: Any, rows: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        space, evaluation = self.evaluation.space, self.evaluation
        outputs = evaluation.train_outputs(leaves, batch)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"train_outputs: expected a tensor with gnh=True, got {type(outputs).__name__}; "
                "return the tensor that the loss is a function of, for example output.logits"
            )
        if not outputs.requires_grad:
            raise ValueError("train_outputs: expected outputs that depend on the selected parameters, got no graph")
        u = torch.zeros_like(outputs, requires_grad=True)
        jt_u = torch.autograd.grad(outputs, leaves, u, create_graph=True, allow_unused=True, materialize_grads=True)
        (jv,) = self._pull_back("jacobian", jt_u, [u], space.split(rows))

        at_outputs = outputs.detach().requires_grad_()
        loss = evaluation.train_loss_on_outputs(leaves, at_outputs, batch)
        slope = differentiate(loss, [at_outputs], create_graph=True)
        (hjv,) = self._pull_back("outputs", slope, [at_outputs], [jv])

        product = space.flatten(self._pull_back("transposed jacobian", [outputs], leaves, [hjv]))
        return product + self._regularizer_product(rows, leaves)

    def _regularizer_product(self, rows: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """∇² reg times rows; zero for a regulariser that is a number or does not depend on the parameters."""
        space = self.evaluation.space
        value = self.evaluation.train_regularization(leaves)
        if not isinstance(value, Tensor) or not value.requires_grad:
            return torch.zeros_like(rows)
        gradient = differentiate(value, leaves, create_graph=True)
        return space.flatten(self._pull_back("regularizer", gradient, leaves, space.split(rows)))
