"""A product with the curvature from its definition, with which the faster ways are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_influence.batches import Batches
from torch_influence.evaluation import Evaluation
from torch_influence.gradients import differentiate, pulled

Tangents: TypeAlias = Sequence[Tensor]


def plain_product(evaluation: Evaluation, batches: Batches, row: Tensor, gnh: bool) -> tuple[Tensor, float]:
    """Computes (1/n) Σ_b |b| C_b v, undamped, for one row v [d], over the loader's batches, each differentiated anew.

    It shares nothing with the curvatures: no kept graph, no batched backward, no closed form, no larger batch, and the
    Hessian's regulariser is differentiated with the loss.

    Returns:
        the product [d], float64, and (1/n) Σ_b |b| |C_b v|, to which its rounding is relative.
    """
    leaves = evaluation.leaves()
    tangents = [t.to(leaf.dtype) for t, leaf in zip(evaluation.space.split(row), leaves, strict=True)]
    total, size, count = torch.zeros_like(row, dtype=torch.float64), 0.0, 0
    for batch, examples in batches.read():
        if gnh:
            product = gauss_newton_product(evaluation, leaves, batch, tangents)
            value = evaluation.train_regularization(leaves)
            if isinstance(value, Tensor) and value.requires_grad:
                product = [p + q for p, q in zip(product, hessian_product(value, leaves, tangents), strict=True)]
        else:
            product = hessian_product(evaluation.train_loss(leaves, batch), leaves, tangents)
        term = evaluation.space.flatten(product).detach().double()
        total += examples * term
        size += examples * float(term.norm())
        count += examples
    return total / count, size / count


def hessian_product(value: Tensor, leaves: Tangents, tangents: Tangents) -> Tangents:
    """Computes ∇²value · v by differentiating ∇value · v."""
    slopes = differentiate(value, leaves, create_graph=True)
    return _derivative(slopes, tangents, leaves)


def gauss_newton_product(evaluation: Evaluation, leaves: Tangents, batch: Any, tangents: Tangents) -> Tangents:
    """Computes Jᵀ H_out J v, with J v as the derivative of u -> Jᵀu · v."""
    batch = evaluation.batch_for("train_loss", batch)
    outputs = evaluation.train_outputs(leaves, batch)
    u = torch.zeros_like(outputs, requires_grad=True)
    (jv,) = _derivative(pulled([outputs], leaves, [u], create_graph=True), tangents, [u])
    free = outputs.detach().requires_grad_()
    (hjv,) = hessian_product(evaluation.train_loss_on_outputs(leaves, free, batch), [free], [jv])
    return pulled([outputs], leaves, [hjv])


def _derivative(values: Tangents, weights: Tangents, inputs: Tangents) -> Tangents:
    """Computes ∂(Σ values · weights)/∂inputs; zeros where the values are constant."""
    terms = [(value * weight).sum() for value, weight in zip(values, weights, strict=True)]
    total = sum(terms[1:], terms[0])
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
