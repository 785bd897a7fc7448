"""The generalised Gauss-Newton matrix (Schraudolph 2002, eq. 6), not the empirical Fisher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_influence.curvature._base import Curvature, Linearized, Tangents
from torch_influence.gradients import Graph, differentiate


class GaussNewton(Curvature):
    """The matrix Jᵀ H_out J + ∇² reg: J the Jacobian of ``train_outputs``, H_out the Hessian of the loss at these.

    J v comes from differentiating u ↦ Jᵀu (only reverse mode is used: forward mode lacks some operators, and is wrong
    for others). It equals the Hessian where the outputs are linear in the parameters.
    """

    def linearize(self, batch: Any, leaves: Tangents, at: Callable[[], Tangents] | None = None) -> Linearized:
        given, batch = batch, self.evaluation.batch_for("train_loss", batch)
        outputs = self.outputs(leaves, batch)
        inputs = leaves if at is None else at()
        u = torch.zeros_like(outputs, requires_grad=True)
        jt_u = torch.autograd.grad(outputs, inputs, u, create_graph=True, allow_unused=True, materialize_grads=True)
        at_outputs, loss, slope = self._slope(leaves, outputs, batch)

        where = "" if at is None else " at the outputs"
        jacobian = Graph("jacobian" + where, jt_u, [u])
        curved = Graph("loss" + where, slope, [at_outputs])
        transposed = Graph("transposed jacobian" + where, [outputs], inputs)

        def product(tangents: Tangents) -> Tangents:
            (jv,) = self._pull_back(jacobian, tangents)
            (hjv,) = self._pull_back(curved, [jv])
            return self._pull_back(transposed, [hjv])

        def gradient() -> Tangents:
            rows = self._pull_back(transposed, [slope[0].detach()[None]])
            return [row.squeeze(0) for row in rows]

        return Linearized(loss, product, gradient, roots=[outputs, *jt_u, *slope], besides=self._kept_anyway(given))

    def loss(self, leaves: Tangents, batch: Any) -> Tensor:
        batch = self.evaluation.batch_for("train_loss", batch)
        return self.evaluation.train_loss_on_outputs(leaves, self._outputs(leaves, batch), batch)

    def outputs(self, leaves: Tangents, batch: Any) -> Tensor:
        """Computes the outputs, whose Jacobian is J, with their graph; takes a batch from ``Evaluation.batch_for``."""
        with self.convolutions(fixed=True):
            outputs = self._outputs(leaves, batch)
        if not outputs.requires_grad:
            raise ValueError("train_outputs: expected outputs that depend on the selected parameters, got no graph")
        return outputs

    def output_blocks(self, leaves: Tangents, batch: Any) -> Tensor:
        """Computes the blocks [b, c, c] of H_out, one for each row of the outputs, if all other entries are zero."""
        batch = self.evaluation.batch_for("train_loss", batch)
        outputs = self.outputs(leaves, batch).detach()
        at_outputs, _, slope = self._slope(leaves, outputs, batch)
        b, c = rows_and_columns(outputs)
        # The tangent that is 1 at output j of all rows gives column j of every block at once.
        unit = torch.eye(c, dtype=outputs.dtype, device=self.device)[:, None].expand(c, b, c)
        graph = Graph("loss", slope, [at_outputs])
        (columns,) = self._pull_back(graph, [unit.reshape(c, *outputs.shape)])
        return columns.reshape(c, b, c).permute(1, 2, 0).to(self.dtype)

    def pulled(self, leaves: Tangents, outputs: Tensor, rows: Tensor) -> Tensor:
        """Computes Jᵀu [k, d] for rows u [k, *shape of the outputs]."""
        return self.evaluation.space.flatten(self._pull_back(Graph("transposed jacobian", [outputs], leaves), [rows]))

    def _slope(self, leaves: Tangents, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Returns a copy of the outputs, their loss, and the gradient of the loss by the copy, with its graph."""
        at_outputs = outputs.detach().requires_grad_()
        loss = self.evaluation.train_loss_on_outputs(leaves, at_outputs, batch)
        return at_outputs, loss.detach(), differentiate(loss, [at_outputs], create_graph=True)

    def _outputs(self, leaves: Tangents, batch: Any) -> Tensor:
        outputs = self.evaluation.train_outputs(leaves, batch)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"train_outputs: expected a tensor with gnh=True, got {type(outputs).__name__}; "
                "return the tensor that the loss is a function of, for example output.logits"
            )
        if not outputs.is_floating_point():
            raise TypeError(
                f"train_outputs: expected real floating-point numbers with gnh=True, got {outputs.dtype}; "
                "torch.view_as_real makes them of complex ones"
            )
        return outputs


def rows_and_columns(outputs: Tensor) -> tuple[int, int]:
    """Returns the shape of a batch's outputs as a matrix: mostly (examples, outputs of one example)."""
    return outputs.reshape(len(outputs) if outputs.dim() else 1, -1).shape  # type: ignore[return-value]
