"""Block conjugate gradients (O'Leary 1980, stabilised as by Dubrulle 2001): all rows share one Krylov space."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_influence.failures import OnFailure, check_on_failure
from torch_influence.linop import LinearOperator, as_tensor
from torch_influence.solvers._base import (
    LOOKS_EVERY,
    Progress,
    conclude,
    first_guess,
    iteration_limit,
    norms,
    reachable,
    rounding,
    smallest_residual,
    system,
    tolerances,
    units,
)
from torch_influence.solvers._block_tridiagonal import BlockTridiagonal
from torch_influence.solvers._cg import DIGITS_OF_RITZ, iterate
from torch_influence.solvers._report import Extremes, Seen, SolveReport
from torch_influence.solvers._solver import Cost, Krylov, iterations

# A block of k rows takes about k^-0.4 of what one row does: 14, 10 and 7 products for 16, 64 and 256 rows where one row
# takes 30.
_BLOCK_EXPONENT = 0.4
_TILE = 1 << 20  # entries of the float64 copy of a part of the rows: 8 MB


def block_cg(
    A: Any,
    B: Any,
    *,
    x0: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    history: bool = False,
    on_failure: OnFailure = "warn",
    progress: Progress | None = None,
) -> tuple[Tensor, SolveReport]:
    """Solves A x = b for each row b of ``B`` [k, d], each from the Krylov space of all of them.

        W = (P A Pᵀ)⁻¹,   X ← X + T W P,   L Q = Q - W P A,   T ← T L,   P ← Q + Lᵀ P

    T Q are the residuals B - X A, of which Q is an orthonormal basis, L Q a factorisation into a small matrix and the
    next basis, and the rows of P search directions that are conjugate to all before. A row is done when its true
    residual is within max(rtol·|b|, atol), as with ``cg``: what the recurrence says is done is judged by b - Ax from
    its definition, and the rows that rounding has fooled start again from there together, until that no longer helps.

    Dependent directions drop out of Q, and so do those that only rows already done would need: the block shrinks.
    Where P A Pᵀ is not positive definite, or the block makes no headway, the rows left go on by ``cg`` from where they
    are. The report's method says so.

    Args:
        A: symmetric positive definite, given as in ``cg``; where it turns out not to be, that is reported as by ``cg``.
        B: [k, d] or [d], on A's device; the sizes of rows may differ by any factor. One that is not finite is left out.
        rtol: relative tolerance.
        atol: absolute tolerance.
        maxiter: iterations at the most, of block and single rows together; 10 d by default.
        x0: first guess, [d] or [k, d]; zero by default. An array or a tensor.
        history: keep the residuals of every iteration in the report; those of rows that go on by ``cg`` up to there.
        on_failure: "warn", "raise" (a ``SolveError``, which has the solution and the report) or "ignore".
        progress: wraps the iterations in a progress bar.

    Returns:
        x, of B's shape, and the report. A row's iterations are those until its recurrence was within tolerance. x is
        NaN in rows of which nothing is known: b or a product is not finite.

    Raises:
        TypeError, ValueError: an argument that makes no sense.
        SolveError: with ``on_failure="raise"``, in place of the warnings.

    Warns:
        ConvergenceWarning: some row is neither within tolerance nor at the limit of the arithmetic with at least half
            of the digits right.
        NegativeCurvatureWarning: as ``cg``.

    Cost:
        iterations + 1 products (2 without an exact zero start), at most about d/k iterations where rounding is no
        matter; besides 6 k² d multiplications per iteration, 2 k² d of them in float64, and small matrices on the
        host, which waits for the device twice in an iteration, three times where a basis takes its second pass, and
        once more in every 16th. Memory 5 k d, and 7 k d where rows go on by ``cg``.

    Source:
        O'Leary (1980); Dubrulle (2001), the variant with QR factorisation of the residuals. Here that is CholeskyQR2
        (Yamamoto, Nakatsukasa, Yanagisawa and Fukaya 2015) with Gram matrices of float64, so that a basis in float32
        can be had at any condition number; its second pass is left out where the first has lost no digits.

    Examples:
        >>> x, report = block_cg(torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0])), torch.eye(4))
        >>> [round(entry, 4) for entry in x.diagonal().tolist()]
        [1.0, 0.5, 0.25, 0.125]
    """
    start = time.perf_counter()
    check_on_failure(on_failure)
    operator, rows = system(A, B)
    limit = iteration_limit(rtol, atol, maxiter, rows.shape[1])
    block = _Block(operator, rows, first_guess(x0, rows), (rtol, atol), history)
    steps: Iterable[int] = range(limit)
    if progress is not None:
        steps = progress(steps, "block conjugate gradients", None)  # no total: it stops long before the limit
    for _ in steps:
        if not block.ready():
            break
        block.step()
    block.finish(limit)
    report = dataclasses.replace(block.report(time.perf_counter() - start), rtol=rtol)
    x, report = conclude(
        block.x,
        report,
        limit=limit,
        on_failure=on_failure,
        cures=', and minres (solver="minres") takes indefinite matrices',
        unit=block.unit,
    )
    return x.reshape(as_tensor(B).shape), report


class _Block:
    """The rows in units of their own size, and the block's recurrence. Tensors [k] and [m, m] are float64, on the host.

    The host waits twice in an iteration, for the two Gram matrices. On the device the small matrices would make it wait
    more often: an iteration asks at least six times what they are (finite, definite, regular, accurate; who is done,
    who makes headway), and the number of rows that go on is a size.

    Attributes:
        unit: [k, 1], powers of 2, which change no digit: the solver sees b / unit and x / unit.
        x: [k, d].
        q, p: [m, d], m <= k, the bases of residuals and of directions.
        coefficients: T [k, m]; zero for rows that are not in ``going``.
        at_work: rows in the present run, which are judged when it ends.
        going: the rows at work that the recurrence says are not done.
        handed: rows left to row-wise conjugate gradients.
        krylov: what the block has seen of A's spectrum.
        history: relative residual norms [k] of each step, if kept.
    """

    def __init__(
        self,
        operator: LinearOperator,
        b: Tensor,
        x: Tensor | None,
        limits: tuple[float, float],
        history: bool,
    ) -> None:
        self.operator, self.b, self.unit = operator, b, units(b)
        self.products = self.steps = 0
        self.krylov = BlockTridiagonal()
        self.history: list[Tensor] | None = [] if history else None
        self.single: Extremes | None = None
        k = len(b)
        scaled = self.scaled(torch.arange(k, device="cpu"))
        self.size, self.tolerance = norms(scaled).cpu(), tolerances(scaled, self.unit, *limits).cpu()
        del scaled
        self.aim, self.floor = self.tolerance.clone(), torch.zeros_like(self.tolerance)
        self.x = torch.zeros_like(b, memory_format=torch.contiguous_format) if x is None else x.div_(self.unit)
        self.residual = self.size.clone()
        self.converged = self.size == 0
        self.best = torch.full_like(self.residual, torch.inf)  # smallest true residual at a restart
        self.limited, self.negative, self.handed = torch.zeros(3, k, dtype=torch.bool, device="cpu")
        self.iterations = torch.zeros(k, dtype=torch.int64, device="cpu")
        self.largest = torch.zeros((), dtype=b.dtype, device="cpu")  # a lower bound of |A|
        self.at_work = self.size.isfinite() & ~self.converged
        which = self.at_work.nonzero().flatten()
        if self.history is not None:
            self.history.append(torch.where(self.size > 0, 1.0, 0.0).double())
        self.begin(which, self.scaled(which) if x is None or not len(which) else self.true_residual(which))

    def product(self, rows: Tensor) -> Tensor:
        self.products += 1
        return self.operator.product(rows).detach()

    def scaled(self, which: Tensor) -> Tensor:
        which = which.to(self.b.device)
        return self.b[which].div_(self.unit[which])

    def true_residual(self, which: Tensor) -> Tensor:
        return self.product(self.x[which.to(self.x.device)]).neg_().add_(self.scaled(which))

    # -- the recurrence ------------------------------------------------------------------------------------------------

    def begin(self, which: Tensor, r: Tensor) -> None:
        """Judges these rows by their true residuals, and (re)starts with those that can go on; others leave."""
        norm = norms(r).cpu()
        done = norm <= self.tolerance[which]
        helped = norm < 0.5 * self.best[which]
        self.residual[which], self.best[which], self.converged[which] = norm, norm, done
        self.leave(which[~done & ~helped])

        again = ~done & helped
        if self.steps:
            self.aim[which[again]] *= 0.5  # otherwise the digits that rounding has taken would be missing again
        self.at_work.zero_()[which[again]] = True
        self.going = self.at_work.clone()
        self.lowest, self.since_lowest = torch.inf, 0
        # A start equals the turn after a step whose directions were zero.
        self.q = r[again.to(r.device)]
        self.p = torch.zeros_like(self.q)
        self.krylov.start()
        self.coefficients = torch.zeros(len(self.x), len(self.q), dtype=torch.float64, device="cpu")
        self.coefficients[self.at_work] = torch.eye(len(self.q), dtype=torch.float64, device="cpu")
        if len(self.q):
            self.turn(_gram(self.q, self.q).cpu())
        # No direction can make a residual smaller that is within reach of rounding.
        within_reach = self.at_work & ~self.going
        self.leave(within_reach.nonzero().flatten())
        self.at_work &= ~within_reach

    def leave(self, stuck: Tensor) -> None:
        """Ends rows that the block can't take further: those not down to rounding are handed to row-wise iteration."""
        self.handed[stuck] = self.residual[stuck] > self.reachable()[stuck]

    def ready(self) -> bool:
        """Tells whether there are directions to step along; to find some, judges rows whose recurrence has ended."""
        if self.at_work.any() and not self.going.any():
            self.settle()
        return bool(self.going.any())

    def step(self) -> None:
        """Does one iteration, along at least one direction."""
        z = self.product(self.p)
        self.steps += 1
        # The rows' own precision is enough for an estimate: float64 takes 40 times as long.
        size = torch.linalg.vector_norm(self.p, dim=1)
        ratio = torch.linalg.vector_norm(z, dim=1) / size
        seen = torch.cat([_gram(self.p, z), size[None].double(), ratio[None].double()]).cpu()  # in one copy
        curvature, size, ratio = seen[:-2], seen[-2], seen[-1]
        if not curvature.isfinite().all():
            return self.hand_over()
        self.largest = torch.maximum(self.largest, ratio.max().to(self.largest.dtype))
        inverse = self.inverse_curvature(curvature)
        if inverse is None:
            return self.hand_over()
        quotients = curvature.diagonal() / size.square()
        sound = rounding(z.dtype) * float(self.largest) <= DIGITS_OF_RITZ * float(quotients.min())
        self.krylov.step(curvature, sound)
        self.iterations += self.going
        lengths, inverse = _beside(z, self.coefficients @ inverse), _beside(z, inverse)
        gram = torch.zeros(len(z), len(z), dtype=torch.float64, device=z.device)
        for part in _tiles(z):
            self.x[:, part].addmm_(lengths, self.p[:, part])
            wide = self.q[:, part].addmm_(inverse, z[:, part], alpha=-1).double()
            gram.addmm_(wide, wide.mT)
        del z
        self.turn(gram.cpu())

    def inverse_curvature(self, curvature: Tensor) -> Tensor | None:
        """Computes W = (P A Pᵀ)⁻¹; None where it is not positive definite, or is singular up to rounding."""
        diagonal = curvature.diagonal()
        size = diagonal.abs().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        unit = 0.5 * (curvature + curvature.mT) / (size[:, None] * size)
        # A bound of the 2-norm of a matrix of m x m roundings.
        noise = 2 * len(unit) ** 0.5 * torch.finfo(self.q.dtype).eps
        factor, failed = torch.linalg.cholesky_ex(unit)
        if failed:
            self.look_for_negative(curvature)
            return None
        inverse = torch.cholesky_inverse(factor)
        if not torch.linalg.matrix_norm(inverse) * noise < 1:
            return None
        return inverse / (size[:, None] * size)

    def look_for_negative(self, curvature: Tensor) -> None:
        """Marks the rows as negative if a Rayleigh quotient of A in the span of the directions is, beyond rounding."""
        lower, failed = torch.linalg.cholesky_ex(_gram(self.p, self.p).cpu())
        if failed:
            return  # directions that are equal up to rounding show nothing; the row-wise iteration will
        half = torch.linalg.solve_triangular(lower, curvature, upper=False)
        quotients = torch.linalg.eigvalsh(torch.linalg.solve_triangular(lower, half.mT, upper=False))
        self.negative |= self.going & bool(quotients[0] < -rounding(self.q.dtype) * float(self.largest))
        self.krylov.quotients = quotients

    def turn(self, gram: Tensor) -> None:
        """Replaces q by an orthonormal one with q = L (new q), coefficients by coefficients L, and p by q + Lᵀ p."""
        if not gram.isfinite().all():
            return self.hand_over()
        d = self.q.shape[1]
        split = _split(gram, d, self.q.dtype)
        factor, inverse = split.factor, split.inverse
        if not split.accurate:
            self.q = _multiply(inverse, self.q)
            second = _split(_gram(self.q, self.q).cpu(), d, self.q.dtype)
            factor, inverse = factor @ second.factor, second.inverse
        self.coefficients = self.coefficients @ factor
        self.judge()
        needed = self.coefficients[self.going]
        if len(needed) < factor.shape[1]:
            keep = torch.linalg.qr(needed.mT).Q
            factor, inverse, self.coefficients = factor @ keep, keep.mT @ inverse, self.coefficients @ keep
        self.q = _multiply(inverse, self.q)
        self.p = _multiply(factor.mT, self.p, self.q)
        self.krylov.turn(factor)

    def judge(self) -> None:
        """Takes the rows off that the recurrence says are done; hands the rest over if it makes no progress."""
        norm = torch.linalg.vector_norm(self.coefficients, dim=1)
        if self.history is not None and self.steps >= len(self.history):
            self.history.append(torch.where(self.going, norm / self.size, torch.nan))
        if self.steps % LOOKS_EVERY == 0:
            self.floor = smallest_residual(self.largest, self.x, self.b / self.unit).cpu()
        self.going &= norm > torch.maximum(self.aim, self.floor)
        self.coefficients[~self.going] = 0.0
        if not self.going.any():
            return
        largest = float(norm[self.going].max())
        self.since_lowest = 0 if largest < self.lowest else self.since_lowest + 1
        self.lowest = min(largest, self.lowest)
        # Without rounding d/m steps end it: ten times as many, as the default of maxiter, show that it leads nowhere.
        if self.since_lowest > 10 * -(-self.q.shape[1] // self.coefficients.shape[1]):
            self.hand_over()

    def hand_over(self) -> None:
        self.handed |= self.going
        self.at_work &= ~self.going
        self.going.zero_()

    def settle(self) -> None:
        """Judges the rows of a recurrence that has ended, and starts them again together where that may help."""
        del self.q, self.p
        which = self.at_work.nonzero().flatten()
        self.begin(which, self.true_residual(which))

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(self, limit: int) -> None:
        """Runs row-wise conjugate gradients on rows handed over; computes true residuals where iterations ran out."""
        del self.q, self.p
        which = self.handed.nonzero().flatten()
        device = self.x.device
        if len(which) and self.steps < limit:
            left = which.to(device)
            tolerance = self.tolerance[which].to(device)
            x, single = iterate(self.operator, self.scaled(which), self.x[left], tolerance, limit - self.steps)
            self.x[left] = x
            self.products += single.products
            self.iterations[which] += single.iterations.cpu()
            self.residual[which] = single.residual.cpu() * self.size[which]
            self.converged[which] = single.converged.cpu()
            self.limited[which] = single.precision_limit.cpu()
            self.negative[which] |= single.negative_curvature.cpu()
            self.single = single.krylov
        else:
            self.at_work |= self.handed
            self.handed.zero_()
        which = self.at_work.nonzero().flatten()
        if len(which):
            self.residual[which] = norms(self.true_residual(which)).cpu()
            self.converged[which] = self.residual[which] <= self.tolerance[which]

    def reachable(self) -> Tensor:
        return reachable(self.largest, self.x, self.size.to(self.x.device)).cpu()

    def report(self, seconds: float) -> SolveReport:
        k, by_rows = len(self.handed), int(self.handed.sum())
        limited = self.limited | self.residual.isfinite() & (self.residual <= self.reachable())
        device = self.x.device
        return SolveReport(
            method="block conjugate gradients" + (f", {by_rows} of {k} rows finished one by one" if by_rows else ""),
            iterations=self.iterations.to(device),
            residual=torch.where(self.size > 0, self.residual / self.size, self.residual).to(device),
            converged=self.converged.to(device),
            precision_limit=(~self.converged & limited).to(device),
            negative_curvature=self.negative.to(device),
            products=self.products,
            seconds=seconds,
            history=None if self.history is None else torch.stack(self.history),
            krylov=Seen([part for part in (self.krylov, self.single) if part is not None]),
        )


class _Split(NamedTuple):
    """The matrices of N = factor Q and Q = inverse N, for rows N [m, d] and an orthonormal Q [n, d], n <= m.

    Attributes:
        factor: [m, n].
        inverse: [n, m].
        accurate: whether Q, computed in this way, will be orthonormal to half of the digits.
    """

    factor: Tensor
    inverse: Tensor
    accurate: bool


def _split(gram: Tensor, d: int, dtype: torch.dtype) -> _Split:
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
    return _Split(factor * size[:, None], inverse / divisor, accurate)


def _tiles(rows: Tensor) -> Iterator[slice]:
    width = max(1, _TILE // max(1, len(rows)))
    for start in range(0, rows.shape[1], width):
        yield slice(start, start + width)


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """Computes a bᵀ in float64."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for part in _tiles(a):
        total.addmm_(a[:, part].double(), b[:, part].double().mT)
    return total


def _beside(rows: Tensor, matrix: Tensor) -> Tensor:
    """Copies a matrix of the host to the rows' device and dtype, and does not wait for that: nobody writes to it."""
    return matrix.to(rows.dtype).to(rows.device, non_blocking=True)


def _multiply(matrix: Tensor, rows: Tensor, plus: Tensor | None = None) -> Tensor:
    """Replaces rows by matrix rows (+ plus) in place; the result must not have more rows."""
    matrix, product = _beside(rows, matrix), rows[: len(matrix)]
    for part in _tiles(rows):
        tile = matrix @ rows[:, part] if plus is None else torch.addmm(plus[:, part], matrix, rows[:, part])
        product[:, part] = tile
    return product


@dataclasses.dataclass(kw_only=True, eq=False)
class BlockCG(Krylov):
    """Solves by block conjugate gradients: all rows share one Krylov space; see ``block_cg``.

    Args:
        rtol, atol, maxiter, x0, history: those of ``block_cg``.

    Cost:
        one product an iteration, of which many rows take fewer than few; memory 7 k d.

    Examples:
        >>> from torch_influence.linop import Dense
        >>> x, report = BlockCG(rtol=1e-8).solve(Dense(torch.diag(torch.tensor([1.0, 2.0, 4.0]))), torch.ones(1, 3))
        >>> [round(entry, 4) for entry in x[0].tolist()]
        [1.0, 0.5, 0.25]
    """

    title, vectors, work = "block conjugate gradients", 7, 12

    def solve(self, operator: LinearOperator, rows: Tensor, **how: Any) -> tuple[Tensor, SolveReport]:
        """A⁻¹ b for each row b of [k, d], and the report."""
        return block_cg(operator, rows, **self.options(), **how)

    def cost(self, operator: LinearOperator, k: int) -> Cost:
        """A guess: the spectrum is not known. Vectors are multiplied by k others each."""
        steps = max(iterations(self.rtol, operator.size) * k**-_BLOCK_EXPONENT, 2.0) + 1
        return self._cost(operator, k, steps, self.work * k)
