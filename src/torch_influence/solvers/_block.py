"""The recurrence of block conjugate gradients: bases of residuals and directions, and who is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from torch_influence.linop import LinearOperator
from torch_influence.solvers._base import (
    LOOKS_EVERY,
    norms,
    reachable,
    rounding,
    smallest_residual,
    tolerances,
    units,
)
from torch_influence.solvers._bases import (
    add_lower_gram,
    beside,
    mirrored,
    multiply,
    split,
    symmetric_gram,
    tiles,
)
from torch_influence.solvers._block_tridiagonal import BlockTridiagonal
from torch_influence.solvers._cg import DIGITS_OF_RITZ, VERIFIED, iterate
from torch_influence.solvers._combinations import Combinations
from torch_influence.solvers._energy import EnergyError
from torch_influence.solvers._report import Extremes, Seen, SolveReport

_WORTH = 4  # combinations of rows are verified in place of all where these are so many times as many
_CLOSE = 0.9  # of its tolerance: a row with such a residual is verified by itself

Follow: TypeAlias = Callable[[Tensor | None, Tensor | None], None]


class Block:
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
        norm: the recurrence's residual norms, [k].
        energy: the errors in A's norm.
        combinations: of the rows, to be judged in place of all; None where all are.
        apart: a bound of what residuals differ by from the recurrence's, in units of their tolerances.
        krylov: what the block has seen of A's spectrum.
        history: relative residual norms [k] of each step, if kept.
    """

    def __init__(
        self,
        operator: LinearOperator,
        b: Tensor,
        x: Tensor | None,
        limits: tuple[float, float, float],
        history: bool,
        *,
        precondition: Callable[[Tensor], Tensor] | None = None,
        budget: int | None = None,
        combine: bool = True,
        follow: Follow | None = None,
    ) -> None:
        self.operator, self.b, self.unit = operator, b, units(b)
        self.precondition, self.budget, self.follow = precondition, budget, follow
        self.products = self.steps = 0
        self.krylov = BlockTridiagonal()
        self.history: list[Tensor] | None = [] if history else None
        self.single: Extremes | None = None
        rtol, atol, self.error_rtol = limits
        (k, d) = b.shape
        scaled = self.scaled(torch.arange(k, device="cpu"))
        self.size, self.tolerance = norms(scaled).cpu(), tolerances(scaled, self.unit, rtol, atol).cpu()
        del scaled
        self.aim, self.floor = self.tolerance.clone(), torch.zeros_like(self.tolerance)
        self.x = torch.zeros_like(b, memory_format=torch.contiguous_format) if x is None else x.div_(self.unit)
        self.residual, self.norm = self.size.clone(), self.size.clone()
        self.energy = EnergyError(self.size.square(), operator.least or 0.0)
        self.converged = self.size == 0
        self.best = torch.full_like(self.residual, torch.inf)  # smallest true residual at a restart
        self.limited, self.negative, self.handed = torch.zeros(3, k, dtype=torch.bool, device="cpu")
        self.iterations = torch.zeros(k, dtype=torch.int64, device="cpu")
        self.largest = torch.zeros((), dtype=b.dtype, device="cpu")  # a lower bound of |A|
        self.at_work = self.size.isfinite() & ~self.converged
        which = self.at_work.nonzero().flatten()
        some = Combinations(k, d, b.dtype, b.device) if combine or budget is not None else None
        self.combinations = some if some and (budget is not None or k >= _WORTH * len(some)) else None
        self.apart, self.judged_by = 0.0, ""
        self.gain: Tensor | None = None  # of the last step
        if self.history is not None:
            self.history.append(torch.where(self.size > 0, 1.0, 0.0).double())
        self.begin(which, self.scaled(which) if x is None or not len(which) else self.true_residual(which))

    @property
    def spent(self) -> bool:
        """Whether no further product may be made."""
        return self.budget is not None and self.products >= self.budget

    def judging(self, rows: Tensor) -> Tensor:
        """Multiplies rows by the operator that solutions are judged by."""
        self.products += 1
        return self.operator.exact.product(rows).detach()

    def product(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        self.products += 1
        if self.follow is None:
            return self.operator.product(rows).detach(), None
        product, dots = self.operator.product_and_dots(rows)
        return product.detach(), dots

    def of(self, rows: Tensor, which: Tensor) -> Tensor:
        """Some rows of [k, d], without a copy if they are all."""
        return rows if len(which) == len(rows) else rows[which.to(rows.device)]

    def scaled(self, which: Tensor) -> Tensor:
        which = which.to(self.b.device)
        return self.b[which].div_(self.unit[which])

    def true_residual(self, which: Tensor) -> Tensor:
        if not len(which):
            return self.b[:0]
        return self.judging(self.of(self.x, which)).neg_().add_(self.scaled(which))

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
        self.norm[which], self.gain = norm, None
        self.energy.restart(which, norm.square())
        if self.combinations is not None:
            self.combinations.start()
        self.lowest, self.since_lowest = torch.inf, 0
        # A start equals the turn after a step without directions.
        self.q = self.of(r, again.nonzero().flatten())
        self.p = self.q[:0]
        self.krylov.start()
        self.coefficients = torch.zeros(len(self.x), len(self.q), dtype=torch.float64, device="cpu")
        self.coefficients[self.at_work] = torch.eye(len(self.q), dtype=torch.float64, device="cpu")
        if len(self.q):
            self.turn(symmetric_gram(self.q, self.q).cpu())
        # No direction can make a residual smaller that is within reach of rounding.
        within_reach = self.at_work & ~self.going
        self.leave(within_reach.nonzero().flatten())
        self.at_work &= ~within_reach

    def leave(self, stuck: Tensor) -> None:
        """Ends rows that the block can't take further: those not down to rounding are handed to row-wise iteration."""
        self.handed[stuck] = self.residual[stuck] > self.reachable()[stuck]

    def ready(self) -> bool:
        """Tells whether there are directions to step along; to find some, judges rows whose recurrence has ended."""
        if self.at_work.any() and not self.going.any() and not self.spent:
            self.settle()
        return bool(self.going.any()) and not self.spent

    def step(self) -> None:
        """Does one iteration, along at least one direction."""
        z, dots = self.multiplied()
        self.steps += 1
        # The rows' own precision is enough for an estimate: float64 takes 40 times as long.
        size = torch.linalg.vector_norm(self.p, dim=1)
        ratio = torch.linalg.vector_norm(z, dim=1) / size
        # Nor does P A Pᵀ need more than products have: x and residuals move alike whatever its inverse is.
        gram = symmetric_gram(self.p, z, wide=False)
        seen = torch.cat([gram, size[None].double(), ratio[None].double()]).cpu()  # in one copy
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
        lengths = self.coefficients @ inverse
        self.gain = (lengths * self.coefficients).sum(dim=1)
        lengths, inverse = beside(z, lengths), beside(z, inverse)
        if self.follow is not None:
            self.follow(dots, lengths * self.unit)
        gram = torch.zeros(len(z), len(z), dtype=torch.float64, device=z.device)
        for part in tiles(z):
            self.x[:, part].addmm_(lengths, self.p[:, part])
            wide = self.q[:, part].addmm_(inverse, z[:, part], alpha=-1).double()
            add_lower_gram(gram, wide, wide)
        del z
        self.turn(mirrored(gram).cpu())

    def multiplied(self) -> tuple[Tensor, Tensor | None]:
        """Multiplies the directions; in the last product that may be made the combinations of x so far as well."""
        last = self.budget is not None and self.products + 1 == self.budget
        if self.combinations is None or not last or not self.steps:  # the residuals of a start are known
            return self.product(self.p)
        which = self.at_work.nonzero().flatten()
        unit, going = self.unit_of(which), self.going.nonzero().flatten()
        told = self.combinations.expected.clone()
        told += self.combinations.of(going, self.unit_of(going), beside(self.q, self.coefficients[going])) @ self.q
        combined = self.combinations.of(which, unit, self.of(self.x, which))
        product, dots = self.product(torch.cat([self.p, combined]))
        true = self.combinations.of(which, unit, self.scaled(which)) - product[len(self.p) :]
        self.apart, self.judged_by = self.combinations.apart(true, told), str(self.combinations)
        return product[: len(self.p)], None if dots is None else dots[:, : len(self.p)]

    def unit_of(self, which: Tensor) -> Tensor:
        """The tolerances of rows; where they are zero the sizes of the right-hand sides."""
        return torch.where(self.tolerance > 0, self.tolerance, self.size)[which]

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
        lower, failed = torch.linalg.cholesky_ex(symmetric_gram(self.p, self.p).cpu())
        if failed:
            return  # directions that are equal up to rounding show nothing; the row-wise iteration will
        half = torch.linalg.solve_triangular(lower, curvature, upper=False)
        quotients = torch.linalg.eigvalsh(torch.linalg.solve_triangular(lower, half.mT, upper=False))
        self.negative |= self.going & bool(quotients[0] < -rounding(self.q.dtype) * float(self.largest))
        self.krylov.quotients = quotients

    def turn(self, gram: Tensor) -> None:
        """Replaces q by a basis with q = L (new q), coefficients by coefficients L, and p by q M + Lᵀ p."""
        if not gram.isfinite().all():
            return self.hand_over()
        d = self.q.shape[1]
        found = split(gram, d, self.q.dtype)
        factor, inverse = found.factor, found.inverse
        if not found.accurate:
            self.q = multiply(inverse, self.q)
            second = split(symmetric_gram(self.q, self.q).cpu(), d, self.q.dtype)
            factor, inverse = factor @ second.factor, second.inverse
        self.coefficients = self.coefficients @ factor
        self.judge(inverse)
        needed = self.coefficients[self.going]
        if len(needed) < factor.shape[1]:
            keep = torch.linalg.qr(needed.mT).Q
            factor, inverse, self.coefficients = factor @ keep, keep.mT @ inverse, self.coefficients @ keep
        self.q = multiply(inverse, self.q)
        towards = self.q
        if self.precondition is not None and len(self.q):
            towards = self.precondition(self.q).detach()
            lower, failed = torch.linalg.cholesky_ex(symmetric_gram(self.q, towards).cpu())
            if failed or not lower.isfinite().all():
                return self.hand_over()
            eye = torch.eye(len(lower), dtype=torch.float64, device="cpu")
            upright = torch.linalg.solve_triangular(lower, eye, upper=False)
            self.q, towards = multiply(upright, self.q), multiply(upright, towards)
            factor, self.coefficients = factor @ lower, self.coefficients @ lower
        if len(self.p):
            self.p = multiply(factor.mT, self.p, towards)
        else:
            self.p = towards.clone() if towards is self.q else towards
        self.krylov.turn(factor)

    def judge(self, inverse: Tensor) -> None:
        """Takes the rows off that the recurrence says are done; hands the rest over if it makes no progress.

        The residuals are coefficients times an orthonormal basis, inverse times ``q``.
        """
        norm, before = torch.linalg.vector_norm(self.coefficients, dim=1), self.going.clone()
        self.norm = torch.where(self.going, norm, self.norm)
        if self.gain is not None:
            self.energy.step(self.gain, norm.square(), self.going)
        if self.history is not None and self.steps >= len(self.history):
            self.history.append(torch.where(self.going, norm / self.size, torch.nan))
        if self.steps % LOOKS_EVERY == 0:
            size = self.size.to(self.x.device, non_blocking=True)
            self.floor = smallest_residual(self.largest, self.x, size).cpu()
        self.going &= norm > torch.maximum(self.aim, self.floor)
        near = self.going & (self.energy.relative <= self.error_rtol) & (self.error_rtol > 0)
        self.going &= ~near
        self.tolerance = torch.where(near, torch.maximum(self.tolerance, VERIFIED * norm), self.tolerance)
        self.aim = torch.where(near, self.tolerance, self.aim)
        taken = (before & ~self.going).nonzero().flatten()
        if self.combinations is not None and len(taken):
            self.combinations.tell(taken, self.unit_of(taken), self.coefficients[taken] @ inverse, self.q)
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
        self.q = self.p = self.b[:0]
        which = self.at_work.nonzero().flatten()
        if self.combinations is not None and len(which) >= _WORTH * len(self.combinations):
            which = self.in_doubt(which, self.combinations)
        if not self.spent:
            self.begin(which, self.true_residual(which))

    def in_doubt(self, which: Tensor, combinations: Combinations) -> Tensor:
        """Judges rows by combinations of them, and those close to their tolerance by themselves, in one product.

        Returns the rows for which that is not enough, and all where these are most.
        """
        unit, scaled = self.unit_of(which), self.scaled(which)
        close = self.norm[which] > _CLOSE * self.tolerance[which]
        x = self.of(self.x, which)
        product = self.judging(torch.cat([combinations.of(which, unit, x), self.of(x, close.nonzero().flatten())]))
        self.apart = combinations.apart(combinations.of(which, unit, scaled) - product[: len(combinations)])
        bound = self.norm[which] + self.apart * unit
        bound[close] = norms(self.of(scaled, close.nonzero().flatten()) - product[len(combinations) :]).cpu()
        sure = bound <= self.tolerance[which]
        if 2 * int(sure.sum()) < len(which):
            return which
        done = which[sure]
        self.residual[done], self.converged[done], self.at_work[done] = bound[sure], True, False
        self.judged_by = f"{combinations}, for {int((sure & ~close).sum())} of {len(self.b)} rows"
        return which[~sure]

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(self, limit: int) -> None:
        """Runs row-wise conjugate gradients on rows handed over; computes true residuals where iterations ran out."""
        del self.q, self.p
        which = self.handed.nonzero().flatten()
        device = self.x.device
        budget = None if self.budget is None else self.budget - self.products
        if len(which) and self.steps < limit and (budget is None or budget > 2):  # two go to residuals
            rows, left = which.to(device), limit - self.steps
            x, single = iterate(
                self.operator,
                self.scaled(which),
                self.x[rows],
                self.tolerance[which].to(device),
                left,
                self.precondition,
                budget=budget,
            )
            self.x[rows] = x
            self.products += single.products
            self.iterations[which] += single.iterations.cpu()
            self.residual[which] = single.residual.cpu() * self.size[which]
            self.converged[which] = single.converged.cpu()
            self.limited[which] = single.precision_limit.cpu()
            self.negative[which] |= single.negative_curvature.cpu()
            self.energy.left[which] = torch.inf
            self.single = single.krylov
            if self.follow is not None:
                self.follow(None, None)
        else:
            self.at_work |= self.handed
            self.handed.zero_()
        which = self.at_work.nonzero().flatten()
        if len(which) and self.spent:
            self.residual[which] = self.norm[which] + self.apart * self.unit_of(which)
        elif len(which):
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
            error=self.energy.relative.to(device),
            verification=self.judged_by,
            krylov=Seen([part for part in (self.krylov, self.single) if part is not None]),
        )
