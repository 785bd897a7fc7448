"""Definite matrices of a known condition number, what is solved with them in float64, and operators that count."""

from __future__ import annotations

import math

import torch
from oracles import with_spectrum
from torch import Tensor

from torch_influence.linop import LinearOperator


class Counted(LinearOperator):
    """A matrix that is known by its products alone; counts them and the rows in them."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.size, self.dtype, self.device = matrix, len(matrix), matrix.dtype, matrix.device
        self.rows: list[int] = []

    def product(self, rows: Tensor) -> Tensor:
        self.rows.append(len(rows))
        return rows @ self.matrix


class OverflowsAfter(Counted):
    """Its products turn infinite."""

    def __init__(self, matrix: Tensor, products: int) -> None:
        super().__init__(matrix)
        self.products = products

    def product(self, rows: Tensor) -> Tensor:
        product = super().product(rows)
        return product if len(self.rows) <= self.products else torch.full_like(product, torch.inf)


def positive_definite(d: int, condition: float = 100.0) -> Tensor:
    """Eigenvalues from 1 down to 1 / condition."""
    return with_spectrum(torch.logspace(0, -math.log10(condition), d, dtype=torch.float64))


def solution(matrix: Tensor, rows: Tensor) -> Tensor:
    return torch.linalg.solve(matrix.double(), rows.double().mT).mT


def true_residuals(matrix: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """|b - Ax| / |b| in float64."""
    return (rows.double() - x.double() @ matrix.double()).norm(dim=1) / rows.double().norm(dim=1)
