"""The Lanczos process: extreme eigenvalues of an operator, and of the tridiagonal matrices that solvers make."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from torch_influence.linop import LinearOperator
from torch_influence.solvers._base import Progress

_SHIFTS = 64  # points at which a pass of bisection counts eigenvalues


@dataclasses.dataclass(frozen=True)
class Tridiagonals:
    """k symmetric tridiagonal matrices of order m.

    Attributes:
        diagonal: [m, k], float64, on the CPU.
        squares: [m - 1, k], the squares of the off-diagonal entries; 0 where a matrix falls into blocks.
    """

    diagonal: Tensor
    squares: Tensor

    def extremes_of_each(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest eigenvalue of each, [k], by bisection with Sturm's count.

        Source: Golub and Van Loan, Matrix Computations, section 8.4.1; here 64 points of the interval at a time.
        """
        if not self.diagonal.numel():
            return self.diagonal.new_empty(0), self.diagonal.new_empty(0)
        # The eigenvalues of -T are those of T, mirrored: one search for the smallest serves both ends.
        both = torch.cat([self.diagonal, -self.diagonal], dim=1)
        smallest = _smallest(both, self.squares.repeat(1, 2))
        k = self.diagonal.shape[1]
        return smallest[:k], -smallest[k:]


def _smallest(diagonal: Tensor, squares: Tensor) -> Tensor:
    off = squares.sqrt()
    reach = torch.zeros_like(diagonal)
    reach[:-1] += off
    reach[1:] += off
    low, high = (diagonal - reach).amin(dim=0), diagonal.amin(dim=0)  # Gershgorin; a diagonal entry is above it
    steps = torch.linspace(0, 1, _SHIFTS, dtype=torch.float64)
    tiny = torch.finfo(torch.float64).tiny
    for _ in range(10):  # each narrows the interval by 63: 10 of them leave less than a unit of rounding
        shifts = low[:, None] + (high - low)[:, None] * steps
        below = torch.zeros_like(shifts, dtype=torch.bool)
        pivot = torch.ones_like(shifts)
        for i in range(len(diagonal)):
            pivot = diagonal[i][:, None] - shifts - (squares[i - 1][:, None] / pivot if i else 0.0)
            pivot = torch.where(pivot == 0, -tiny, pivot)
            below |= pivot < 0
        first = torch.where(below.any(dim=1), below.to(torch.int8).argmax(dim=1), _SHIFTS - 1).clamp(min=1)
        low, high = (shifts.gather(1, at[:, None]).squeeze(1) for at in (first - 1, first))
    return 0.5 * (low + high)


@dataclasses.dataclass(frozen=True)
class RitzValues:
    """What ``lanczos`` has found.

    Attributes:
        values: [m], float64, ascending: the eigenvalues of A on the Krylov space.
        errors: [m], how far from each there is an eigenvalue of A at most, rounding aside.
        vectors: [m, d], the Ritz vectors, in the operator's dtype on its device; None unless asked for.
        products: multiplications by A.
    """

    values: Tensor
    errors: Tensor
    vectors: Tensor | None
    products: int


def lanczos(
    operator: LinearOperator,
    k: int = 1,
    *,
    rtol: float = 1e-3,
    maxiter: int | None = None,
    generator: torch.Generator | None = None,
    vectors: bool = False,
    progress: Progress | None = None,
) -> RitzValues:
    """Extreme eigenvalues of A, k at either end, by the Lanczos process with full reorthogonalisation.

    A V = V T + β v eᵀ with orthonormal V: the eigenvalues of the tridiagonal T approach those of A from within, at the
    ends first. An eigenvalue of A lies within β |s_m| of each, s_m the last entry of T's eigenvector.

    Args:
        operator: A, symmetric.
        k: at either end.
        rtol: ends when each of these is known to within rtol times the largest in absolute value.
        maxiter: steps at the most; by default all that it takes, up to d.
        generator: of the starting vector, on the CPU; the same one each time if None.
        vectors: whether Ritz vectors are wanted.
        progress: wraps the steps in a progress bar.

    Raises:
        ValueError: a product that is not finite; k or maxiter less than 1.

    Cost:
        a product per step; memory steps x d. Multiple eigenvalues are found once.

    Source:
        Lanczos (1950); Golub and Van Loan, Matrix Computations, sections 10.1 and 10.3.
    """
    d = operator.size
    limit = d if maxiter is None else min(maxiter, d)
    if k < 1 or limit < min(1, d):
        raise ValueError(f"k, maxiter: expected at least 1, got {k} and {maxiter}")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, d, dtype=torch.float64, generator=generator).to(operator.device, operator.dtype)
    basis = start / start.norm()
    diagonal: list[float] = []
    off: list[float] = []
    values = errors = torch.zeros(0, dtype=torch.float64)
    combination = torch.zeros(0, 0, dtype=torch.float64)
    steps: Iterable[int] = range(limit)
    for _ in steps if progress is None else progress(steps, "Lanczos", None):
        new = operator.product(basis[-1:]).detach()
        diagonal.append(float((new.double() * basis[-1:].double()).sum()))
        size = float(new.norm())
        for _ in range(2):  # twice is enough (Parlett 1998, section 6.9)
            new = new - (new @ basis.mT) @ basis
        beta = float(new.norm())
        if not math.isfinite(beta + diagonal[-1]):
            raise ValueError("a product with the curvature is not finite: its eigenvalues are not defined")
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if off:
            between = torch.tensor(off, dtype=torch.float64)
            matrix += torch.diag(between, 1) + torch.diag(between, -1)
        m = len(diagonal)
        exhausted = m == limit or beta <= d**0.5 * torch.finfo(operator.dtype).eps * size
        if exhausted or m % max(1, m // 8) == 0:  # the more there are, the more an eigh takes
            values, combination = torch.linalg.eigh(matrix)
            errors = (beta * combination[-1]).abs()
            largest = float(values.abs().max())
            if exhausted or (m >= 2 * k and bool((torch.cat([errors[:k], errors[-k:]]) <= rtol * largest).all())):
                break
        off.append(beta)
        basis = torch.cat([basis, new / beta])
    ritz = combination.mT.to(basis) @ basis[: len(values)] if vectors else None
    return RitzValues(values, errors, ritz, len(diagonal))
