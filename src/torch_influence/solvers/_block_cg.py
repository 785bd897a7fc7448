"""Block conjugate gradients (O'Leary 1980, stabilised as by Dubrulle 2001): all rows share one Krylov space."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

from torch import Tensor

from torch_influence.failures import OnFailure, check_on_failure
from torch_influence.linop import LinearOperator, as_tensor
from torch_influence.solvers._base import (
    Progress,
    check_budget,
    conclude,
    first_guess,
    iteration_limit,
    system,
    with_quick_products,
    with_rounding,
)
from torch_influence.solvers._block import Block, Follow
from torch_influence.solvers._preconditioners import as_preconditioner, made_once, preconditioned, with_rows
from torch_influence.solvers._report import SolveReport
from torch_influence.solvers._solver import Cost, Krylov, Memo, iterations

# A block of k rows takes about k^-0.4 of what one row does: 14, 10 and 7 products for 16, 64 and 256 rows where one row
# takes 30.
_BLOCK_EXPONENT = 0.4

Verify: TypeAlias = Literal["combinations", "all"]


@with_quick_products
def block_cg(
    A: Any,
    B: Any,
    *,
    x0: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    error_rtol: float = 0.0,
    maxiter: int | None = None,
    max_products: int | None = None,
    M: Any = None,
    verify: Verify = "combinations",
    follow: Follow | None = None,
    history: bool = False,
    on_failure: OnFailure = "warn",
    progress: Progress | None = None,
) -> tuple[Tensor, SolveReport]:
    """Solves A x = b for each row b of ``B`` [k, d], each from the Krylov space of all of them.

        W = (P A Pᵀ)⁻¹,   X ← X + T W P,   L Q = Q - W P A,   T ← T L,   P ← Q M + Lᵀ P

    T Q are the residuals B - X A, of which Q is a basis with Q M Qᵀ = I, L Q a factorisation into a small matrix and
    the next basis, and the rows of P search directions that are conjugate to all before. A row is done when its true
    residual is within max(rtol·|b|, atol), as with ``cg``: what the recurrence says is done is judged by b - Ax from
    its definition, and the rows that rounding has fooled start again from there together, until that no longer helps.

    With many rows a few random combinations of them are judged in place of all: their residuals, from the definition,
    against the recurrence's. A difference larger than the bound that is then added to each residual is missed with a
    probability of 1e-6 (see ``missed`` in solvers/_combinations.py). Rows that the bound leaves in doubt are multiplied
    themselves, and all are where they would be most.

    Dependent directions drop out of Q, and so do those that only rows already done would need: the block shrinks.
    Where P A Pᵀ is not positive definite, or the block makes no headway, the rows left go on by ``cg`` from where they
    are. The report's method says so.

    Args:
        A: symmetric positive definite, given as in ``cg``; where it turns out not to be, that is reported as by ``cg``.
        B: [k, d] or [d], on A's device; the sizes of rows may differ by any factor. One that is not finite is left out.
        rtol: relative tolerance.
        atol: absolute tolerance.
        error_rtol: a row is done, too, when the estimate of |x - x*|_A / |x*|_A is within this; see the report's
            ``error``. 0: by its residual alone.
        maxiter: iterations at the most, of block and single rows together; 10 d by default.
        max_products: products at the most, M's among them: the best x for so many, with its residual. Rows that are
            not done by then are warned of. What verifies them is multiplied together with the last directions.
        M: approximate inverse of A, as in ``cg``.
        verify: "combinations", or "all" to multiply every row once more at the end.
        follow: called in each iteration with what ``A.product_and_dots`` returns beside its product, [n, m], and with
            the coefficients [k, m] by which x has grown in the m rows multiplied: linear functions of x can be summed
            up without x. With None and None where x has grown in another way.
        x0: first guess, [d] or [k, d]; zero by default. An array or a tensor.
        history: keep the residuals of every iteration in the report; those of rows that go on by ``cg`` up to there.
        on_failure: "warn", "raise" (a ``SolveError``, which has the solution and the report) or "ignore".
        progress: wraps the iterations in a progress bar.

    Returns:
        x, of B's shape, and the report. A row's iterations are those until its recurrence was within tolerance. x is
        NaN in rows of which nothing is known: b or a product is not finite.

    Raises:
        TypeError: an argument that makes no sense.
        ValueError: likewise; ``max_products`` is no more than M takes.
        SolveError: with ``on_failure="raise"``, in place of the warnings.

    Warns:
        ConvergenceWarning: some row is neither within tolerance nor at the limit of the arithmetic with at least half
            of the digits right.
        NegativeCurvatureWarning: as ``cg``.

    Cost:
        iterations + 1 products (2 without an exact zero start), the last of which is one of k/16 combinations, and at
        least 8, for many rows; at most about d/k iterations where rounding is no matter; besides 5 k² d multiplications
        per iteration, 1.3 k² d of them in float64, and small matrices on the host, which waits for the device twice in
        an iteration, three times with M or where a basis takes its second pass, and once more in every 16th. Memory
        5 k d, one more k d with M, and 7 k d where rows go on by ``cg``.

    Source:
        O'Leary (1980); Dubrulle (2001), the variant with QR factorisation of the residuals. Here that is CholeskyQR2
        (Yamamoto, Nakatsukasa, Yanagisawa and Fukaya 2015) with Gram matrices of float64, so that a basis in float32
        can be had at any condition number; its second pass is left out where the first has lost no digits. With M the
        basis is first made orthonormal and then M-orthonormal, so that residuals can be read from T in between.

    Examples:
        >>> x, report = block_cg(torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0])), torch.eye(4))
        >>> [round(entry, 4) for entry in x.diagonal().tolist()]
        [1.0, 0.5, 0.25, 0.125]
    """
    start = time.perf_counter()
    check_on_failure(on_failure)
    if verify not in ("combinations", "all"):
        raise ValueError(f'verify: expected "combinations" or "all", got {verify!r}')
    operator, rows = system(A, B)
    limit = iteration_limit(rtol, atol, maxiter, rows.shape[1])
    check_budget(error_rtol, max_products)
    if max_products is not None and operator.exact is not operator:
        raise ValueError(
            f"max_products, product_dtype: the last product can't be in {operator.product_dtype} and verify as well; "
            "leave one of them out"
        )
    precondition, made_of = (None, 0) if M is None else as_preconditioner(M, operator.exact, rows)
    if max_products is not None and made_of >= max_products:
        raise ValueError(f"max_products: expected more than the {made_of} that M takes, got {max_products}")
    block = Block(
        operator,
        rows,
        first_guess(x0, rows),
        (rtol, atol, error_rtol),
        history,
        precondition=precondition,
        budget=None if max_products is None else max_products - made_of,
        combine=verify == "combinations" and operator.exact is operator,  # else they show that products are rounded
        follow=follow,
    )
    steps: Iterable[int] = range(limit)
    if progress is not None:
        steps = progress(steps, "block conjugate gradients", None)  # no total: it stops long before the limit
    for _ in steps:
        if not block.ready():
            break
        block.step()
    block.finish(limit)
    report = block.report(time.perf_counter() - start)
    method, used = with_rounding(report.method, operator), made_of + report.products
    report = dataclasses.replace(report, method=method, rtol=rtol, products=used)
    x, report = conclude(
        block.x,
        report,
        limit=limit,
        on_failure=on_failure,
        cures=', and minres (solver="minres") takes indefinite matrices',
        preconditioned=M is not None,
        unit=block.unit,
        budget=max_products,
        product_dtype=operator.product_dtype,
    )
    return x.reshape(as_tensor(B).shape), report


@dataclasses.dataclass(kw_only=True, eq=False)
class BlockCG(Krylov):
    """Solves by block conjugate gradients: all rows share one Krylov space; see ``block_cg``.

    Args:
        rtol, atol, error_rtol, maxiter, max_products, M, verify, x0, history: those of ``block_cg``. What a recipe M
            makes is kept for later solves with the same operator.

    Cost:
        one product an iteration, of which many rows take fewer than few; memory 7 k d, and that of M.

    Examples:
        >>> from torch_influence.linop import Dense
        >>> x, report = BlockCG(rtol=1e-8).solve(Dense(torch.diag(torch.tensor([1.0, 2.0, 4.0]))), torch.ones(1, 3))
        >>> [round(entry, 4) for entry in x[0].tolist()]
        [1.0, 0.5, 0.25]
    """

    error_rtol: float = 0.0
    max_products: int | None = None
    M: Any = None
    verify: Verify = "combinations"
    _made: Memo[LinearOperator] = dataclasses.field(default_factory=Memo, init=False, repr=False)

    vectors, work = 7, 10
    follows = True

    def solve(self, operator: LinearOperator, rows: Tensor, **how: Any) -> tuple[Tensor, SolveReport]:
        """A⁻¹ b for each row b of [k, d], and the report."""
        return block_cg(operator, rows, **self.options(M=made_once(self.M, operator, self._made)), **how)

    @property
    def title(self) -> str:  # type: ignore[override]
        """The way, in words."""
        return "block conjugate gradients" + preconditioned(self.M)

    def cost(self, operator: LinearOperator, k: int) -> Cost:
        """A guess: the spectrum is not known. Vectors are multiplied by k others each."""
        steps = max(iterations(self._loosest, operator.size) * k**-_BLOCK_EXPONENT, 2.0) + 1
        return with_rows(self._cost(operator, k, steps, self.work * k), self.M, operator)
