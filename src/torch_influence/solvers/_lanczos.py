"""The Lanczos process: extreme eigenvalues of an operator, and of the tridiagonal matrices that solvers make."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from torch_influence.linop import LinearOperator
from torch_influence.solvers._base import Progress, norms, rounding

ROWS_LOOKED_AT = 8  # All rows see one matrix: the Lanczos matrices of the few rows that saw most of it are enough.
_SHIFTS = 64  # points at which a pass of bisection counts eigenvalues
_ROWS_OF_A_BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Tridiagonals:
    """A set of k symmetric tridiagonal matrices of order m.

    Attributes:
        diagonal: [m, k], float64, on the CPU.
        squares: [m - 1, k], the squares of the off-diagonal entries; 0 where a matrix falls into blocks.
    """

    diagonal: Tensor
    squares: Tensor

    def extremes_of_each(self) -> tuple[Tensor, Tensor]:
        """Computes the smallest and the largest eigenvalue of each, [k], by bisection with Sturm's count.

        Source: Golub and Van Loan, Matrix Computations, section 8.4.1; here 64 points of the interval at a time.
        """
        if not self.diagonal.numel():
            return self.diagonal.new_empty(0), self.diagonal.new_empty(0)
        # The eigenvalues of -T are those of T, mirrored: one search for the smallest serves both ends.
        both = torch.cat([self.diagonal, -self.diagonal], dim=1)
        smallest = _smallest(both, self.squares.repeat(1, 2))
        k = self.diagonal.shape[1]
        return smallest[:k], -smallest[k:]

    def some_below(self, shifts: Tensor) -> Tensor:
        """Tells whether there are eigenvalues below each of ``shifts`` [k, s], by Sturm's count."""
        below = torch.zeros_like(shifts, dtype=torch.bool)
        pivot = torch.ones_like(shifts)
        tiny = torch.finfo(torch.float64).tiny
        for i in range(len(self.diagonal)):
            pivot = self.diagonal[i][:, None] - shifts - (self.squares[i - 1][:, None] / pivot if i else 0.0)
            pivot = torch.where(pivot == 0, -tiny, pivot)
            below |= pivot < 0
        return below


def _smallest(diagonal: Tensor, squares: Tensor) -> Tensor:
    off = squares.sqrt()
    reach = torch.zeros_like(diagonal)
    reach[:-1] += off
    reach[1:] += off
    low, high = (diagonal - reach).amin(dim=0), diagonal.amin(dim=0)  # Gershgorin; a diagonal entry is above it
    steps = torch.linspace(0, 1, _SHIFTS, dtype=torch.float64, device=diagonal.device)
    matrices = Tridiagonals(diagonal, squares)
    for _ in range(10):  # each narrows the interval by 63: 10 of them leave less than a unit of rounding
        shifts = low[:, None] + (high - low)[:, None] * steps
        below = matrices.some_below(shifts)
        first = torch.where(below.any(dim=1), below.to(torch.int8).argmax(dim=1), _SHIFTS - 1).clamp(min=1)
        low, high = (shifts.gather(1, at[:, None]).squeeze(1) for at in (first - 1, first))
    return 0.5 * (low + high)


@dataclasses.dataclass(frozen=True)
class RitzValues:
    """Holds what ``lanczos`` has found.

    Attributes:
        values: [m], float64, ascending: the eigenvalues of A on the Krylov space.
        errors: [m], how far from each there is an eigenvalue of A at most, rounding aside.
        vectors: the Ritz vectors of the k smallest and of the k largest values, all where m <= 2 k, in the operator's
            dtype on its device; None unless asked for.
        products: multiplications by A.
        converged: whether the k at either end are known as well as was asked for.
    """

    values: Tensor
    errors: Tensor
    vectors: Tensor | None
    products: int
    converged: bool = True


def lanczos(
    operator: LinearOperator,
    k: int = 1,
    *,
    rtol: float = 1e-3,
    relative_to: Literal["largest", "each"] = "largest",
    maxiter: int | None = None,
    generator: torch.Generator | None = None,
    vectors: bool = False,
    progress: Progress | None = None,
) -> RitzValues:
    """Extreme eigenvalues of A, k at either end, by the Lanczos process with full reorthogonalisation.

    A V = V T + β v eᵀ with orthonormal V: the eigenvalues of the tridiagonal T approach those of A from within, at the
    ends first. An eigenvalue of A lies within β |s_m| of each, s_m the last entry of T's eigenvector. That none lies
    beyond them is likely, not certain: a start may be short of an eigenvector, and then misses it (Kuczyński and
    Woźniakowski 1992 say how unlikely that is). An eigenvalue that A has several times is found once.

    Args:
        operator: A, symmetric.
        k: at either end.
        rtol: ends when each of these is known to within rtol times what ``relative_to`` says, or to rounding.
        relative_to: "largest", the largest of all in absolute value; or "each", its own absolute value, which tells a
            small eigenvalue from zero and takes as many steps as conjugate gradients do.
        maxiter: steps at the most; by default all that it takes, up to d.
        generator: of the starting vector, on the CPU; the same one each time if None.
        vectors: whether Ritz vectors are wanted.
        progress: wraps the steps in a progress bar.

    Returns:
        The ``RitzValues`` with their errors.

    Raises:
        ValueError: a product that is not finite; k or maxiter less than 1.

    Cost:
        a product per step, and 4 m d multiplications in step m to keep V orthonormal; memory steps x d. What of it an
        invariant space leaves undecided (fewer than 2 k values), another start orthogonal to it goes on with.

    Source:
        Lanczos (1950); Golub and Van Loan, Matrix Computations, sections 10.1 and 10.3; when to orthogonalise a second
        time: Daniel, Gragg, Kaufman and Stewart (1976).

    Examples:
        >>> from torch_influence.linop import Dense
        >>> ends = lanczos(Dense(torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))))
        >>> [round(value, 4) for value in ends.values.tolist()]
        [1.0, 2.0, 4.0]
    """
    d = operator.size
    limit = d if maxiter is None else min(maxiter, d)
    if k < 1 or limit < min(1, d):
        raise ValueError(f"k, maxiter: expected at least 1, got {k} and {maxiter}")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    noise = rounding(operator.dtype)
    basis = _Basis(operator)
    diagonal: list[float] = []
    off: list[float] = []
    values = errors = torch.zeros(0, dtype=torch.float64, device="cpu")
    combination = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
    size, converged = 0.0, limit == 0
    new = basis.start(generator) if limit else None
    steps: Iterable[int] = range(limit)
    for _ in steps if progress is None else progress(steps, "Lanczos", None):
        assert new is not None
        basis.append(new)
        product = operator.product(new).detach()
        alpha, norm = torch.stack([(product.double() * new.double()).sum(), norms(product)[0]]).tolist()
        new, beta = basis.rest(product, alpha, off[-1] if off else 0.0)
        if not math.isfinite(beta + alpha):
            raise ValueError("a product with the curvature is not finite: its eigenvalues are not defined")
        diagonal.append(alpha)
        size = max(size, norm)  # a lower bound of |A|
        m = len(diagonal)
        invariant = beta <= noise * size
        if m == limit or invariant or m % max(1, m // 8) == 0:  # the larger the matrix, the rarer its eigh
            values, combination = torch.linalg.eigh(_tridiagonal(diagonal, off))
            errors = (beta * combination[-1]).abs()
            allowed = values.abs() if relative_to == "each" else values.abs().max()
            enough = errors <= (rtol * allowed).clamp(min=noise * float(values.abs().max()))
            converged = m == d or (m >= min(2 * k, d) and bool(enough[:k].all() and enough[-k:].all()))
            if converged or m == limit:
                break
        if invariant:
            new, beta = basis.start(generator), 0.0
        off.append(beta)
    return RitzValues(values, errors, basis.combined(combination, k) if vectors else None, len(diagonal), converged)


def _tridiagonal(diagonal: Sequence[float], off: Sequence[float]) -> Tensor:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
    if off:
        between = torch.tensor(off, dtype=torch.float64, device="cpu")
        matrix += torch.diag(between, 1) + torch.diag(between, -1)
    return matrix


class _Basis:
    """Orthonormal rows. They are stored in blocks, so that adding a row does not copy the others."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator
        self.blocks: list[Tensor] = []
        self.count = 0

    def append(self, row: Tensor) -> None:
        at = self.count % _ROWS_OF_A_BLOCK
        if at == 0:
            self.blocks.append(row.new_empty(min(_ROWS_OF_A_BLOCK, self.operator.size - self.count), row.shape[1]))
        self.blocks[-1][at] = row[0]
        self.count += 1

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        for first, block in zip(range(0, self.count, _ROWS_OF_A_BLOCK), self.blocks, strict=True):
            here = slice(first, min(first + _ROWS_OF_A_BLOCK, self.count))
            yield here, block[: here.stop - first]

    def last(self, back: int) -> Tensor:
        row = self.count - back
        return self.blocks[row // _ROWS_OF_A_BLOCK][row % _ROWS_OF_A_BLOCK]

    def start(self, generator: torch.Generator) -> Tensor:
        """Draws a random unit row [1, d] that is orthogonal to all rows."""
        operator = self.operator
        row = torch.randn(1, operator.size, dtype=torch.float64, generator=generator, device=generator.device)
        return self._orthogonal(row.to(operator.device, operator.dtype))[0]

    def rest(self, product: Tensor, alpha: float, beta: float) -> tuple[Tensor, float]:
        """Makes A v orthogonal to the rows, v being the last; returns what is left as a unit row, and its norm."""
        rest = product - alpha * self.last(1)
        if beta:
            rest -= beta * self.last(2)
        return self._orthogonal(rest)

    def _orthogonal(self, row: Tensor) -> tuple[Tensor, float]:
        before = norms(row)
        for _ in range(2):  # twice is enough (Parlett 1998, section 6.9), and once where little was taken out
            for _, block in self.parts():
                row = row - (row @ block.mT) @ block
            after = norms(row)
            longer, left = torch.cat([before, after]).tolist()  # in one copy
            if not left < 0.7 * longer:
                break
            before = after
        return row / (left if left else 1.0), left

    def combined(self, combination: Tensor, k: int) -> Tensor:
        """Computes the Ritz vectors of the k first and the k last columns of ``combination`` [m, m]."""
        m = combination.shape[1]
        chosen = combination if m <= 2 * k else torch.cat([combination[:, :k], combination[:, -k:]], dim=1)
        total = torch.zeros(chosen.shape[1], self.operator.size, dtype=self.operator.dtype, device=self.operator.device)
        for here, block in self.parts():
            total.addmm_(chosen[here].mT.to(block), block)
        return total
