"""MINRES (Paige and Saunders 1975) on many right-hand sides at once, with SciPy's argument names."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_influence.failures import OnFailure, check_on_failure
from torch_influence.linop import LinearOperator, as_tensor
from torch_influence.solvers._base import (
    Progress,
    conclude,
    first_guess,
    in_range,
    iteration_limit,
    norms,
    rounding,
    system,
    tolerances,
    with_quick_products,
)
from torch_influence.solvers._lanczos import ROWS_LOOKED_AT, Tridiagonals
from torch_influence.solvers._preconditioners import as_preconditioner, made_once, preconditioned, with_rows
from torch_influence.solvers._report import SolveReport
from torch_influence.solvers._rotations import Rotations, rotate
from torch_influence.solvers._rows import RowIteration, StepLog
from torch_influence.solvers._solver import Cost, Krylov, Memo

_M_EXPECTED = "M: expected a symmetric positive definite preconditioner, got one with r'Mr <= 0 for a residual r"
# If |Ar| / |A||r| falls below this number times eps^½, it is tested whether a system is inconsistent. For those that
# are, it falls to 0.01 to 1 times eps^½ (3000 systems, condition 4 to 300, float32 and float64) and grows again.
_FLAT = 4


@with_quick_products
def minres(
    A: Any,
    B: Any,
    *,
    x0: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    M: Any = None,
    history: bool = False,
    on_failure: OnFailure = "warn",
    progress: Progress | None = None,
) -> tuple[Tensor, SolveReport]:
    """Solves A x = b for each row b of ``B`` [k, d], A symmetric and possibly indefinite or singular.

    Each iterate has the least |b - Ax| of its Krylov space, whatever the signs of A's eigenvalues. A row is done when
    its true residual is within max(rtol·|b|, atol): when the recurrence says so, b - Ax is computed from its definition
    and judges; if rounding had fooled the recurrence the row starts again from there, until that no longer helps. Then
    it is at the limit of the arithmetic, about u (|A||x| + |b|).

    Where A is singular and b is not in its range, x is a least-squares solution, and ``converged`` is False. That is
    looked for where |Ar|, r = b - Ax, is less than half of the digits of |A||r|, and told when a null vector of A has
    been found that is not at right angles to b. (SciPy ends at rtol·|A||r|, where r may as well lie along eigenvalues
    that are small, but not zero.)

    Args:
        A: symmetric: a matrix, a LinearOperator, an object with ``@`` on columns, a callable on rows (see
            ``linop.aslinearoperator``).
        B: [k, d] or [d], on A's device.
        x0: first guess, [d] or [k, d]; zero by default. An array or a tensor.
        rtol: relative tolerance.
        atol: absolute tolerance.
        maxiter: iterations at the most; 10 d by default.
        M: approximate inverse of |A|, symmetric positive definite, as in ``cg``. What is least is then r'Mr; rows are
            judged by |r| all the same.
        history: keep the residuals of every iteration in the report.
        on_failure: "warn", "raise" (a ``SolveError``, which has the solution and the report) or "ignore".
        progress: wraps the iterations in a progress bar.

    Returns:
        x, of B's shape, and the report. x is NaN in rows of which nothing is known: b or a product is not finite.

    Raises:
        TypeError, ValueError: an argument that makes no sense; M is not positive definite.
        SolveError: with ``on_failure="raise"``, in place of a ConvergenceWarning.

    Warns:
        ConvergenceWarning: some row is neither within tolerance nor at the limit of the arithmetic with at least half
            of the digits right; the system is singular, to rounding, and inconsistent.
        NegativeCurvatureWarning: a Ritz value is negative beyond rounding: no failure here, but scores are then those
            of a saddle point.

    Cost:
        iterations + 1 products (2 without an exact zero start), at most three times as many where the system may be
        inconsistent; memory 6 k d, 9 k d with M. Beside the product an iteration reads 16 and writes 8 numbers per
        element; with M 25 and 12, since |r| takes a recurrence of r. On a GPU the host waits only for the iteration
        before the last, so a row's end is noticed one iteration late. Rounding leaves about u κ² of a residual until it
        is computed anew: where A is definite and ill-conditioned, ``cg`` gets further.

    Source:
        Paige and Saunders (1975); the recurrence of r as in Choi, Paige and Saunders (2011); rounding as in Sleijpen,
        van der Vorst and Modersitzki (2000). Dot products are summed pairwise in the rows' dtype, those of 16-bit rows
        in float64; rotations are in float64.

    Examples:
        >>> x, report = minres(torch.diag(torch.tensor([1.0, -2.0, 4.0])), torch.ones(3), on_failure="ignore")
        >>> [round(entry, 4) for entry in x.tolist()], report.iterations.tolist()
        ([1.0, -0.5, 0.25], [3])
    """
    check_on_failure(on_failure)
    operator, rows = system(A, B)
    limit = iteration_limit(rtol, atol, maxiter, rows.shape[1])
    start = time.perf_counter()
    precondition, made_of = (None, 0) if M is None else as_preconditioner(M, operator, rows)
    rows, unit = in_range(rows)
    tolerance = tolerances(rows, unit, rtol, atol)
    state = _State(operator, rows, first_guess(x0, rows, unit), tolerance, precondition, history)
    state.run(limit, progress, "MINRES")
    report = state.report(time.perf_counter() - start, "MINRES", state.indefinite(), history)
    x, report = conclude(
        state.all_x,
        dataclasses.replace(report, rtol=rtol, products=made_of + report.products),
        limit=limit,
        on_failure=on_failure,
        preconditioned=M is not None,
        takes_indefinite=True,
        least=(state.unavoidable / norms(rows)).nan_to_num(nan=0.0).cpu(),
        unit=unit,
    )
    return x.reshape(as_tensor(B).shape), report


class _State(RowIteration[Rotations]):
    """The state of the rows at work: Lanczos vectors p with z = M p, M-orthonormal, and search directions gamma w.

    With a preconditioner the norm that the rotations give is r'Mr, which does not show |r|; so r, divided by its
    first norm, has a recurrence of its own.
    """

    p: Tensor
    p_before: Tensor
    w: Tensor
    w_before: Tensor
    z: Tensor  # with a preconditioner, as r
    r: Tensor

    def __init__(
        self,
        operator: LinearOperator,
        b: Tensor,
        x: Tensor | None,
        tolerance: Tensor,
        precondition: Callable[[Tensor], Tensor] | None = None,
        history: bool = False,
        asks: bool = True,
    ) -> None:
        scalars = b.new_zeros(len(Rotations._fields), len(b), dtype=torch.float64)
        log = _Log(len(b), b.dtype, Rotations, preconditioned=precondition is not None)
        super().__init__(operator, b, x, tolerance, log, scalars)
        self.indefinite = log.indefinite
        self.precondition, self.history = precondition, history
        self.row.asks.fill_(float(asks))
        self.waiting = torch.zeros_like(self.converged)
        self.unavoidable = torch.zeros_like(self.first)  # the least residual of any x, where none solves the system
        self.kept: Tensor | None = None  # the start with the least residual; None: zero
        self.least, self.kept_residual = (torch.full_like(self.first, torch.inf) for _ in range(2))
        self.vectors = ("p", "p_before", "w", "w_before") + (() if precondition is None else ("z", "r"))
        for name in self.vectors:
            setattr(self, name, torch.empty_like(self.all_x))
        self.start()

    def begin(self, which: Tensor, r: Tensor) -> None:
        size, (phi, z) = norms(r), self.measured(r)
        if self.precondition is not None:
            if bool(((phi <= 0) & (size > 0)).any()):
                raise ValueError(_M_EXPECTED)
            self.z[which] = z / _column(phi, z)
            self.r[which] = r / _column(size, r)
        self.p[which] = r / _column(phi, r)
        for vector in (self.p_before, self.w, self.w_before):
            vector[which] = 0.0
        self.row.begin(which, size, phi)
        self.keep_best(self.at_work[which], size, phi)
        self.log.start(self.at_work[which], phi)

    def step(self) -> None:
        precondition, row = self.precondition, self.row
        z = self.p if precondition is None else self.z
        q = self.product(z)
        if precondition is not None:
            seen = torch.linalg.vector_norm(q, dim=1).double() / torch.linalg.vector_norm(z, dim=1).double()
        q.addcmul_(self.p_before, _column(-row.beta, q))
        spare = self.p_before  # it has served
        alpha = _dot(z, q, spare)
        q.addcmul_(self.p, _column(-alpha, q))
        image = q if precondition is None else precondition(q).detach()
        square = _dot(q, image, spare)

        after, by = rotate(row, alpha, square, rounding(q.dtype), _FLAT * torch.finfo(q.dtype).eps ** 0.5)
        torch.addcmul(z, self.w_before, _column(by.w_before, q), out=self.w_before)
        self.w_before.addcmul_(self.w, _column(by.w, q))
        self.w, self.w_before = self.w_before, self.w
        self.x.addcmul_(self.w, _column(by.x, q))
        if precondition is not None:
            self.z = image / _column(by.p, q)  # a new tensor: image may be q itself
        self.p_before, self.p = self.p, q.div_(_column(by.p, q))
        residual = after.phi
        if precondition is None:
            seen = after.norm
        else:
            turned = after.phi * after.cosine / row.size
            self.r.mul_(_column(after.sine.square(), q)).addcmul_(self.p, _column(-turned, q))
            residual = row.size * _dot(self.r, self.r, spare).sqrt()
        after = after._replace(
            largest=torch.maximum(row.largest, seen), residual=torch.where(by.moved, residual, row.residual)
        )
        broken = (row.active != 0) & ~by.sound
        self.scalars.copy_(torch.where(by.sound, torch.stack(after), self.scalars))
        row.residual.masked_fill_(broken, torch.nan)
        row.active.copy_(by.moved & ~self.done())
        self.record(self.history)

    def settle(self) -> None:
        if bool((self.row.misled != 0).any()):
            raise ValueError(_M_EXPECTED)
        super().settle()

    def measured(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the norm that MINRES minimises, (r'Mr)^½, 0 where r'Mr is negative; and z = M r."""
        if self.precondition is None:
            return norms(r), r
        z = self.precondition(r).detach()
        return (r.double() * z.double()).sum(dim=1).clamp(min=0.0).sqrt(), z

    def judged(self, which: Tensor, r: Tensor) -> None:
        at, phi = self.at_work[which], self.measured(r)[0]
        failed = ~self.converged[at]
        self.waiting[at] = failed & (self.row.stationary[which] != 0) & (self.row.asks[which] != 0)
        self.limited[at] |= self.waiting[at]
        self.put_back(at[self.limited[at]], phi[self.limited[at]])

    def given_up(self, which: Tensor, r: Tensor) -> None:
        failed = ~self.converged[which]
        if failed.any():
            self.put_back(which[failed], self.measured(r[failed])[0])

    def keep_best(self, which: Tensor, size: Tensor, phi: Tensor) -> None:
        better = phi < self.least[which]
        which = which[better]
        self.least[which], self.kept_residual[which] = phi[better], size[better]
        if self.guessed or self.steps:
            if self.kept is None:
                self.kept = torch.zeros_like(self.all_x)
            self.kept[which] = self.all_x[which]

    def put_back(self, which: Tensor, phi: Tensor) -> None:
        """Puts back the best start's x, in rows whose residual is no smaller now."""
        which = which[phi > self.least[which]]
        if len(which):
            self.all_x[which] = 0.0 if self.kept is None else self.kept[which]
            self.residual[which] = self.kept_residual[which]

    def resume(self) -> bool:
        """Tests, for all rows with a small Ar together, whether their system is inconsistent; restarts the others."""
        which = self.waiting.nonzero().flatten()
        if not len(which):
            return False
        r = self.true_residual(which)
        self.unavoidable[which] = unavoidable = self.least_of_any(which, r)
        self.waiting[which] = False
        solvable = unavoidable == 0
        again = which[solvable]
        self.limited[again] = False
        self.take(again)
        self.row.asks.zero_()
        if len(again):
            self.begin(torch.ones_like(again, dtype=torch.bool), r[solvable])
        return len(again) > 0

    def least_of_any(self, which: Tensor, r: Tensor) -> Tensor:
        """Bounds |b - Ax| from below for any x, [k]: by b'z / |z| for a null vector z of A; 0 if none was found.

        M r is a null vector, apart from its part in the range of A. Minimising |r| removes that part only down to half
        of the digits, since |r|² has its square. So it is removed from z first, by solving A y = A z, which is
        consistent. Az is computed from its definition.
        """
        row = self.log.names(*self.all_scalars)
        largest, small = row.largest[which], rounding(r.dtype)
        z = self.measured(r)[1]
        tolerance = 0.5 * small * largest * norms(z)
        inner = _State(self.operator, self.product(z), None, tolerance, self.precondition, asks=False)
        inner.run(2 * int(row.iterations[which].max()), None, "")
        self.products += inner.products
        z = z - inner.all_x
        size, b = norms(z), self.b[which]
        least = (b.double() * z.double()).sum(dim=1).abs() / size
        found = (norms(self.product(z)) <= small * largest * size) & (least > small * norms(b))
        return torch.where(found, least, 0.0)

    def give_up(self) -> None:
        self.resume()
        super().give_up()

    def done(self) -> Tensor:
        return (self.row.residual <= self.row.tolerance) | (self.row.stationary != 0)

    def largest(self, row: Rotations) -> Tensor:
        return row.largest

    def broken(self, row: Rotations) -> Tensor:
        return ~row.residual.isfinite()


class _Log(StepLog[Rotations]):
    def residuals(self, values: Rotations) -> Tensor:
        return values.residual

    def extremes(self) -> tuple[float, float]:
        matrices, some = self.matrices()
        if not some.any():
            return float("nan"), float("nan")
        reach = matrices.diagonal.amax(dim=0) - matrices.diagonal.amin(dim=0)
        reach[self.indefinite()[some]] += matrices.diagonal.abs().max() + reach.max()  # these first
        few = reach.argsort(descending=True)[:ROWS_LOOKED_AT]
        smallest, largest = Tridiagonals(matrices.diagonal[:, few], matrices.squares[:, few]).extremes_of_each()
        return float(smallest.min()), float(largest.max())

    def indefinite(self) -> Tensor:
        """Tells which rows [k] have met a Ritz value below zero, beyond rounding."""
        matrices, some = self.matrices()
        negative = torch.zeros_like(some)
        if some.any():
            off = torch.nn.functional.pad(matrices.squares, (0, 0, 0, 1))
            norm = (matrices.diagonal.square() + off + off.roll(1, 0)).amax(dim=0).sqrt()
            negative[some] = matrices.some_below(-rounding(self.dtype) * norm[:, None]).squeeze(1)
        return negative

    def matrices(self) -> tuple[Tridiagonals, Tensor]:
        """Returns the Lanczos matrices of the rows that took a step, and a mask [k] of these rows.

        Where a row started again, another block begins. Steps that a row did not take repeat its first entry.
        """
        if not self.steps:
            none = torch.zeros(self.k, dtype=torch.bool, device="cpu")
            return Tridiagonals(*torch.empty(2, 0, 0, dtype=torch.float64, device="cpu")), none
        stepped, values = self.unpack()
        linked = stepped[:-1] & stepped[1:] & ~self.begins()[1 : len(stepped)]
        squares = torch.where(linked, values.beta[:-1].square(), 0.0)
        first = stepped.int().argmax(dim=0, keepdim=True)
        diagonal = torch.where(stepped, values.alpha, values.alpha.gather(0, first))
        some = stepped.any(dim=0)
        return Tridiagonals(diagonal[:, some], squares[:, some]), some


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Turns one number per row, [k], into a column [k, 1] in the rows' dtype."""
    return values.to(like.dtype)[:, None]


def _dot(a: Tensor, b: Tensor, spare: Tensor) -> Tensor:
    """Computes a'b of each row, float64; ``spare`` is a tensor like them, and is written to."""
    if a.dtype.itemsize < 4:
        return (a.double() * b.double()).sum(dim=1)
    return torch.mul(a, b, out=spare).sum(dim=1).double()


@dataclasses.dataclass(kw_only=True, eq=False)
class Minres(Krylov):
    """Solves by minimal residuals, for matrices that are indefinite or singular; see ``minres``.

    Args:
        rtol, atol, maxiter, M, x0, history: those of ``minres``. What a recipe M makes is kept for later solves with
            the same operator.

    Cost:
        one product an iteration, however many rows; memory 6 k d, and that of M.

    Examples:
        >>> from torch_influence.linop import Dense
        >>> A = Dense(torch.diag(torch.tensor([1.0, -2.0, 4.0])))
        >>> x, report = Minres(rtol=1e-8).solve(A, torch.ones(1, 3), on_failure="ignore")
        >>> [round(entry, 4) for entry in x[0].tolist()]
        [1.0, -0.5, 0.25]
    """

    M: Any = None
    _made: Memo[LinearOperator] = dataclasses.field(default_factory=Memo, init=False, repr=False)

    vectors, work = 6, 18

    def solve(self, operator: LinearOperator, rows: Tensor, **how: Any) -> tuple[Tensor, SolveReport]:
        """A⁻¹ b for each row b of [k, d], and the report."""
        return minres(operator, rows, **self.options(M=made_once(self.M, operator, self._made)), **how)

    @property
    def title(self) -> str:  # type: ignore[override]
        """The way, in words."""
        return "MINRES, all rows at once" + preconditioned(self.M)

    def cost(self, operator: LinearOperator, k: int) -> Cost:
        """Adds what M keeps."""
        return with_rows(super().cost(operator, k), self.M, operator)
