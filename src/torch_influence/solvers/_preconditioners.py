"""Preconditioners: what conjugate gradients take as M."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from torch_influence.linop import LinearOperator


@runtime_checkable
class Preconditioner(Protocol):
    """A recipe: makes M of the operator that it is to precondition."""

    def of(self, operator: LinearOperator) -> LinearOperator:
        """An approximate inverse of the operator, symmetric positive definite."""
        ...


def as_preconditioner(M: Any, operator: LinearOperator, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Rows [k, d] to M times each, whatever M is given as."""
    d = rows.shape[1]
    if isinstance(M, Preconditioner):
        return M.of(operator).product
    if isinstance(M, LinearOperator):
        return M.product
    if isinstance(M, np.ndarray | Tensor):
        matrix = torch.as_tensor(M).to(rows)
        if matrix.shape != (d, d):
            raise ValueError(f"M: expected shape [{d}, {d}], got {list(matrix.shape)}")
        return lambda r: r @ matrix.mT
    if hasattr(M, "shape") and tuple(M.shape) != (d, d):
        raise ValueError(f"M: expected shape [{d}, {d}], got {list(M.shape)}")
    if hasattr(M, "matvec"):
        apply = M.matvec
    elif hasattr(M, "dot"):
        apply = M.dot
    elif callable(M):
        apply = M
    else:
        raise TypeError(f"M: expected an array, sparse matrix, linear operator or callable, got {type(M).__name__}")

    def on_host(r: Tensor) -> Tensor:
        answers = [np.asarray(apply(row)) for row in r.cpu().numpy()]
        return torch.as_tensor(np.stack(answers)).to(r).reshape(r.shape)

    return on_host
