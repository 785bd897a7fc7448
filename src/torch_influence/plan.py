"""Which path a computation takes: fast paths are compared with the plain one before they are used."""

from __future__ import annotations

import torch
from torch import Tensor


def agree(fast: Tensor, plain: Tensor, dtype: torch.dtype) -> bool:
    """Whether two computations of the same rows [k, d] differ by rounding only.

    Row by row in the 2-norm, relative to the largest row, within sqrt(eps) of the dtype that the passes run in:
    rounding in another order stays well below it, another meaning (padding, a cross-example loss, class weights)
    does not. A wrong "no" costs time, never an answer.
    """
    if fast.shape != plain.shape:
        return False
    scale = plain.norm(dim=-1).max()
    return bool(((fast - plain).norm(dim=-1) <= torch.finfo(dtype).eps ** 0.5 * scale).all())
