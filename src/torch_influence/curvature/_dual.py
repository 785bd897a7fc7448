"""Curvatures JᵀHJ + rI of fewer outputs than parameters as GᵀG + rI, G = BᵀJ and BBᵀ = H: what they share.

H has a block for each row of a batch's outputs (for each example, mostly). Eigenvalues of blocks that are rounding are
taken for zero. A product with a random row is compared with the plain one: a loss that joins examples differs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_influence.agreement import agree
from torch_influence.curvature._curvature import Curvature
from torch_influence.linop import Dual, DualCost, probe_rows
from torch_influence.plan import NotPossible

_COLUMNS_OF_GRAM = 512  # from here on halving a Gram matrix saves more time than smaller products lose


def ridge_and(shift: float, ridge: float | None) -> float:
    """The multiple of the identity, damping included.

    Raises:
        NotPossible: there is none, or it is too small.
    """
    if ridge is None:
        raise NotPossible("the regulariser's Hessian is no multiple of the identity")
    if not ridge + shift > 0:
        raise NotPossible(f"damping plus regulariser, {ridge + shift:g}, is not positive; a larger damp makes it so")
    return ridge + shift


def cost_of(curvature: Curvature, m: int, c: int, scratch: int, once: float, per_row: float) -> DualCost:
    """The cost of a dual system of m outputs, c a block; of G: numbers held, operations once and for a row."""
    return DualCost(
        rank=m,
        nbytes=(3 * m * m + scratch) * (torch.finfo(curvature.dtype).bits // 8) + 3 * 8 * m * c,
        operations=m**3 / 3 + once + 10.0 * m * c * c,
        operations_per_row=2 * (per_row + 2.0 * m * m + curvature.operations),
    )


def refuse_beyond(cost: DualCost, room: float) -> None:
    """Raises ``NotPossible`` where a dual system takes more bytes than it may."""
    if cost.nbytes > room:
        raise NotPossible(
            f"{cost.rank:,} outputs of all examples would take about {cost.nbytes:,} bytes; {int(room):,} may be used"
        )


def check_products(found: Dual, curvature: Curvature) -> None:
    """Raises ``NotPossible`` where a product with GᵀG + rI differs from the curvature's."""
    row = probe_rows(1, found.size, dtype=found.dtype, device=found.device)
    product = found.pull(found.push(row)).add_(row, alpha=found.multiple)
    if not agree(product, curvature.product(row), curvature.evaluation.space.pass_dtype):
        raise NotPossible(
            "a product with it differs from the plain one: the loss may join the outputs of different examples"
        )


def root(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """B [N, c, r] with B Bᵀ = H [N, c, c], r the largest rank of a block; ``dtype`` of the passes that H comes from."""
    if not blocks.isfinite().all():
        raise NotPossible("the curvature at the outputs is not finite")
    values, vectors = torch.linalg.eigh(blocks.double().add(blocks.double().mT).mul_(0.5))
    largest, smallest, eps = float(values.max()), float(values.min()), torch.finfo(dtype).eps
    # Rounding in a block may be larger than its eigenvalues where it stems from numbers that cancel.
    if smallest < -(eps**0.5) * largest:
        raise NotPossible(
            f"the curvature at the outputs has negative eigenvalues: {smallest:.3g}, where the largest is {largest:.3g}"
        )
    kept = (values > blocks.shape[2] * eps * largest).any(dim=0)
    return (vectors[:, :, kept] * values[:, kept].clamp(min=0).sqrt()[:, None]).to(blocks.dtype)


def gram_matrix(x: Tensor, weighted: Tensor, out: Tensor) -> None:
    """Xᵀ diag(w) X, of x and its rows times w, exactly symmetric: what is below the diagonal mirrors what is above."""
    f = x.shape[1]
    if f <= _COLUMNS_OF_GRAM:
        torch.mm(x.mT, weighted, out=out)
        out.add_(out.mT.clone()).mul_(0.5)
        return
    one, other = slice(f // 2), slice(f // 2, f)
    gram_matrix(x[:, one], weighted[:, one], out[one, one])
    gram_matrix(x[:, other], weighted[:, other], out[other, other])
    torch.mm(x[:, one].mT, weighted[:, other], out=out[one, other])
    out[other, one] = out[one, other].mT
