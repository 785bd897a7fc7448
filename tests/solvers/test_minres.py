"""MINRES on definite, indefinite and singular matrices: against dense float64 solves, least squares and SciPy."""

from __future__ import annotations

import doctest
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import problems
import pytest
import scipy.sparse.linalg
import torch
from matrices import Counted, OverflowsAfter, positive_definite, solution, true_residuals
from oracles import assert_close, dense_hessian, example_gradients, loader_batches, query_gradients, tolerance
from oracles import with_spectrum as matrix_with
from torch import Tensor

from torch_influence import InfluenceModule
from torch_influence.linop import Dense, LinearOperator
from torch_influence.solvers import (
    CG,
    Auto,
    ConvergenceWarning,
    Minres,
    NegativeCurvatureWarning,
    Nystrom,
    SolveError,
    SolveReport,
    _minres,
    minres,
)

pytestmark = pytest.mark.filterwarnings("error", "ignore:MINRES met negative curvature")

D, K = 30, 5
CONDITION = 100.0
MILD = 9.0  # converges in far fewer than D iterations, where two ways to round don't yet part
DTYPES = [torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def eigenvalues(d: int, condition: float = CONDITION) -> Tensor:
    values = torch.logspace(0, -np.log10(condition), d, dtype=torch.float64)
    values[1::3] *= -1
    return values


def indefinite(d: int, condition: float = CONDITION) -> Tensor:
    return matrix_with(eigenvalues(d, condition))


MATRICES: dict[str, Callable[..., Tensor]] = {
    "definite": positive_definite,
    "indefinite": indefinite,
    "negative definite": lambda *size: -positive_definite(*size),
}
matrices = pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES)


def randn(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


def quiet(*args: Any, **options: Any) -> tuple[Tensor, SolveReport]:
    return minres(*args, on_failure="ignore", **options)


def assert_solved_to(x: Tensor, expected: Tensor, residual: float, condition: float = CONDITION) -> None:
    """|x - x*| <= |A⁻¹| residual |b| <= residual condition |x*|, in norms; sqrt(D) more in largest entries."""
    assert_close(x, expected, operations=D, condition=condition, inherent=residual * condition * D**0.5)


# -- solutions --------------------------------------------------------------------------------------------------------


@matrices
@dtypes
@pytest.mark.parametrize("k", [1, K])
def test_it_solves(make: Callable[..., Tensor], dtype: torch.dtype, k: int) -> None:
    matrix, rows = make(D).to(dtype), randn(k, D).to(dtype)
    rtol = 1e-4 if dtype == torch.float32 else 1e-12
    x, report = minres(Dense(matrix), rows, rtol=rtol)
    assert report.converged.all()
    assert x.dtype == dtype
    assert_solved_to(x, solution(matrix, rows), rtol)
    rounding = tolerance(dtype, operations=D, condition=CONDITION)
    assert_close(report.residual, true_residuals(matrix, x, rows), operations=D, scale=1.0, inherent=rounding)
    assert torch.equal(report.negative_curvature, torch.full((k,), make is not positive_definite))


@matrices
@pytest.mark.parametrize("preconditioned", [False, True])
def test_every_iterate_has_the_least_residual_of_its_krylov_space(
    make: Callable[..., Tensor], preconditioned: bool
) -> None:
    """In the norm of M with one; from an orthonormal basis of the space and a dense least-squares problem."""
    matrix, row = make(D), randn(1, D)
    M = matrix_with(torch.linspace(0.5, 3.0, D)) if preconditioned else torch.eye(D, dtype=torch.float64)
    root = torch.linalg.cholesky(M)
    basis = torch.empty(D, 0, dtype=torch.float64)
    new = M @ row[0]
    for steps in range(1, 9):
        for _ in range(2):
            new = new - basis @ (basis.mT @ new)
        basis = torch.cat([basis, new[:, None] / new.norm()], dim=1)
        new = M @ matrix @ basis[:, -1]
        y = torch.linalg.lstsq(root.mT @ matrix @ basis, root.mT @ row[0]).solution
        least = (root.mT @ (row[0] - matrix @ basis @ y)).norm()
        x, report = quiet(matrix, row, maxiter=steps, rtol=0.0, M=M if preconditioned else None)
        assert report.iterations.tolist() == [steps]
        mine = (root.mT @ (row[0] - matrix @ x[0])).norm()
        assert_close(mine, least, operations=steps * D, condition=CONDITION)


@dtypes
@matrices
def test_rows_of_very_different_scale_are_each_solved_to_their_own_size(
    make: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    matrix, rtol = make(D).to(dtype), 1e-4
    scales = torch.tensor([1e-30, 1e-12, 1.0, 1e12, 1e30], dtype=dtype)
    rows = randn(1, D).to(dtype) * scales[:, None]
    x, report = minres(Dense(matrix), rows, rtol=rtol)
    assert report.converged.all()
    expected = solution(matrix, rows[2:3])[0]
    for row, size in zip(x, scales, strict=True):
        assert_solved_to(row / size, expected, rtol)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_matrix_does_not_matter(scale: float) -> None:
    matrix, rows = indefinite(D).float(), randn(K, D).float()
    x, report = minres(scale * matrix, rows, rtol=1e-4)
    assert report.converged.all()
    assert_solved_to(scale * x, solution(matrix, rows), 1e-4)


def test_it_is_linear_and_its_inverse_symmetric() -> None:
    operator, rows = Dense(indefinite(D)), randn(2, D)
    both, _ = minres(operator, torch.cat([rows, 3.0 * rows[:1] - rows[1:]]), rtol=1e-13)
    size = float(both.abs().max())
    assert_close(both[2], 3 * both[0] - both[1], operations=D, condition=CONDITION**2, scale=size)
    inverse, _ = minres(operator, torch.eye(D, dtype=torch.float64), rtol=1e-13)
    assert_close(inverse, inverse.mT, operations=D, condition=CONDITION**2)


def test_zero_rows_give_zero_without_work() -> None:
    operator = Counted(positive_definite(D))
    x, report = minres(operator, torch.zeros(K, D, dtype=torch.float64))
    assert torch.equal(x, torch.zeros_like(x))
    assert operator.rows == []
    assert report.converged.all()


def test_a_zero_row_among_others_does_not_disturb_them() -> None:
    matrix, rows = positive_definite(D), randn(K, D)
    rows[2] = 0.0
    x, report = minres(Dense(matrix), rows, rtol=1e-12)
    assert_solved_to(x, solution(matrix, rows), 1e-12)
    assert not x[2].any()
    assert (report.iterations[2], report.residual[2]) == (0, 0)


def test_no_rows_and_vectors() -> None:
    x, report = minres(positive_definite(D), torch.empty(0, D, dtype=torch.float64))
    assert x.shape == (0, D)
    assert "no right-hand sides" in str(report)
    matrix, row = positive_definite(D), randn(D)
    x, _ = minres(matrix, row, rtol=1e-12)
    assert x.shape == (D,)
    assert_solved_to(x, solution(matrix, row[None])[0], 1e-12)


@pytest.mark.parametrize("entry", [4.0, -4.0])
def test_a_matrix_of_one_entry(entry: float) -> None:
    x, report = minres(torch.tensor([[entry]], dtype=torch.float64), torch.tensor([[2.0], [-8.0]], dtype=torch.float64))
    assert_close(x, torch.tensor([[2.0], [-8.0]], dtype=torch.float64) / entry, operations=4)
    assert report.iterations.tolist() == [1, 1]


def test_the_identity_takes_one_iteration_and_rows_are_not_written_to() -> None:
    rows = randn(K, D)
    before = rows.clone()
    x, report = minres(torch.eye(D, dtype=torch.float64), rows)
    assert_close(x, rows, operations=D)
    assert report.iterations.tolist() == [1] * K
    assert torch.equal(rows, before)


def test_rows_that_are_not_contiguous() -> None:
    matrix, rows = indefinite(D), randn(D, 2 * K)[:, ::2].mT
    x, _ = minres(matrix, rows, rtol=1e-12, x0=randn(D, K).mT)
    assert_solved_to(x, solution(matrix, rows), 1e-12)


def test_rows_that_are_done_are_not_multiplied_any_more() -> None:
    matrix = torch.diag(torch.cat([torch.ones(D // 2), torch.linspace(1, 50, D // 2)]).double())
    rows = torch.zeros(2, D, dtype=torch.float64)
    rows[0, 0], rows[1] = 1.0, 1.0  # an eigenvector, and a row that needs many iterations
    operator = Counted(matrix)
    _, report = minres(operator, rows, rtol=1e-10)
    assert report.iterations[0] == 1
    assert report.iterations[1] > 5
    assert sum(operator.rows) < 2 * len(operator.rows)
    assert report.products == len(operator.rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_16_bits(dtype: torch.dtype) -> None:
    matrix, rows = positive_definite(D, 4.0).to(dtype), randn(K, D).to(dtype)
    x, report = minres(Dense(matrix), rows, rtol=0.1)
    assert report.converged.all()
    # The report's residual is that of a product in 16 bits, with D terms.
    assert (true_residuals(matrix, x, rows) <= 0.1 + tolerance(dtype, operations=D**0.5, condition=4.0)).all()


# -- SciPy's conventions ----------------------------------------------------------------------------------------------


def scipy_iterates(matrix: Tensor, row: Tensor, **options: Any) -> list[Tensor]:
    steps: list[np.ndarray] = []
    scipy.sparse.linalg.minres(
        matrix.numpy(), row.numpy(), rtol=1e-15, callback=lambda xk: steps.append(xk.copy()), **options
    )
    return [torch.from_numpy(x) for x in steps]


LIKE_SCIPY: dict[str, dict[str, Any]] = {
    "plain": {},
    "x0": {"x0": np.linspace(-1, 1, D)},
    "M": {"M": np.diag(np.linspace(0.5, 2.0, D))},
    "x0 and M": {"x0": np.linspace(-1, 1, D), "M": np.diag(np.linspace(0.5, 2.0, D))},
}


@matrices
@pytest.mark.parametrize("options", LIKE_SCIPY.values(), ids=LIKE_SCIPY)
def test_iterates_are_those_of_scipy(options: dict[str, Any], make: Callable[..., Tensor]) -> None:
    matrix, rows = make(D, MILD), randn(K, D)
    for steps in (1, 2, 3, 8):
        x, report = quiet(Dense(matrix), rows, rtol=0.0, maxiter=steps, **options)
        assert report.iterations.tolist() == [steps] * K
        for row, mine in zip(rows, x, strict=True):
            theirs = scipy_iterates(matrix, row, maxiter=steps, **options)[-1]
            assert_close(mine, theirs, operations=D * steps, condition=MILD)


@matrices
@pytest.mark.parametrize(("condition", "rtol"), [(10.0, 1e-3), (10.0, 1e-8), (1e3, 1e-5)])
def test_iterations_and_solutions_are_those_of_scipy(
    make: Callable[..., Tensor], condition: float, rtol: float
) -> None:
    """SciPy's own rule is another one, so its iterates are judged by ours; rounding parts the two in the long run."""
    d = 120
    matrix, rows = make(d, condition), randn(3, d)
    x, report = minres(Dense(matrix), rows, rtol=rtol)
    assert report.converged.all()
    assert_solved_to(x, solution(matrix, rows), rtol * (d / D) ** 0.5, condition)
    for row, count in zip(rows, report.iterations, strict=True):
        iterates = scipy_iterates(matrix, row, maxiter=int(1.2 * count) + 1)
        steps = next(i for i, xk in enumerate(iterates, 1) if (row - matrix @ xk).norm() <= rtol * row.norm())
        assert abs(int(count) - steps) <= 0.1 * steps


def test_a_first_guess_that_solves_takes_no_iteration() -> None:
    matrix, rows = indefinite(D), randn(K, D)
    exact = solution(matrix, rows)
    x, report = minres(Dense(matrix), rows, x0=exact)
    assert torch.equal(x, exact)
    assert report.iterations.tolist() == [0] * K
    assert report.converged.all()


@pytest.mark.parametrize("as_given", [np.asarray, torch.as_tensor], ids=["ndarray", "tensor"])
def test_one_first_guess_serves_all_rows_and_is_not_written_to(as_given: Callable[[Tensor], Any]) -> None:
    matrix, rows = indefinite(D), randn(K, D)
    guess = randn(D)
    before = guess.clone()
    x, _ = minres(Dense(matrix), rows, rtol=1e-12, x0=as_given(guess))
    assert_solved_to(x, solution(matrix, rows), 1e-12)
    assert torch.equal(guess, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x0": np.zeros(D + 1)}, ValueError, "x0: expected shape"),
        ({"M": np.zeros((D, D + 1))}, ValueError, "M: expected shape"),
        ({"M": 3.0}, TypeError, "M: expected an array"),
        ({"maxiter": 0}, ValueError, "maxiter: expected at least 1"),
        ({"rtol": -1.0}, ValueError, "rtol, atol: expected tolerances >= 0"),
        ({"atol": -1.0}, ValueError, "rtol, atol: expected tolerances >= 0"),
        ({"on_failure": "error"}, ValueError, "on_failure: expected"),
        ({"M": -np.eye(D)}, ValueError, "M: expected a symmetric positive definite preconditioner"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        minres(positive_definite(D), torch.ones(1, D, dtype=torch.float64), **options)


def test_absolute_tolerance_and_progress() -> None:
    matrix, rows = positive_definite(D), randn(K, D)
    seen: list[str] = []

    def bar(steps: Any, what: str, total: int | None) -> Any:
        seen.append(what)
        return steps

    _, report = minres(matrix, rows, rtol=0.0, atol=1e-3, progress=bar)
    assert (report.residual * rows.norm(dim=1) <= 1e-3).all()
    assert report.converged.all()
    assert seen == ["MINRES"]


def test_the_example_of_the_docstring() -> None:
    assert doctest.testmod(_minres) == (0, 6)


# -- preconditioners --------------------------------------------------------------------------------------------------


def badly_scaled() -> tuple[Tensor, Tensor]:
    """A matrix of condition 4e4 that its diagonal makes one of about 4, and the inverse of that diagonal."""
    scales = torch.logspace(0, 4, D, dtype=torch.float64).sqrt()
    matrix = indefinite(D, 4.0) * scales[:, None] * scales
    return matrix, torch.diag(1.0 / scales.square())


@dtypes
@pytest.mark.parametrize(
    "kind", [Dense, np.asarray, lambda m: lambda x: m.numpy() @ x], ids=["op", "array", "callable"]
)
def test_a_preconditioner_helps_and_rows_are_judged_without_it(kind: Callable[..., Any], dtype: torch.dtype) -> None:
    matrix, inverse = badly_scaled()
    matrix, inverse, rows = matrix.to(dtype), inverse.to(dtype), randn(K, D).to(dtype)
    _, plain = quiet(Dense(matrix), rows, rtol=1e-4)
    x, report = minres(Dense(matrix), rows, rtol=1e-4, M=kind(inverse), history=True)
    assert report.converged.all()
    assert (report.iterations < 0.5 * plain.iterations).all()
    rounding = tolerance(dtype, operations=D, condition=4.0)
    assert (true_residuals(matrix, x, rows) <= 1e-4 + rounding).all()
    assert report.history is not None
    for i, steps in enumerate(report.iterations.tolist()):  # not a step too late, by the norm of r itself
        assert (report.history[:steps, i] > 1e-4).all()


def test_the_residual_that_is_watched_is_the_true_one_with_a_preconditioner_too() -> None:
    matrix, inverse = badly_scaled()
    rows = randn(K, D)
    for M in (None, inverse):
        for steps in (1, 2, 5, 8):
            x, report = quiet(matrix, rows, rtol=0.0, maxiter=steps, M=M, history=True)
            assert report.history is not None
            expected = true_residuals(matrix, x, rows)
            assert_close(report.history[-1], expected, operations=steps * D, condition=4.0, scale=float(expected.max()))


def test_an_exact_preconditioner_takes_two_iterations() -> None:
    """M = |A|⁻¹: M A has the eigenvalues 1 and -1."""
    matrix = indefinite(D)
    values, vectors = torch.linalg.eigh(matrix)
    M = vectors / values.abs() @ vectors.mT
    _, report = minres(matrix, randn(K, D), M=0.5 * (M + M.mT))
    assert report.iterations.tolist() == [2] * K
    assert_close(torch.tensor(report.eigenvalues), torch.tensor([-1.0, 1.0]), operations=D, condition=CONDITION)


def test_a_preconditioner_that_turns_out_indefinite_on_the_way_is_refused() -> None:
    M = torch.eye(D, dtype=torch.float64)
    M[0, 0] = -1.0
    rows = randn(1, D)
    rows[0, 0] = 0.1  # r'Mr > 0 at first
    with pytest.raises(ValueError, match=r"^M: expected a symmetric positive definite preconditioner"):
        minres(positive_definite(D), rows, M=M, rtol=1e-12)


def test_an_identity_that_returns_what_it_is_given() -> None:
    matrix, rows = positive_definite(D), randn(K, D)

    class Identity(LinearOperator):
        size, dtype, device = D, torch.float64, torch.device("cpu")

        def product(self, rows: Tensor) -> Tensor:
            return rows

    x, report = minres(matrix, rows, M=Identity(), rtol=1e-10)
    assert report.converged.all()
    assert_solved_to(x, solution(matrix, rows), 1e-10)


# -- singular matrices ------------------------------------------------------------------------------------------------


def singular(nullity: int, d: int = D, condition: float = 4.0, sign: float = -1.0) -> Tensor:
    values = eigenvalues(d - nullity, condition)
    return matrix_with(torch.cat([values if sign < 0 else values.abs(), torch.zeros(nullity, dtype=torch.float64)]))


def least_residuals(matrix: Tensor, rows: Tensor) -> Tensor:
    """Relative, by a dense least-squares solve in float64, singular values below rounding being zero."""
    A, B = matrix.double(), rows.double()
    x = torch.linalg.lstsq(A, B.mT, rcond=D * torch.finfo(matrix.dtype).eps, driver="gelsd").solution
    return (B.mT - A @ x).norm(dim=0) / B.norm(dim=1)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("nullity", [1, 4, D // 2])
def test_a_singular_and_consistent_system_gives_the_shortest_solution(nullity: int, sign: float) -> None:
    matrix = singular(nullity, sign=sign)
    wanted = randn(K, D) @ matrix
    x, report = minres(matrix, wanted @ matrix, rtol=1e-12)
    assert report.converged.all()
    assert_solved_to(x, wanted, 1e-12, 4.0)


def numbers(message: Any) -> tuple[float, float]:
    """The residual that the warning names, and what it says that no x leaves less than."""
    found = re.search(r"relative residual is (\S+), and no x leaves less than (\S+);", str(message))
    assert found is not None
    return float(found[1]), float(found[2])


@dtypes
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("nullity", "d", "condition"), [(1, D, 4.0), (4, D, 4.0), (4, D, 30.0), (20, 100, 4.0)])
@pytest.mark.parametrize("share", [1.0, 0.01], ids=["much", "little"])
def test_a_singular_and_inconsistent_system_ends_at_least_squares_and_says_so(
    dtype: torch.dtype, nullity: int, d: int, condition: float, sign: float, share: float
) -> None:
    matrix = singular(nullity, d, condition, sign).to(dtype)
    rows = share * randn(K, d) + randn(K, d) @ matrix.double()
    rows = rows.to(dtype)
    words = (
        rf"singular, to the rounding of {dtype}, and inconsistent for 5 of 5 .* least-squares .*; damping \(damp > 0"
    )
    with pytest.warns(ConvergenceWarning, match=words) as caught:
        x, report = minres(Dense(matrix), rows, rtol=1e-6 if dtype == torch.float32 else 1e-10)
    assert not report.converged.any()
    assert torch.equal(report.negative_curvature, torch.full((K,), sign < 0))  # not where a Ritz value is near zero
    least = least_residuals(matrix, rows)
    assert (least > 1e-4).all()
    # |r|² is the least plus the square of r's part in the range, which is |A⁻¹| |Ar| at most.
    off = 0.5 * (_minres._FLAT * condition) ** 2 * torch.finfo(dtype).eps
    rounding = tolerance(dtype, operations=d, condition=condition) / least.min()
    assert ((report.residual / least - 1).abs() <= off + rounding).all()
    assert_close(
        report.residual, true_residuals(matrix, x, rows), operations=d, condition=condition, scale=1.0, inherent=off
    )
    worst = report.residual.argmax()
    for number, expected in zip(numbers(caught[-1].message), (report.residual[worst], least[worst]), strict=True):
        assert abs(number / expected - 1) <= 5e-3 + off + rounding  # three digits are written
    assert report.iterations.max() <= 2 * d
    assert report.products <= 3 * (report.iterations.max() + 1)


def test_with_a_preconditioner_it_is_least_in_its_norm() -> None:
    """That is where A M r = 0."""
    matrix, M = singular(4), torch.diag(torch.linspace(0.5, 2.0, D, dtype=torch.float64))
    rows = randn(K, D)
    with pytest.warns(ConvergenceWarning, match="inconsistent for 5 of 5 .* least-squares") as caught:
        x, report = minres(matrix, rows, M=M)
    least = least_residuals(matrix, rows)
    assert (report.residual > 1.001 * least).all()
    residual, bound = numbers(caught[-1].message)
    assert abs(residual / report.residual.max() - 1) <= 5e-3
    assert 0.5 * residual < bound <= 1.005 * least[report.residual.argmax()]
    r = rows - x @ matrix
    allowed = _minres._FLAT * torch.finfo(torch.float64).eps ** 0.5 * 4.0
    assert ((r @ M @ matrix).norm(dim=1) <= allowed * (r @ M).norm(dim=1)).all()


@pytest.mark.parametrize("guess", [False, True])
def test_right_hand_sides_that_are_null_vectors(guess: bool) -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64))
    rows = torch.tensor([[0.0, 0.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0], [3.0, 2.0, 0.0, 0.0]], dtype=torch.float64)
    x0 = torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64) if guess else None
    with pytest.warns(ConvergenceWarning, match="inconsistent for 2 of 3"):
        x, report = minres(matrix, rows, x0=x0)
    expected = torch.tensor([[0.0, 0.0], [1.0, 0.5], [3.0, 1.0]], dtype=torch.float64)
    assert_close(x[:, :2], expected, operations=50, inherent=_minres._FLAT * torch.finfo(torch.float64).eps ** 0.5)
    assert report.converged.tolist() == [False, False, True]
    assert_close(report.residual[:2], torch.tensor([1.0, 0.5**0.5], dtype=torch.float64), operations=10)


@pytest.mark.parametrize("d", [1, 7])
def test_a_matrix_of_zeros(d: int) -> None:
    with pytest.warns(ConvergenceWarning, match="singular, .* inconsistent for 1 of 1"):
        x, report = minres(torch.zeros(d, d), torch.ones(1, d))
    assert not x.any()
    assert report.residual.tolist() == [1.0]


@dtypes
@matrices
@pytest.mark.parametrize("condition", [1e3, 1e4])
def test_a_matrix_that_is_not_singular_is_not_called_so(
    make: Callable[..., Tensor], dtype: torch.dtype, condition: float
) -> None:
    """Most eigenvalues are large, so that r soon lies along the small ones."""
    values = torch.cat([torch.linspace(0.5, 1.0, D - 2, dtype=torch.float64), torch.tensor([1.0, 2.0]) / condition])
    if make is indefinite:
        values[::4] *= -1
        values[-1] *= -1
    rows = randn(K, D).to(dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, report = minres(matrix_with(values).to(dtype), rows)
    assert not any("singular" in str(w.message) for w in caught)
    assert (report.converged | report.precision_limit).all()


def test_what_is_inconsistent_by_no_more_than_rounding_is_the_limit_of_the_arithmetic() -> None:
    matrix = singular(4)
    rows = randn(K, D) @ matrix + 1e-16 * randn(K, D)
    _, report = minres(matrix, rows, rtol=1e-20)
    assert report.precision_limit.all()


def test_damping_makes_it_solvable() -> None:
    matrix, rows = singular(4, sign=1.0), randn(K, D)
    x, report = minres(Dense(matrix).damped(0.1), rows, rtol=1e-10)
    assert report.converged.all()
    assert_solved_to(x, solution(matrix + 0.1 * torch.eye(D, dtype=torch.float64), rows), 1e-10, 11.0)


# -- what goes wrong is said ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [positive_definite, indefinite])
def test_too_few_iterations_warn_with_the_numbers(make: Callable[..., Tensor]) -> None:
    matrix, rows = make(D), randn(K, D)
    words = (
        r"MINRES did not converge for 5 of 5 .*: relative residual .* rtol=1e-08 .* after 3 iterations; raise maxiter"
    )
    with pytest.warns(ConvergenceWarning, match=words):
        x, report = minres(Dense(matrix), rows, rtol=1e-8, maxiter=3)
    assert not (report.converged | report.precision_limit).any()
    assert_close(report.residual, true_residuals(matrix, x, rows), operations=D, scale=1.0)


def test_negative_curvature_is_told_but_no_failure() -> None:
    rows = randn(K, D)
    values = torch.cat([torch.linspace(0.5, 2.0, D - 3), torch.tensor([-0.4, -0.7, -1.1])])
    matrix = matrix_with(values)
    words = (
        r"met negative curvature in 5 of 5 .*smallest eigenvalue is -1\.1 or less\. Scores are those of a saddle point"
    )
    for on_failure in ("warn", "raise"):
        with pytest.warns(NegativeCurvatureWarning, match=words) as caught:
            _, report = minres(matrix, rows, rtol=1e-8, on_failure=on_failure)
        assert len(caught) == 1
        assert "minres" not in str(caught[0].message)
        assert "larger by at least 1.2" in str(caught[0].message)
        assert report.converged.all()
        assert report.negative_curvature.all()
    with pytest.raises(SolveError, match="did not converge") as error:
        minres(matrix, rows, maxiter=2, on_failure="raise")
    assert isinstance(error.value.report, SolveReport)


def test_semidefinite_matrices_have_no_negative_curvature() -> None:
    for dtype in DTYPES:
        matrix = singular(10, sign=1.0).to(dtype)
        rows = randn(K, D).to(dtype) @ matrix
        _, report = minres(matrix, rows, rtol=1e-4)
        assert report.converged.all()
        assert not report.negative_curvature.any()


def test_negative_curvature_is_told_of_the_rows_that_met_it() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, -1e-3], dtype=torch.float64))
    rows = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    with pytest.warns(NegativeCurvatureWarning, match="in 1 of 2"):
        _, report = minres(matrix, rows)
    assert report.negative_curvature.tolist() == [False, True]


@matrices
@pytest.mark.parametrize("d", [40, 120])
def test_float32_at_condition_1e6_is_never_silent(make: Callable[..., Tensor], d: int) -> None:
    matrix, rows = make(d, 1e6).float(), randn(K, d).float()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x, report = minres(Dense(matrix), rows)
    true = true_residuals(matrix, x, rows)
    rounding = tolerance(torch.float32, operations=d) * (1 + x.double().norm(dim=1) / rows.double().norm(dim=1))
    assert ((true - report.residual).abs() <= rounding).all()
    assert not (report.converged & (true > 1e-5 + rounding)).any()
    usable = report.converged | report.precision_limit & (report.residual <= torch.finfo(torch.float32).eps ** 0.5)
    assert any(w.category is ConvergenceWarning for w in caught) == (not usable.all())
    assert (report.residual <= 1.0).all()  # x = 0 leaves no more


@dtypes
@matrices
@pytest.mark.parametrize("condition", [10.0, 1e3, 1e5])
@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-12])
def test_converged_is_only_what_the_true_residual_says(
    make: Callable[..., Tensor], dtype: torch.dtype, condition: float, rtol: float
) -> None:
    matrix, rows = make(D, condition).to(dtype), randn(K, D).to(dtype)
    x, report = quiet(matrix, rows, rtol=rtol)
    true = true_residuals(matrix, x, rows)
    rounding = tolerance(dtype, operations=D) * (1 + x.double().norm(dim=1) / rows.double().norm(dim=1))
    assert (true[report.converged] <= rtol + rounding[report.converged]).all()
    assert ((true - report.residual).abs() <= rounding).all()
    assert torch.equal(report.converged, report.residual <= rtol)
    limit = 64 * torch.finfo(dtype).eps * (1 + x.double().norm(dim=1) / rows.double().norm(dim=1))
    assert (report.residual[report.precision_limit] <= limit[report.precision_limit]).all()


def test_what_rounding_took_from_a_solution_is_made_good_by_starting_again() -> None:
    """The error of x leaves about u κ² of the residual after one start; it ends at about u κ."""
    matrix, rows = indefinite(D, 1e3).float(), randn(K, D).float()
    x, report = quiet(matrix, rows, rtol=1e-12, history=True)
    assert report.precision_limit.all()
    size = 1 + x.double().norm(dim=1) / rows.double().norm(dim=1)
    assert (true_residuals(matrix, x, rows) <= 64 * torch.finfo(torch.float32).eps * size).all()
    assert report.history is not None
    assert (report.history.diff(dim=0) > 0).any(dim=0).all()  # within a start it never grows


@pytest.mark.parametrize("where", ["row", "matrix"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_numbers_that_are_not_finite_are_never_silent(where: str, value: float, preconditioned: bool) -> None:
    matrix, rows = indefinite(D), randn(K, D)
    M = torch.diag(torch.linspace(0.5, 2.0, D, dtype=torch.float64)) if preconditioned else None
    (rows[1] if where == "row" else matrix[4])[3] = value
    with pytest.warns(ConvergenceWarning, match=f"failed for {1 if where == 'row' else 5} of 5 .*not finite"):
        x, report = minres(Dense(matrix), rows, rtol=1e-10, M=M)
    unknown = [1] if where == "row" else list(range(K))
    assert x[unknown].isnan().all()
    assert report.residual[unknown].isnan().all()
    others = [i for i in range(K) if i not in unknown]
    assert report.converged[others].all()
    if others:
        assert_solved_to(x[others], solution(matrix, rows[others]), 1e-10)


@pytest.mark.parametrize("products", [0, 1, 4])
def test_products_that_overflow_on_the_way_are_never_silent(products: int) -> None:
    with pytest.warns(ConvergenceWarning, match="failed for 5 of 5 .*not finite"):
        x, report = minres(OverflowsAfter(positive_definite(D), products), randn(K, D), rtol=1e-10)
    assert not (report.converged | report.precision_limit).any()
    assert x.isnan().all()


# -- the report -------------------------------------------------------------------------------------------------------


@matrices
def test_the_history_falls_and_ends_where_the_report_says(make: Callable[..., Tensor]) -> None:
    matrix, rows = make(D), randn(K, D)
    rows[2] = torch.linalg.eigh(matrix)[1][:, 0]  # leaves early
    _, report = minres(matrix, rows, rtol=1e-6, history=True)
    history = report.history
    assert history is not None
    assert history.shape == (int(report.iterations.max()) + 1, K)
    for i, steps in enumerate(report.iterations.tolist()):
        known = history[: steps + 1, i]
        assert known[0] == 1
        assert (known.diff() <= 0).all()
        assert history[steps + 1 :, i].isnan().all()
        assert_close(known[-1], report.residual[i], operations=D, condition=CONDITION, scale=1.0)
    assert report.iterations[2] == 1
    assert minres(matrix, rows)[1].history is None


@dtypes
@pytest.mark.parametrize("ends", [(-2.0, 3.0), (0.1, 3.0), (-3.0, -0.1)])
def test_ritz_values_are_those_of_the_matrix(ends: tuple[float, float], dtype: torch.dtype) -> None:
    """The ends of the spectrum, far enough from the rest to be found in few steps."""
    inside = torch.linspace(ends[0] + 0.3 * (ends[1] - ends[0]), ends[1] - 0.3 * (ends[1] - ends[0]), D - 2)
    matrix = matrix_with(torch.cat([inside, torch.tensor(ends)])).to(dtype)
    _, report = quiet(matrix, randn(K, D).to(dtype), rtol=0.0, maxiter=D)
    true = torch.linalg.eigvalsh(matrix.double())[[0, -1]]
    found = torch.tensor(report.eigenvalues, dtype=torch.float64)
    rounding = tolerance(dtype, operations=D**1.5)  # of D steps with D terms each
    assert_close(found, true, operations=D, inherent=rounding)


def test_of_many_rows_the_smallest_ritz_value_is_that_of_one_that_met_negative_curvature() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 9.0, -1e-2], dtype=torch.float64))
    rows = torch.rand(100, 5, dtype=torch.float64)
    rows[:99, 4] = 0.0
    rows[99, 3] = 0.0
    _, report = quiet(matrix, rows)
    assert report.negative_curvature.tolist() == [False] * 99 + [True]
    assert_close(torch.tensor(report.eigenvalues), torch.tensor([-1e-2, 9.0]), operations=100, scale=1.0)


def test_ritz_values_of_few_steps_lie_within_the_spectrum() -> None:
    matrix, rows = indefinite(D), randn(K, D)
    true = torch.linalg.eigvalsh(matrix)
    before = (np.inf, -np.inf)
    for steps in (1, 3, 9):
        _, report = quiet(matrix, rows, rtol=0.0, maxiter=steps)
        smallest, largest = report.eigenvalues
        assert true[0] <= smallest <= before[0]
        assert before[1] <= largest <= true[-1]
        before = (smallest, largest)
    quotients = (rows @ matrix * rows).sum(dim=1) / rows.square().sum(dim=1)
    first = torch.tensor(quiet(matrix, rows, rtol=0.0, maxiter=1)[1].eigenvalues, dtype=torch.float64)
    assert_close(first, torch.stack([quotients.min(), quotients.max()]), operations=D, scale=1.0)


def test_eigenvalues_are_unknown_where_no_step_was_taken() -> None:
    _, report = minres(positive_definite(D), torch.zeros(1, D, dtype=torch.float64))
    assert all(value != value for value in report.eigenvalues)


@pytest.mark.parametrize("rtol", [1e-4, 1e-9])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
def test_noticing_one_iteration_late_changes_no_bit(
    rtol: float, preconditioned: bool, diagonal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens on a GPU. 1e-9 is beyond float32: rows start again, and how often depends on when it was looked."""
    matrix, rows = indefinite(40, MILD).float(), randn(6, 40).float()
    if diagonal:
        matrix = eigenvalues(40, MILD).diag().float()
    rows[0], rows[1] = torch.linalg.eigh(matrix)[1][:, 0], 0.0  # its Krylov space ends, here without any rounding

    class RowByRow(Counted):
        """Every row by itself, so that it rounds the same whichever others are still at work."""

        def product(self, rows: Tensor) -> Tensor:
            return torch.stack([row @ self.matrix for row in rows])

    M = RowByRow(torch.diag(torch.linspace(0.5, 2.0, 40))) if preconditioned else None
    punctual, expected = quiet(RowByRow(matrix), rows, rtol=rtol, M=M)

    def some_stopped(self: Any, wait: bool) -> bool:
        now = not bool(self.row.active.all())
        before, self.late = self.late, now
        return now if wait else bool(before)

    monkeypatch.setattr(_minres._State, "some_stopped", some_stopped)
    late, report = quiet(RowByRow(matrix), rows, rtol=rtol, M=M)
    fields = ["converged", "precision_limit", "negative_curvature"]
    if rtol == 1e-4:
        assert torch.equal(late, punctual)
        fields += ["iterations", "residual"]
    for field in fields:
        assert torch.equal(getattr(report, field), getattr(expected, field))


# -- the module -------------------------------------------------------------------------------------------------------


class Flat(problems.Classification):
    l2 = 0.0


DAMP = 1e-3


def saddle_module(**changes: Any) -> InfluenceModule:
    return problems.module(
        InfluenceModule, **({"objective": Flat(), "damp": DAMP, "solver": "minres", "rtol": 1e-10} | changes)
    )


def test_the_module_solves_at_a_saddle_point_and_says_that_it_is_one() -> None:
    model, objective = problems.network(), Flat()
    train, test = problems.loader(), problems.loader(n=7, batch_size=3, seed=3)
    matrix = dense_hessian(model, objective, loader_batches(train))
    matrix = matrix + DAMP * torch.eye(len(matrix), dtype=torch.float64)
    values = torch.linalg.eigvalsh(matrix)
    assert values[0] < -0.01
    condition = float(values.abs().max() / values.abs().min())
    gradients = example_gradients(model, objective, train)
    expected = gradients @ torch.linalg.solve(matrix, query_gradients(model, objective, test).mT) / 23

    it = saddle_module()
    with pytest.warns(NegativeCurvatureWarning, match="MINRES met negative curvature in 7 of 7.* saddle point"):
        scores = it.influence_matrix()
    assert it.last_report is not None
    assert it.last_report.method == "MINRES"
    assert it.last_report.converged.all()
    # Solved to 1e-10 of |b|; |A⁻¹| of that is in s, and condition times it relative to s.
    assert (scores - expected).norm() <= (2e-10 + tolerance(torch.float64, operations=23 * 7)) * condition * (
        gradients.norm() * torch.linalg.solve(matrix, query_gradients(model, objective, test).mT).norm() / 23
    )
    assert it.explain(3)["solver"].path.startswith("MINRES, all rows at once")
    assert not it.explain(3)["solver"].why_not
    with pytest.warns(NegativeCurvatureWarning):
        saddle_module(on_failure="raise").stests()
    with pytest.raises(SolveError, match="MINRES did not converge"):
        saddle_module(on_failure="raise", maxiter=2).stests()


def test_the_module_takes_a_preconditioner() -> None:
    with pytest.warns(NegativeCurvatureWarning):
        expected = saddle_module().stests()
    it = saddle_module(M=Nystrom(5))
    with pytest.warns(NegativeCurvatureWarning):
        found = it.stests()
    assert "preconditioned by Nystrom" in it.explain()["solver"].path
    assert it.last_report is not None
    assert it.last_report.converged.all()
    assert (found - expected).norm() <= 2e-10 * 1e4 * expected.norm()  # the condition is less than that


class Costly(LinearOperator):
    """A matrix of which nothing is known but what it costs."""

    size, dtype, device = 1000, torch.float32, torch.device("cpu")
    operations, operations_of_dense = 1e6, 1e9

    def product(self, rows: Tensor) -> Tensor:
        raise AssertionError("costs are estimated without products")


@pytest.mark.parametrize("k", [1, 100, 1000])
@pytest.mark.parametrize("free", [0.0, 1e9])
def test_auto_never_takes_it(k: int, free: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_influence.memory.free_memory", lambda device: free)
    operator = Costly()
    auto = Auto(rtol=1e-3)
    assert "minres" not in auto.ranked(operator, k)
    assert "minres" not in dict(auto.describe(operator, k).why_not)
    one, other = (solver(rtol=1e-3).cost(operator, k) for solver in (CG, Minres))
    assert one.operations < other.operations < 2 * one.operations
    assert other.nbytes == 6 * k * 1000 * 4
