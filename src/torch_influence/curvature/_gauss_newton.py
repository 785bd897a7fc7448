"""The generalised Gauss-Newton matrix (Schraudolph 2002, eq. 6), not the empirical Fisher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_influence.curvature._base import Curvature, Linearized, Tangents
from torch_influence.gradients import differentiate


class GaussNewton(Curvature):
    """Jᵀ H_out J + ∇² reg: J the Jacobian of ``train_outputs``, H_out the Hessian of the loss at the outputs.

    J v comes from differentiating u ↦ Jᵀu twice (reverse mode only: forward mode lacks operators, and is wrong for
    some). Equal to the Hessian where the outputs are linear in the parameters.
    """

    def linearize(self, batch: Any, leaves: Tangents, at: Callable[[], Tangents] | None = None) -> Linearized:
        with self.convolutions(fixed=True):
            outputs = self._outputs(leaves, batch)
        inputs = leaves if at is None else at()
        if not outputs.requires_grad:
            raise ValueError("train_outputs: expected outputs that depend on the selected parameters, got no graph")
        u = torch.zeros_like(outputs, requires_grad=True)
        jt_u = torch.autograd.grad(outputs, inputs, u, create_graph=True, allow_unused=True, materialize_grads=True)
        at_outputs = outputs.detach().requires_grad_()
        slope = differentiate(
            self.evaluation.train_loss_on_outputs(leaves, at_outputs, batch), [at_outputs], create_graph=True
        )

        where = "" if at is None else " at the outputs"

        def product(tangents: Tangents) -> Tangents:
            (jv,) = self._pull_back("jacobian" + where, jt_u, [u], tangents)
            (hjv,) = self._pull_back("loss" + where, slope, [at_outputs], [jv])
            return self._pull_back("transposed jacobian" + where, [outputs], inputs, [hjv])

        def gradient() -> Tangents:
            rows = self._pull_back("gradient", [outputs], inputs, [slope[0].detach()[None]])
            return [row.squeeze(0) for row in rows]

        return Linearized(product, gradient, roots=[outputs, *jt_u, *slope], besides=self._kept_anyway(batch))

    def loss(self, leaves: Tangents, batch: Any) -> Tensor:
        return self.evaluation.train_loss_on_outputs(leaves, self._outputs(leaves, batch), batch)

    def _outputs(self, leaves: Tangents, batch: Any) -> Tensor:
        outputs = self.evaluation.train_outputs(leaves, batch)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"train_outputs: expected a tensor with gnh=True, got {type(outputs).__name__}; "
                "return the tensor that the loss is a function of, for example output.logits"
            )
        return outputs
