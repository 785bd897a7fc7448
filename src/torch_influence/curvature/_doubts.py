"""Checks of a curvature before it is used, on at most 32 examples: are its second derivatives right, and not zero?"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_influence.batches import Batches
from torch_influence.caller import level_of_the_user
from torch_influence.curvature._plain import Tangents, gauss_newton_product, hessian_product
from torch_influence.evaluation import Evaluation
from torch_influence.gradients import nodes_behind, pulled, undisturbed
from torch_influence.linop import LinearOperator, probe_rows
from torch_influence.losses import in_double, in_one_batch

if TYPE_CHECKING:
    from torch_influence.curvature._double_backward import DoubleBackward

_EXAMPLES = 32
_SCALARS = 2**20  # numbers to differentiate by, at most; the smallest parameters first: biases and norms of every layer
_VECTORS = 12  # vectors of that many numbers in float64 that are held at once
_ROUNDINGS = 32  # in a gradient
_KINKED = ("Relu", "LeakyRelu", "Prelu", "RRelu", "Threshold", "Hardtanh", "Abs", "Clamp", "Max", "Min", "Adaptive")


class CurvatureWarning(RuntimeWarning):
    """The curvature is not what scores need: a second derivative is wrong, or there is none."""


def doubts(plain: DoubleBackward, operator: LinearOperator, room: float) -> list[Warning]:
    """Warnings of what is doubtful in this curvature; ``operator`` is the same in the form in which it is used.

    - Parameters that get no gradient from any example: this function itself warns of them.
    - Gauss-Newton: parameters that the loss depends on beside the outputs; it is zero in them.
    - No curvature at all.
    - Second derivatives that autograd gets wrong, see ``second_derivative``.

    Cost: about ten passes over the examples in one batch; one over the data if some parameter gets no gradient in it.
    Second derivatives are checked for up to a million parameters, if twelve vectors of them in float64 fit ``room``.
    """
    evaluation, batches = plain.evaluation, plain.batches
    names, gnh = evaluation.space.names, plain.gauss_newton
    unreached: list[int] = []
    beside: list[int] = []
    second: SecondDerivative | None = None
    with evaluation.session(), undisturbed(batches, plain.device):
        with contextlib.suppress(Exception):  # an error comes again, with its own text, with the first product
            _, batch = in_one_batch(batches, _EXAMPLES) or ([0], batches.peek([0]))
            unreached = _unreached(evaluation, batches, batch, plain.loss)
            beside = _beside_the_outputs(evaluation, batch) if gnh else []
            if 8 * _VECTORS * evaluation.space.smallest(_SCALARS).size <= room:
                second = second_derivative(evaluation, batch, gnh)
        flat = second is not None and not second.wrong and second.flat and _is_flat(plain, operator)
    if unreached:
        warnings.warn(
            f"params: {_listed(names, unreached)} {'gets' if len(unreached) == 1 else 'get'} no gradient from any "
            "training example: scores say nothing of them. If the loss should depend on them, something cuts them off "
            "in eval mode: LoRA weights that are merged, a weight that is cached, no_grad, detach(), or reentrant "
            "checkpointing (use_reentrant=False is the other); else leave them out with params=",
            UserWarning,
            stacklevel=level_of_the_user(),
        )
    texts: list[str] = []
    if beside:
        texts.append(
            f"gnh=True: the loss depends on {_listed(names, beside)} directly, and not by the outputs alone: the "
            "Gauss-Newton matrix is zero there, and scores grow like 1/damp. Put what the loss needs into "
            "train_outputs, leave these parameters out with params=, or use gnh=False"
        )
    if second is not None and second.wrong:
        texts.append(
            f"the second derivative of the training loss is wrong: {second.wrong}. Some operator in the model or the "
            "loss can be differentiated once only, or its backward can't be (a custom autograd.Function with "
            "once_differentiable, NumPy, a kernel, or values kept on ctx), or something is held fixed by detach(). "
            "Write it in operators of torch, or save tensors by ctx.save_for_backward and compute the backward from "
            "them"
        )
    if flat:
        texts.append(
            f"the training loss has no curvature{' in the outputs' if gnh else ''} (is it piecewise linear, as "
            "absolute values, hinge and quantile losses are, or nll_loss of outputs that are logarithms?): what is "
            "inverted is the regulariser's and the damping alone, so that scores are products of gradients divided by "
            "these. A smooth loss (Huber's, cross_entropy of logits) has one"
        )
    return [CurvatureWarning(text) for text in texts]


class SecondDerivative(NamedTuple):
    """The comparison of products v -> Hv of the loss of a batch, as autograd makes them, with what they should be.

    Attributes:
        asymmetry: |u·Hv - v·Hu| of random rows, in units of |Hu| + |Hv|.
        symmetric: the largest asymmetry that is allowed.
        deviation: |Hv - difference of gradients|, in units of the larger; 0 where two steps do not agree.
        precise: the largest deviation that is allowed.
        flat: whether both products are zero.
    """

    asymmetry: float
    symmetric: float
    deviation: float = 0.0
    precise: float = 1.0
    flat: bool = False

    @property
    def wrong(self) -> str:
        """The finding in words; empty if nothing is wrong."""
        if not self.asymmetry <= self.symmetric:
            return (
                f"products of random vectors u and v are not symmetric, |u·Hv - v·Hu| is {self.asymmetry:.2g} of them"
            )
        if not self.deviation <= self.precise:
            return f"a product Hv and a central difference of first derivatives are {self.deviation:.2g} of them apart"
        return ""


# -- second derivatives -----------------------------------------------------------------------------------------------


def second_derivative(evaluation: Evaluation, batch: Any, gnh: bool) -> SecondDerivative:
    """Checks products of random vectors with the curvature of the loss of a batch, in two ways.

    - They must be symmetric: if a backward can't be differentiated, autograd leaves out a part, and they are not.
    - They must equal central differences of first derivatives, (∇ℓ(θ + hv) - ∇ℓ(θ - hv)) / 2h. The difference counts
      only if steps h and h/2 agree ten times better with each other than with Hv: across a kink they don't.

    It uses float64, if the model runs in it and the loss is the same there. For Gauss-Newton, differences of the
    outputs, and of the loss's gradient at the outputs, replace the two derivatives.
    """
    loss = "train_loss" if evaluation.overrides_train_loss and not gnh else "data_loss"
    evaluation, batch = in_double(evaluation.by_the_smallest(_SCALARS), loss, batch)
    leaves, dtype = evaluation.leaves(), evaluation.space.pass_dtype
    eps = torch.finfo(dtype).eps
    space = evaluation.space
    drawn = probe_rows(2, space.size, dtype=space.dtype, device=leaves[0].device)
    rows = [[t.to(leaf.dtype) for t, leaf in zip(space.split(row), leaves, strict=True)] for row in drawn]
    function = getattr(evaluation, loss)
    rows = _where_differentiated(evaluation, leaves, function(leaves, batch), rows)

    def product(tangents: Tangents) -> Tensor:
        if gnh:
            return _flat(gauss_newton_product(evaluation, leaves, batch, tangents))
        return _flat(hessian_product(function(leaves, batch), leaves, tangents))

    Hu, Hv = map(product, rows)
    u, v = map(_flat, rows)
    size, apart = float(Hu.norm() + Hv.norm()), float((u @ Hv - v @ Hu).abs())
    # The rounding of a product is relative to |H||v| = |H| √d, while |Hv| may be as small as |H|.
    found = SecondDerivative(apart / size if apart else 0.0, eps**0.5 + eps * len(u) ** 0.5, flat=size == 0)
    if not math.isfinite(size) or not v.any():
        return found._replace(asymmetry=0.0)  # solvers report products that are not finite
    if found.wrong or (dtype != torch.float64 and (dtype != torch.float32 or _kinked(function(leaves, batch)))):
        return found  # the longer steps that less precision needs would cross kinks
    step = eps ** (1 / 3) * (float(_flat(leaves).norm()) or 1.0) / float(v.norm())
    differences = _differences_of_gauss_newton if gnh else _differences
    (rough, _), (fine, slope) = (differences(evaluation, function, leaves, batch, rows[1], h) for h in (step, step / 2))
    apart, unsure = float((Hv - fine).norm()), float((rough - fine).norm())
    noise = _ROUNDINGS * eps * slope / step
    if not apart > noise or unsure > 0.1 * apart:
        return found
    # The errors h² and ε/h are ε^(2/3); ε^(1/3) is far above them.
    return found._replace(deviation=apart / max(float(Hv.norm()), float(fine.norm())), precise=eps ** (1 / 3))


def _where_differentiated(
    evaluation: Evaluation, leaves: Tangents, loss: Tensor, rows: Sequence[Tangents]
) -> list[list[Tensor]]:
    """Sets the rows to zero where the gradient is zero, and for the weights of embeddings that max_norm rescales.

    torch takes these for constant, though the loss may depend on them: so it does for an embedding's padding_idx.
    """
    slopes = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    embeddings = [m for m in evaluation.model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    rescaled = {id(m.weight) for m in embeddings if m.max_norm is not None}
    masks = [
        torch.zeros_like(slope) if id(p) in rescaled else (slope != 0).to(slope)
        for p, slope in zip(evaluation.space.current(), slopes, strict=True)
    ]
    return [[t * mask for t, mask in zip(row, masks, strict=True)] for row in rows]


def _differences(
    evaluation: Evaluation, loss: Callable[..., Tensor], leaves: Tangents, batch: Any, tangents: Tangents, h: float
) -> tuple[Tensor, float]:
    """Computes Hv by a central difference of gradients, and the norm of a gradient."""
    slopes = [_gradient(loss(at, batch), at) for at in (_moved(leaves, tangents, by) for by in (h, -h))]
    return (slopes[0] - slopes[1]) / (2 * h), float(slopes[0].norm())


def _differences_of_gauss_newton(
    evaluation: Evaluation, loss: Callable[..., Tensor], leaves: Tangents, batch: Any, tangents: Tangents, h: float
) -> tuple[Tensor, float]:
    """Computes Jᵀ H_out J v by differences of the outputs, for J v, and of the loss's gradient at them, for H_out."""
    with torch.no_grad():
        ahead, behind = (evaluation.train_outputs(_moved(leaves, tangents, by), batch) for by in (h, -h))
        jv = (ahead - behind) / (2 * h)
    outputs = evaluation.train_outputs(leaves, batch)
    length = float(jv.norm())
    if length == 0:
        return torch.zeros_like(_flat(leaves)), 0.0
    by = h * float(_flat(tangents).norm()) * (float(outputs.detach().norm()) or 1.0)
    by /= (float(_flat(leaves).norm()) or 1.0) * length
    slopes = []
    for step in (by, -by):
        at = outputs.detach().add(jv, alpha=step).requires_grad_()
        slopes.append(_gradient(evaluation.train_loss_on_outputs(leaves, at, batch), [at]).view_as(at))
    hjv = (slopes[0] - slopes[1]) / (2 * by)
    product, slope = (pulled([outputs], leaves, [v]) for v in (hjv, slopes[0]))
    return _flat(product), float(_flat(slope).norm())


def _gradient(value: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(_flat(inputs))
    return _flat(torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True))


def _moved(leaves: Tangents, tangents: Tangents, by: float) -> list[Tensor]:
    return [leaf.detach().add(t, alpha=by).requires_grad_() for leaf, t in zip(leaves, tangents, strict=True)]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])


def _kinked(loss: Tensor) -> bool:
    return any(type(node).__name__.startswith(_KINKED) for node in nodes_behind([loss]))


# -- what is missing --------------------------------------------------------------------------------------------------


def _unreached(evaluation: Evaluation, batches: Batches, batch: Any, loss: Callable[..., Tensor]) -> list[int]:
    """Lists the parameters, by place, that have entries and that no example's loss is connected with."""
    leaves = evaluation.leaves()

    def left(places: list[int], batch: Any) -> list[int]:
        value = loss(leaves, batch)
        if not value.requires_grad:
            return places
        grads = torch.autograd.grad(value, [leaves[i] for i in places], allow_unused=True)
        return [i for i, g in zip(places, grads, strict=True) if g is None]

    missing = left([i for i, leaf in enumerate(leaves) if leaf.numel()], batch)
    for other, _ in batches.read() if missing else ():
        missing = left(missing, other)
        if not missing:
            break
    return missing


def _beside_the_outputs(evaluation: Evaluation, batch: Any) -> list[int]:
    """Lists the parameters, by place, that the loss depends on even when the outputs are held fixed."""
    leaves = evaluation.leaves()
    outputs = evaluation.train_outputs(leaves, batch).detach()
    loss = evaluation.train_loss_on_outputs(leaves, outputs, batch)
    if not loss.requires_grad:
        return []
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [i for i, g in enumerate(grads) if g is not None and bool(g.any())]


def _is_flat(plain: DoubleBackward, operator: LinearOperator) -> bool:
    """Whether a product with all of the data's curvature is that of the regulariser."""
    if plain.regularized_loss:
        return False
    row = probe_rows(1, plain.size, dtype=plain.dtype, device=plain.device)
    zero = torch.zeros_like(row)
    alone = zero if plain.regularizer is None else plain.regularizer(zero, row)
    eps = torch.finfo(plain.dtype).eps
    return bool((operator.product(row) - alone).norm() <= _ROUNDINGS * eps * alone.norm())


def _listed(names: Sequence[str], places: Sequence[int]) -> str:
    shown = ", ".join(names[i] for i in places[:5])
    return shown if len(places) <= 5 else f"{shown} and {len(places) - 5} others"
