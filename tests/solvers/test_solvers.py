"""The solvers on matrices, against numpy-free linear algebra and against SciPy's conjugate gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from matrices import Counted, OverflowsAfter, positive_definite, solution, true_residuals
from oracles import assert_close, tolerance, with_spectrum
from torch import Tensor

from torch_influence.linop import Damped, Dense
from torch_influence.solvers import (
    ConvergenceWarning,
    Factor,
    NegativeCurvatureWarning,
    SolveError,
    block_cg,
    cg,
    norms,
)

pytestmark = pytest.mark.filterwarnings("error")

D, K = 30, 5
CONDITION = 100.0
MILD = 9.0  # converges in far fewer than D iterations, where two ways to round don't yet part
DTYPES = [torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# -- conjugate gradients: solutions -----------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("k", [1, K])
def test_cg_solves(dtype: torch.dtype, k: int) -> None:
    matrix, rows = positive_definite(D).to(dtype), torch.randn(k, D).to(dtype)
    x, report = cg(Dense(matrix), rows, rtol=tolerance(dtype, operations=D))
    assert_close(x, solution(matrix, rows), operations=D, condition=CONDITION)
    assert x.dtype == dtype
    assert (report.converged | report.precision_limit).all()


@dtypes
def test_the_residual_of_the_report_is_the_true_one(dtype: torch.dtype) -> None:
    matrix, rows = positive_definite(D).to(dtype), torch.randn(K, D).to(dtype)
    x, report = cg(Dense(matrix), rows, rtol=1e-3)
    assert report.converged.all()
    assert (report.residual <= 1e-3).all()
    rounding = tolerance(dtype, operations=D, condition=CONDITION)
    assert_close(report.residual, true_residuals(matrix, x, rows), operations=D, scale=1.0, inherent=rounding)


def test_cg_is_linear() -> None:
    operator, rows = Dense(positive_definite(D)), torch.randn(2, D, dtype=torch.float64)
    both, _ = cg(operator, torch.cat([rows, 3.0 * rows[:1] - rows[1:]]), rtol=1e-14)
    assert_close(both[2], 3.0 * both[0] - both[1], operations=D, condition=CONDITION, scale=float(both.abs().max()))


def test_the_inverse_by_cg_is_symmetric() -> None:
    inverse, _ = cg(Dense(positive_definite(D)), torch.eye(D, dtype=torch.float64), rtol=1e-14)
    assert_close(inverse, inverse.mT, operations=D, condition=CONDITION)


@dtypes
def test_rows_of_very_different_scale_are_each_solved_to_their_own_size(dtype: torch.dtype) -> None:
    matrix = positive_definite(D).to(dtype)
    scales = torch.tensor([1e-30, 1e-12, 1.0, 1e12, 1e30], dtype=dtype)
    rows = torch.randn(1, D).to(dtype) * scales[:, None]
    rtol = 1e-4
    x, report = cg(Dense(matrix), rows, rtol=rtol)
    assert report.converged.all()
    expected = solution(matrix, rows[2:3])[0]
    for row, size in zip(x, scales, strict=True):
        assert_close(row / size, expected, operations=D, condition=CONDITION, inherent=rtol * CONDITION)


def test_zero_rows_give_zero_without_work() -> None:
    operator = Counted(positive_definite(D))
    x, report = cg(operator, torch.zeros(K, D, dtype=torch.float64))
    assert torch.equal(x, torch.zeros_like(x))
    assert operator.rows == []
    assert report.converged.all()
    assert report.products == 0


def test_a_zero_row_among_others_does_not_disturb_them() -> None:
    matrix, rows = positive_definite(D), torch.randn(K, D, dtype=torch.float64)
    rows[2] = 0.0
    x, report = cg(Dense(matrix), rows, rtol=1e-13)
    assert_close(x, solution(matrix, rows), operations=D, condition=CONDITION)
    assert torch.equal(x[2], torch.zeros(D, dtype=torch.float64))
    assert report.iterations[2] == 0
    assert report.residual[2] == 0


def test_no_rows() -> None:
    x, report = cg(Dense(positive_definite(D)), torch.empty(0, D, dtype=torch.float64))
    assert x.shape == (0, D)
    assert "no right-hand sides" in str(report)


def test_duplicated_rows_have_one_solution() -> None:
    matrix, rows = positive_definite(D), torch.randn(1, D, dtype=torch.float64).repeat(3, 1)
    x, _ = cg(Dense(matrix), rows, rtol=1e-13)
    assert_close(x, solution(matrix, rows), operations=D, condition=CONDITION)


def test_the_identity_takes_one_iteration() -> None:
    rows = torch.randn(K, D, dtype=torch.float64)
    x, report = cg(Dense(torch.eye(D, dtype=torch.float64)), rows)
    assert_close(x, rows, operations=D)
    assert report.iterations.tolist() == [1] * K


def test_a_matrix_of_one_entry() -> None:
    x, _ = cg(Dense(torch.tensor([[4.0]], dtype=torch.float64)), torch.tensor([[2.0], [-8.0]], dtype=torch.float64))
    assert_close(x, torch.tensor([[0.5], [-2.0]], dtype=torch.float64), operations=1)


def test_damping_is_part_of_the_operator() -> None:
    matrix, rows = positive_definite(D), torch.randn(K, D, dtype=torch.float64)
    damped = Dense(matrix).damped(0.7)
    assert isinstance(damped, Damped)
    expected = solution(matrix + 0.7 * torch.eye(D, dtype=torch.float64), rows)
    assert_close(cg(damped, rows, rtol=1e-14)[0], expected, operations=D, condition=CONDITION)


def test_rows_that_are_done_are_not_multiplied_any_more() -> None:
    matrix = torch.diag(torch.cat([torch.ones(D // 2), torch.linspace(1, 50, D // 2)]).double())
    rows = torch.zeros(2, D, dtype=torch.float64)
    rows[0, 0], rows[1] = 1.0, 1.0  # an eigenvector, and a row that needs many iterations
    operator = Counted(matrix)
    _, report = cg(operator, rows, rtol=1e-10)
    assert report.iterations[0] == 1
    assert report.iterations[1] > 5
    assert sum(operator.rows) < 2 * len(operator.rows)
    assert report.products == len(operator.rows)


# -- conjugate gradients: SciPy's conventions -------------------------------------------------------------------------


def scipy_cg(matrix: Tensor, row: Tensor, **options: Any) -> tuple[np.ndarray, int]:
    """SciPy's solution and its number of iterations."""
    steps: list[np.ndarray] = []
    x, _ = scipy.sparse.linalg.cg(matrix.numpy(), row.numpy(), callback=lambda xk: steps.append(xk.copy()), **options)
    return x, len(steps)


LIKE_SCIPY: dict[str, dict[str, Any]] = {
    "defaults": {},
    "loose": {"rtol": 1e-3},
    "tight": {"rtol": 1e-10},
    "atol alone": {"rtol": 0.0, "atol": 1e-4},
    "atol above rtol": {"rtol": 1e-3, "atol": 1e-1},
    "maxiter": {"maxiter": 4},
    "x0": {"x0": np.linspace(-1, 1, D)},
    "M": {"M": np.diag(np.linspace(0.9, 1.1, D))},
    "x0, M and rtol": {"x0": np.linspace(-1, 1, D), "M": np.diag(np.linspace(0.9, 1.1, D)), "rtol": 1e-8},
}


@pytest.mark.parametrize("options", LIKE_SCIPY.values(), ids=LIKE_SCIPY)
def test_iterations_and_iterates_are_those_of_scipy(options: dict[str, Any]) -> None:
    matrix, rows = positive_definite(D, MILD), torch.randn(K, D, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        x, report = cg(Dense(matrix), rows, **options)
    for row, mine, count in zip(rows, x, report.iterations, strict=True):
        theirs, steps = scipy_cg(matrix, row, **options)
        assert int(count) == steps
        assert_close(mine, torch.from_numpy(theirs), operations=D * steps, condition=MILD)


def test_the_callback_gets_every_iterate_as_scipy_does() -> None:
    matrix, row = positive_definite(D, MILD), torch.randn(1, D, dtype=torch.float64)
    mine: list[np.ndarray] = []
    theirs: list[np.ndarray] = []
    cg(Dense(matrix), row, rtol=1e-8, callback=lambda xk: mine.append(xk.copy()))
    scipy.sparse.linalg.cg(matrix.numpy(), row[0].numpy(), rtol=1e-8, callback=lambda xk: theirs.append(xk.copy()))
    assert [xk.shape for xk in mine] == [(D,)] * len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert_close(torch.from_numpy(a), torch.from_numpy(b), operations=D * len(theirs), condition=MILD)


def test_the_callback_is_called_once_per_iteration_of_each_row() -> None:
    calls: list[np.ndarray] = []
    _, report = cg(Dense(positive_definite(D)), torch.randn(K, D, dtype=torch.float64), callback=calls.append)
    assert len(calls) == int(report.iterations.sum())
    assert all(isinstance(xk, np.ndarray) for xk in calls)


@pytest.mark.parametrize("solver", [cg, block_cg])
def test_a_zero_row_is_solved_by_zero_whatever_the_first_guess(solver: Callable[..., Any]) -> None:
    rows = torch.randn(K, D, dtype=torch.float64)
    rows[1] = 0.0
    x, report = solver(positive_definite(D), rows, x0=torch.ones(D))
    assert torch.equal(x[1], rows[1])
    assert report.converged.all()
    assert int(report.iterations[1]) == 0


def test_a_first_guess_that_solves_takes_no_iteration() -> None:
    matrix, rows = positive_definite(D), torch.randn(K, D, dtype=torch.float64)
    exact = solution(matrix, rows)
    x, report = cg(Dense(matrix), rows, x0=exact)
    assert torch.equal(x, exact)
    assert report.iterations.tolist() == [0] * K
    assert report.converged.all()


@pytest.mark.parametrize("as_given", [np.asarray, torch.as_tensor], ids=["ndarray", "tensor"])
def test_one_first_guess_serves_all_rows_and_is_not_written_to(as_given: Callable[[Tensor], Any]) -> None:
    matrix, rows = positive_definite(D), torch.randn(K, D, dtype=torch.float64)
    guess = torch.randn(D, dtype=torch.float64)
    before = guess.clone()
    x, _ = cg(Dense(matrix), rows, rtol=1e-14, x0=as_given(guess))
    assert_close(x, solution(matrix, rows), operations=D, condition=CONDITION)
    assert torch.equal(guess, before)


def inverse_diagonal(matrix: Tensor) -> Tensor:
    return torch.diag(1.0 / matrix.diagonal())


class TimesArray:
    """Anything with a matvec."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix

    def matvec(self, x: np.ndarray) -> np.ndarray:
        return self.matrix @ x


PRECONDITIONERS: dict[str, Callable[[Tensor], Any]] = {
    "ndarray": lambda m: m.numpy(),
    "tensor": lambda m: m,
    "scipy sparse matrix": lambda m: scipy.sparse.csr_matrix(m.numpy()),
    "scipy sparse array": lambda m: scipy.sparse.csr_array(m.numpy()),
    "scipy LinearOperator": lambda m: scipy.sparse.linalg.aslinearoperator(m.numpy()),
    "an object with matvec": lambda m: TimesArray(m.numpy()),
    "callable": lambda m: lambda x: m.numpy() @ x,
    "LinearOperator": Dense,
}


@pytest.mark.parametrize("kind", PRECONDITIONERS)
@dtypes
def test_preconditioners_of_every_kind_act_alike(kind: str, dtype: torch.dtype) -> None:
    scales = torch.logspace(0, 3, D, dtype=torch.float64)
    matrix = (positive_definite(D, 4.0) * scales.sqrt()[:, None] * scales.sqrt()).to(dtype)
    preconditioner = inverse_diagonal(matrix)
    rows = torch.randn(K, D).to(dtype)
    plain = cg(Dense(matrix), rows, rtol=1e-4)[1]
    x, report = cg(Dense(matrix), rows, rtol=1e-4, M=PRECONDITIONERS[kind](preconditioner))
    assert report.converged.all()
    assert (report.iterations < 0.5 * plain.iterations).all()
    for row, count in zip(rows.double(), report.iterations, strict=True):
        steps = scipy_cg(matrix.double(), row, rtol=1e-4, M=preconditioner.double().numpy())[1]
        assert abs(int(count) - steps) <= (0 if dtype == torch.float64 else 1)
    assert (true_residuals(matrix, x, rows) <= 1e-4 + tolerance(dtype, operations=D)).all()


@pytest.mark.parametrize("kind", ["ndarray", "callable", "LinearOperator"])
def test_an_exact_preconditioner_takes_one_iteration(kind: str) -> None:
    matrix = positive_definite(D)
    inverse = torch.linalg.inv(matrix)
    inverse = 0.5 * (inverse + inverse.mT)
    _, report = cg(Dense(matrix), torch.randn(K, D, dtype=torch.float64), M=PRECONDITIONERS[kind](inverse))
    assert report.iterations.tolist() == [1] * K


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x0": np.zeros(D + 1)}, "x0: expected shape"),
        ({"M": np.zeros((D, D + 1))}, "M: expected shape"),
        ({"M": scipy.sparse.eye(D + 1)}, "M: expected shape"),
        ({"maxiter": 0}, "maxiter: expected at least 1"),
        ({"rtol": -1.0}, "rtol, atol: expected tolerances >= 0"),
        ({"atol": -1.0}, "rtol, atol: expected tolerances >= 0"),
    ],
    ids=["x0", "M array", "M sparse", "maxiter", "rtol", "atol"],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cg(Dense(positive_definite(D)), torch.ones(1, D, dtype=torch.float64), **options)


def test_a_preconditioner_that_is_none() -> None:
    with pytest.raises(TypeError, match="M: expected an array"):
        cg(Dense(positive_definite(D)), torch.ones(1, D, dtype=torch.float64), M=3.0)


# -- conjugate gradients: what goes wrong is said ---------------------------------------------------------------------


def test_too_few_iterations_warn_with_the_numbers() -> None:
    matrix, rows = positive_definite(D), torch.randn(K, D, dtype=torch.float64)
    words = r"did not converge for 5 of 5 right-hand sides: relative residual .* rtol=1e-08 .* after 3 iterations"
    with pytest.warns(ConvergenceWarning, match=words) as caught:
        x, report = cg(Dense(matrix), rows, rtol=1e-8, maxiter=3)
    assert "raise maxiter" in str(caught[0].message)
    assert not report.converged.any()
    assert_close(report.residual, true_residuals(matrix, x, rows), operations=D, scale=1.0)


@pytest.mark.parametrize("d", [40, 200])
@pytest.mark.parametrize("condition", [1e3, 1e6])
def test_what_float32_cannot_resolve_is_reported_and_not_iterated_on(d: int, condition: float) -> None:
    eigenvalues = torch.cat([torch.linspace(0.5, 1.0, d - 2), torch.tensor([2.0, 1.0]) / condition])
    matrix, rows = with_spectrum(eigenvalues).float(), torch.randn(K, d)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x, report = cg(Dense(matrix), rows, rtol=1e-9)
    assert report.precision_limit.all()
    assert not report.converged.any()
    assert (report.iterations < 5 * d).all()  # 10 d is where it would give up
    sizes = (x.double().norm(dim=1) / rows.double().norm(dim=1)).max()
    reachable = tolerance(torch.float32, operations=d) * float(1.0 + sizes)
    assert (true_residuals(matrix, x, rows) <= reachable).all()
    few_digits = bool((report.residual > torch.finfo(torch.float32).eps ** 0.5).any())
    assert [w.category for w in caught] == [ConvergenceWarning] * few_digits
    assert few_digits == (condition == 1e6)


@pytest.mark.parametrize("where", ["row", "matrix"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_never_silent(where: str, value: float) -> None:
    matrix, rows = positive_definite(D), torch.randn(K, D, dtype=torch.float64)
    if where == "row":
        rows[1, 3] = value
    else:
        matrix[4, 4] = value
    with pytest.warns(ConvergenceWarning):
        x, report = cg(Dense(matrix), rows, rtol=1e-10)
    assert not report.converged[1]
    if where == "row":
        others = [0, 2, 3, 4]
        assert report.converged[others].all()
        assert_close(x[others], solution(matrix, rows[others]), operations=D * 100, condition=CONDITION**2)


@pytest.mark.parametrize("products", [0, 1, 4])
def test_products_that_overflow_on_the_way_are_never_silent(products: int) -> None:
    rows = torch.randn(K, D, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning):
        _, report = cg(OverflowsAfter(positive_definite(D), products), rows, rtol=1e-10)
    assert not (report.converged | report.precision_limit).any()


def indefinite() -> Tensor:
    return with_spectrum(torch.cat([torch.linspace(0.5, 2.0, D - 3), torch.tensor([-0.4, -0.7, -1.1])]))


def test_an_indefinite_matrix_is_flagged_and_judged_by_the_true_residual() -> None:
    matrix, rows = indefinite(), torch.randn(K, D, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x, report = cg(Dense(matrix), rows, rtol=1e-8)
    assert report.negative_curvature.all()
    assert torch.equal(report.converged, true_residuals(matrix, x, rows) <= 1e-8)
    solved = report.converged
    condition = float(torch.linalg.cond(matrix))
    expected = solution(matrix, rows)[solved]
    assert_close(x[solved], expected, operations=1e-8 / tolerance(torch.float64), condition=condition)


def test_negative_curvature_is_in_the_warning() -> None:
    rows = torch.randn(K, D, dtype=torch.float64)
    with (
        pytest.warns(NegativeCurvatureWarning, match="damping larger by at least 1.2"),
        pytest.warns(ConvergenceWarning, match="raise damp"),
    ):
        cg(Dense(indefinite()), rows, rtol=1e-8, maxiter=D // 2)


def test_a_negative_definite_matrix_is_solved_and_flagged() -> None:
    matrix, rows = -positive_definite(D), torch.randn(K, D, dtype=torch.float64)
    with pytest.warns(NegativeCurvatureWarning, match=r"eigenvalue is -1 or less"):
        x, report = cg(Dense(matrix), rows, rtol=1e-13)
    assert report.negative_curvature.all()
    assert_close(x, solution(matrix, rows), operations=D, condition=CONDITION)


def test_a_singular_matrix_with_a_consistent_right_hand_side_gives_the_least_norm_solution() -> None:
    matrix = with_spectrum(torch.cat([torch.linspace(0.5, 2.0, D - 4), torch.zeros(4)]))
    wanted = torch.randn(K, D, dtype=torch.float64) @ matrix
    x, report = cg(Dense(matrix), wanted @ matrix, rtol=1e-12)
    assert report.converged.all()
    assert_close(x, wanted, operations=1e-12 / tolerance(torch.float64), condition=4.0)


@dtypes
@pytest.mark.parametrize("seed", range(8))
def test_a_singular_matrix_with_an_inconsistent_right_hand_side_is_never_silent(dtype: torch.dtype, seed: int) -> None:
    """Rounding makes x so large that |A||x| rounds off more than b: that alone must not pass for a solution."""
    torch.manual_seed(seed)
    matrix = with_spectrum(torch.cat([torch.linspace(0.5, 2.0, D - 4), torch.zeros(4)])).to(dtype)
    with pytest.warns(ConvergenceWarning, match="for 5 of 5"):
        _, report = cg(Dense(matrix), torch.randn(K, D).to(dtype), rtol=1e-5)
    assert not report.converged.any()
    assert not report.precision_limit[report.residual > 1].any()


@pytest.mark.parametrize("words", ["conjugate gradients: 5 of 5 converged", "iterations", "largest relative residual"])
def test_the_report_in_words(words: str) -> None:
    _, report = cg(Dense(positive_definite(D)), torch.randn(K, D, dtype=torch.float64))
    assert words in str(report)


# -- direct -----------------------------------------------------------------------------------------------------------


@dtypes
def test_cholesky(dtype: torch.dtype) -> None:
    matrix, rows = positive_definite(D).to(dtype), torch.randn(K, D).to(dtype)
    factor = Factor(matrix)
    x, report = factor.solve(rows)
    assert factor.definite
    assert report.method == "Cholesky"
    assert_close(x, solution(matrix, rows), operations=D, condition=CONDITION)
    rounding = tolerance(dtype, operations=D, condition=CONDITION)
    assert_close(report.residual, true_residuals(matrix, x, rows), operations=D, scale=1.0, inherent=rounding)
    inverse = factor.inverse()
    assert_close(inverse, torch.linalg.inv(matrix.double()), operations=D, condition=CONDITION)
    assert_close(inverse, inverse.mT, operations=D, condition=CONDITION)


def test_an_indefinite_matrix_is_solved_by_lu_with_the_eigenvalue_in_the_warning() -> None:
    matrix, rows = indefinite(), torch.randn(K, D, dtype=torch.float64)
    with pytest.warns(NegativeCurvatureWarning, match=r"smallest eigenvalue -1\.1\b"):
        factor = Factor(matrix)
    x, report = factor.solve(rows)
    assert not factor.definite
    assert report.method == "LU"
    assert report.negative_curvature.all()
    condition = float(torch.linalg.cond(matrix))
    assert_close(x, solution(matrix, rows), operations=D, condition=condition)
    assert_close(factor.inverse(), torch.linalg.inv(matrix), operations=D, condition=condition)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_that_is_singular_by_rounding_is_not_said_to_be_indefinite(dtype: torch.dtype) -> None:
    """Of a softmax layer, say, whose classes' weights may all be shifted."""
    eps = torch.finfo(dtype).eps
    matrix = with_spectrum(torch.cat([torch.linspace(0.5, 2.0, D - 1), torch.tensor([-4.0 * eps])])).to(dtype)
    b = (matrix @ torch.randn(D, K, dtype=dtype)).mT  # in its range, to rounding
    with pytest.warns(ConvergenceWarning, match=f"curvature is singular, to the rounding of {dtype}.*raise damp") as w:
        factor = Factor(matrix)
    assert not any(issubclass(one.category, NegativeCurvatureWarning) for one in w)
    assert not factor.definite
    assert not factor.indefinite
    _, report = factor.solve(b)
    assert not report.negative_curvature.any()
    with pytest.raises(SolveError, match="singular, to the rounding"):
        Factor(matrix, on_failure="raise")


@pytest.mark.parametrize("solve", [cg, block_cg])
def test_iterations_say_that_the_matrix_is_singular_where_nothing_solves_it(solve: Any) -> None:
    matrix = with_spectrum(torch.cat([torch.linspace(0.5, 2.0, D - 1), torch.zeros(1)]))
    with pytest.warns(ConvergenceWarning, match="the matrix is singular, to the rounding of torch.float64: raise damp"):
        solve(Dense(matrix), torch.randn(K, D, dtype=torch.float64), rtol=1e-8)


def test_a_singular_matrix_is_an_error_that_says_damp() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    with pytest.raises(torch.linalg.LinAlgError, match=r"singular .*damp > 0"):
        Factor(matrix)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_never_silent(value: float) -> None:
    matrix = positive_definite(D)
    matrix[3, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        Factor(matrix)


def test_a_row_that_is_done_is_in_no_product_but_that_of_its_own_residual() -> None:
    operator = Counted(torch.diag(torch.cat([torch.ones(D // 2), torch.linspace(1, 50, D // 2)]).double()))
    rows = torch.zeros(2, D, dtype=torch.float64)
    rows[0, 0], rows[1] = 1.0, 1.0  # an eigenvector, and a row that needs many iterations
    _, report = cg(operator, rows, rtol=1e-10)
    assert operator.rows == [2] + [1] * (int(report.iterations[1]) + 1)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-30), (torch.float32, 1e30), (torch.float64, 1e-200)])
def test_norms_of_rows_whose_squares_leave_the_dtype(dtype: torch.dtype, size: float) -> None:
    rows = torch.full((2, 4), size, dtype=dtype)
    assert norms(rows).dtype == torch.float64
    assert norms(rows).tolist() == pytest.approx([2 * size] * 2, rel=1e-6, abs=0.0)
