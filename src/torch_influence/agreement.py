"""Agreement: a fast path is compared with the plain one, on the user's own model and data, before it is used."""

from __future__ import annotations

import torch
from torch import Tensor


def agree(fast: Tensor, plain: Tensor, dtype: torch.dtype, operations: int | None = None) -> bool:
    """Whether two computations of the same rows [k, d] differ by rounding only.

    Row by row in the 2-norm, relative to the largest row, within sqrt(eps) of the dtype that the passes run in:
    rounding in another order stays well below it, another meaning (padding, a cross-example loss, class weights)
    does not. With ``operations``, so many roundings of the dtype instead, where that is less. A wrong "no" costs time,
    never an answer.
    """
    if fast.shape != plain.shape:
        return False
    if not plain.numel():
        return True
    largest = torch.maximum(fast.abs().max(), plain.abs().max())
    unit = torch.where(largest > 0, largest, 1.0)  # or squares may under- or overflow
    fast, plain = fast / unit, plain / unit
    scale, eps = plain.norm(dim=-1).max(), torch.finfo(dtype).eps
    allowed = eps**0.5 if operations is None else min(operations * eps, eps**0.5)
    return bool(((fast - plain).norm(dim=-1) <= allowed * scale).all())
