"""Bases of a block of rows: Gram matrices in float64, their factors, and small matrices of the host times rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_TILE = 1 << 20  # entries of the float64 copy of a part of the rows: 8 MB
_EDGE = 128  # rows of a block of a Gram matrix, of which those above the diagonal are left out


class Split(NamedTuple):
    """The matrices of N = factor Q and Q = inverse N, for rows N [m, d] and an orthonormal Q [n, d], n <= m.

    Attributes:
        factor: [m, n].
        inverse: [n, m].
        accurate: whether Q, computed in this way, will be orthonormal to half of the digits.
    """

    factor: Tensor
    inverse: Tensor
    accurate: bool


def split(gram: Tensor, d: int, dtype: torch.dtype) -> Split:
    """Splits rows N [m, d] in ``dtype`` with N Nᵀ = ``gram``; leaves out directions that are only their rounding."""
    m = len(gram)
    eps = torch.finfo(dtype).eps
    # The rounding of a sum of d terms grows as the square root of d (Higham and Mary 2019).
    in_gram = d**0.5 * torch.finfo(torch.float64).eps
    negligible = m * max(in_gram, eps**2)
    size = gram.diagonal().sqrt()
    divisor = torch.where(size > 0, size, 1.0)
    unit = gram / (divisor[:, None] * divisor)
    factor, failed = torch.linalg.cholesky_ex(unit)
    if not failed:
        inverse = torch.linalg.solve_triangular(factor, torch.eye(m, dtype=torch.float64, device="cpu"), upper=False)
        condition = float(torch.linalg.matrix_norm(inverse))
    else:
        condition = torch.inf
    if not condition**2 * negligible < 1:
        squares, vectors = torch.linalg.eigh(unit)
        keep = squares > negligible * squares.max()
        root, vectors = squares[keep].sqrt(), vectors[:, keep]
        factor, inverse = vectors * root, (vectors / root).mT
        condition = float(1 / root.min()) if len(root) else 1.0
    accurate = eps * condition + in_gram * condition**2 < eps**0.5
    return Split(factor * size[:, None], inverse / divisor, accurate)


def tiles(rows: Tensor) -> Iterator[slice]:
    width = max(1, _TILE // max(1, len(rows)))
    for start in range(0, rows.shape[1], width):
        yield slice(start, start + width)


def symmetric_gram(a: Tensor, b: Tensor, wide: bool = True) -> Tensor:
    """Computes a bᵀ where that is symmetric, in float64; with ``wide`` False products of tiles are in their own dtype.

    Their sum is not, so that the error is that of rows of some thousand numbers.
    """
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for part in tiles(a):
        left, right = a[:, part], b[:, part]
        if wide:
            left = left.double()
            right = left if b is a else right.double()
        add_lower_gram(total, left, right)
    return mirrored(total)


def add_lower_gram(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a bᵀ to a total in float64, but what is far above the diagonal."""
    for first in range(0, len(a), _EDGE):
        some, left, right = total[first : first + _EDGE, : first + _EDGE], a[first : first + _EDGE], b[: first + _EDGE]
        if a.dtype == total.dtype:
            some.addmm_(left, right.mT)
        else:
            some += left @ right.mT


def mirrored(total: Tensor) -> Tensor:
    """Completes what ``add_lower_gram`` has added; the mean counts where both halves are there."""
    block = torch.arange(len(total), device=total.device) // _EDGE
    once = block[:, None] != block
    return torch.where(once, total + total.mT, 0.5 * (total + total.mT))


def beside(rows: Tensor, matrix: Tensor) -> Tensor:
    """Copies a matrix of the host to the rows' device and dtype, and does not wait for that: nobody writes to it."""
    return matrix.to(rows.dtype).to(rows.device, non_blocking=True)


def multiply(matrix: Tensor, rows: Tensor, plus: Tensor | None = None) -> Tensor:
    """Replaces rows by matrix rows (+ plus) in place; the result must not have more rows. Skips blocks of zeros."""
    bands = [*_bands(matrix)]
    matrix, product = beside(rows, matrix), rows[: len(matrix)]
    for part in tiles(rows):
        tile = rows.new_empty(len(matrix), len(rows[0, part])) if plus is None else plus[:, part].clone()
        for some, columns in bands:
            if plus is None:
                torch.mm(matrix[some, columns], rows[columns, part], out=tile[some])
            else:
                tile[some].addmm_(matrix[some, columns], rows[columns, part])
        product[:, part] = tile
    return product


def _bands(matrix: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yields some rows of a matrix of the host, and the columns beyond which these are zero: half of a triangle."""
    for first in range(0, len(matrix), _EDGE):
        some = slice(first, first + _EDGE)
        used = matrix[some].any(dim=0).nonzero().flatten()
        yield some, slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)
