"""Block conjugate gradients on matrices, against dense float64 solves and against row-wise conjugate gradients."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from matrices import Counted, positive_definite, solution, true_residuals
from oracles import assert_close, tolerance, with_spectrum
from torch import Tensor

from torch_influence.linop import Dense
from torch_influence.solvers import (
    BlockCG,
    ConvergenceWarning,
    Jacobi,
    NegativeCurvatureWarning,
    Nystrom,
    block_cg,
    cg,
)
from torch_influence.solvers._block import Block

pytestmark = pytest.mark.filterwarnings("error")

D, K = 60, 5
CONDITION = 100.0
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


class Spoiled(Counted):
    """Notes the sizes of the rows, too; may spoil products from one of them on."""

    def __init__(self, matrix: Tensor, spoiled_from: int | None = None, noise: float = torch.inf) -> None:
        super().__init__(matrix)
        self.sizes: list[float] = []
        self.spoiled_from, self.noise = spoiled_from, noise

    def product(self, rows: Tensor) -> Tensor:
        self.sizes.extend(rows.double().norm(dim=1).tolist())
        product = super().product(rows)
        if self.spoiled_from is not None and len(self.rows) > self.spoiled_from:
            product += self.noise * torch.randn_like(product)
        return product


def assert_solved(matrix: Tensor, x: Tensor, rows: Tensor, rtol: float) -> None:
    """Each row by its own size: |x - A⁻¹b| <= cond(A) (residual asked for + rounding) |A⁻¹b|."""
    expected = solution(matrix, rows)
    condition = float(torch.linalg.cond(matrix.double()))
    error = (x.double() - expected).norm(dim=1)
    allowed = condition * (rtol + tolerance(x.dtype, operations=matrix.shape[0])) * expected.norm(dim=1)
    assert (error <= allowed).all(), f"{error / expected.norm(dim=1)}"


# -- right-hand sides that a block can't take as they are -------------------------------------------------------------


def ordinary() -> Tensor:
    return torch.randn(K, D, dtype=torch.float64)


def with_zeros() -> Tensor:
    return torch.cat([ordinary(), torch.zeros(2, D)])


def duplicated() -> Tensor:
    return ordinary().repeat(3, 1)


def multiples() -> Tensor:
    return torch.cat([ordinary(), 0.3 * ordinary()[:1]]).repeat(2, 1) * torch.linspace(-3.1, 7.3, 2 * K + 2)[:, None]


def combinations() -> Tensor:
    return torch.randn(4 * K, K, dtype=torch.float64) @ ordinary()


def nearly_dependent() -> Tensor:
    """Apart by 1e-1 to 1e-9 of their size: partly above, partly below what a Gram matrix tells apart."""
    return ordinary()[:1] + torch.logspace(-1, -9, K, dtype=torch.float64)[:, None] * ordinary()


def badly_scaled() -> Tensor:
    return ordinary() * torch.tensor([1e-36, 1e-20, 1.0, 1e20, 1e35], dtype=torch.float64)[:, None]


def badly_scaled_and_dependent() -> Tensor:
    return torch.cat([badly_scaled(), 1e20 * combinations()[:2], 1e-20 * duplicated()[:1], torch.zeros(1, D)])


def more_than_parameters() -> Tensor:
    return torch.randn(2 * D + 1, D, dtype=torch.float64)


def one() -> Tensor:
    return ordinary()[:1]


RIGHT_HAND_SIDES = [
    ordinary,
    with_zeros,
    duplicated,
    multiples,
    combinations,
    nearly_dependent,
    badly_scaled,
    badly_scaled_and_dependent,
    more_than_parameters,
    one,
]


@dtypes
@pytest.mark.parametrize("make", RIGHT_HAND_SIDES, ids=lambda make: make.__name__)
def test_every_right_hand_side_is_solved_to_its_own_size(make: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    matrix, rows = positive_definite(D).to(dtype), make().to(dtype)
    rtol = 1e-3 if dtype == torch.float32 else 1e-12
    before = rows.clone()
    operator = Spoiled(matrix)
    x, report = block_cg(operator, rows, rtol=rtol)
    assert torch.equal(rows, before)
    assert x.dtype == dtype
    assert report.converged.all()
    assert report.method == "block conjugate gradients"  # without help from row-wise iterations
    assert_solved(matrix, x, rows, rtol)
    assert not x[(rows == 0).all(dim=1)].any()
    assert report.products == len(operator.rows)
    some = rows.any(dim=1)
    rounding = tolerance(dtype, operations=D, condition=CONDITION)
    residuals = true_residuals(matrix, x[some], rows[some])
    assert_close(report.residual[some], residuals, operations=D, scale=1.0, inherent=rounding)


def test_the_operator_sees_rows_of_one_size() -> None:
    """A network's product could overflow or vanish at theirs."""
    operator = Spoiled(positive_definite(D))
    block_cg(operator, badly_scaled(), rtol=1e-6)
    assert min(operator.sizes) >= 0.5 / 2  # |A| = 1, so |x| >= |b| up to the residual; b has a size from 0.5 to 1
    assert max(operator.sizes) <= 2 * CONDITION


@dtypes
def test_dependent_directions_are_multiplied_only_once(dtype: torch.dtype) -> None:
    operator = Spoiled(positive_definite(D).to(dtype))
    block_cg(operator, combinations().to(dtype), rtol=1e-3)
    assert max(operator.rows[:-1]) == K
    assert operator.rows[-1] == 4 * K  # the true residuals


def test_the_block_shrinks_when_rows_are_done() -> None:
    operator = Spoiled(positive_definite(D))
    eigenvector = torch.linalg.eigh(operator.matrix).eigenvectors.mT[:1]
    _, report = block_cg(operator, torch.cat([eigenvector, ordinary()]), rtol=1e-10)
    assert report.converged.all()
    assert report.iterations[0] == 1
    assert operator.rows[:2] == [K + 1, K]


@pytest.mark.parametrize("gap", [1.0, 1e-2, 1e-5])
def test_rows_close_to_each_other_in_float32_give_an_orthonormal_basis(gap: float) -> None:
    """At a condition number of 1e5 a Gram matrix in float32 has no digits left, and one pass leaves two of them."""
    rows = (ordinary()[:1] + gap * ordinary()).float()
    block = Block(Dense(positive_definite(D).float()), rows, None, (1e-4, 0.0, 0.0), False)
    assert block.q.shape == rows.shape
    half_of_the_digits = torch.finfo(torch.float32).eps ** 0.5
    identity = torch.eye(K, dtype=torch.float64)
    assert_close(block.q.double() @ block.q.double().mT, identity, operations=D, inherent=half_of_the_digits)
    scaled = rows.double() / block.unit.double()
    # Each coefficient has passed two products with d or m terms in float32.
    assert_close((block.coefficients @ block.q.double()).float(), scaled, operations=2 * K)


@pytest.mark.parametrize("k", [2, 5, 12])
def test_without_rounding_the_block_ends_after_d_over_k_iterations(k: int) -> None:
    matrix = positive_definite(D, 9.0)
    _, report = block_cg(Dense(matrix), torch.randn(k, D, dtype=torch.float64), rtol=1e-8)
    assert report.converged.all()
    assert int(report.iterations.max()) <= D // k
    assert report.products == int(report.iterations.max()) + 1


def test_fewer_products_than_row_wise_with_the_same_residuals() -> None:
    matrix = positive_definite(d=300, condition=1e4)
    rows = torch.randn(20, 300, dtype=torch.float64)
    block, single = Spoiled(matrix), Spoiled(matrix)
    x, report = block_cg(block, rows, rtol=1e-6)
    cg(single, rows, rtol=1e-6)
    assert report.converged.all()
    assert (true_residuals(matrix, x, rows) <= 1e-6 + tolerance(torch.float64, operations=300)).all()
    # Theirs grow with the root of the condition number, 100; the block's end at d / k = 15.
    assert 4 * len(block.rows) < len(single.rows)


@dtypes
def test_one_row_is_conjugate_gradients(dtype: torch.dtype) -> None:
    matrix, rows = positive_definite(D, 9.0).to(dtype), 3e7 * torch.randn(1, D).to(dtype)
    mine, block = block_cg(Dense(matrix), rows, rtol=1e-4)
    theirs, single = cg(Dense(matrix), rows, rtol=1e-4)
    assert torch.equal(block.iterations, single.iterations)
    assert block.products == single.products
    assert_close(mine, theirs, operations=D * int(single.iterations), condition=9.0)


def test_rows_that_are_not_contiguous() -> None:
    matrix, rows = positive_definite(D), torch.randn(D, 2 * K, dtype=torch.float64)
    x, _ = block_cg(Dense(matrix), rows.mT[::2], rtol=1e-12)
    assert_solved(matrix, x, rows.mT[::2], 1e-12)
    one_for_all, _ = block_cg(Dense(matrix), rows[:, 0].expand(K, D), rtol=1e-12)
    assert_solved(matrix, one_for_all, rows[:, 0].expand(K, D), 1e-12)


def test_no_rows_and_zero_rows_take_no_product() -> None:
    operator = Spoiled(positive_definite(D))
    x, report = block_cg(operator, torch.empty(0, D, dtype=torch.float64))
    assert x.shape == (0, D)
    assert "no right-hand sides" in str(report)
    x, report = block_cg(operator, torch.zeros(2, D, dtype=torch.float64), x0=torch.ones(D))
    assert not x.any()
    assert report.converged.all()
    assert operator.rows == []


@dtypes
def test_first_guesses(dtype: torch.dtype) -> None:
    matrix, rows = positive_definite(D).to(dtype), 1e10 * torch.randn(K, D).to(dtype)
    exact = solution(matrix, rows)
    x, report = block_cg(Dense(matrix), rows, rtol=1e-3, x0=exact)
    assert report.iterations.tolist() == [0] * K
    assert torch.equal(x, exact.to(dtype))
    assert report.products == 1
    guess = 1e9 * torch.randn(D, dtype=torch.float64)
    before = guess.clone()
    x, report = block_cg(Dense(matrix), rows, rtol=1e-3, x0=guess)
    assert report.converged.all()
    assert torch.equal(guess, before)
    assert_solved(matrix, x, rows, 1e-3)


def test_each_row_has_its_own_tolerance() -> None:
    matrix, rows = positive_definite(D), ordinary() * torch.logspace(-3, 1, K, dtype=torch.float64)[:, None]
    x, report = block_cg(Dense(matrix), rows, rtol=0.0, atol=1e-2)
    assert report.converged.all()
    assert ((rows - x @ matrix).norm(dim=1) <= 1e-2 * (1 + tolerance(torch.float64, operations=D))).all()
    assert (report.iterations == 0).tolist() == (rows.norm(dim=1) <= 1e-2).tolist()
    assert report.iterations[0] == 0  # so small that zero is within tolerance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x0": torch.zeros(D + 1)}, "x0: expected shape"),
        ({"maxiter": 0}, "maxiter: expected at least 1"),
        ({"rtol": -1.0}, "rtol, atol: expected tolerances >= 0"),
    ],
    ids=["x0", "maxiter", "rtol"],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_cg(Dense(positive_definite(D)), ordinary(), **options)


# -- what goes wrong is said, and row-wise iterations take over -------------------------------------------------------


def test_too_few_iterations_warn_with_the_numbers() -> None:
    matrix, rows = positive_definite(D), ordinary()
    words = r"^block conjugate gradients did not converge for 5 of 5 .* rtol=1e-08 .* after 3 iterations; raise maxiter"
    with pytest.warns(ConvergenceWarning, match=words):
        x, report = block_cg(Dense(matrix), rows, rtol=1e-8, maxiter=3)
    assert not report.converged.any()
    assert report.iterations.tolist() == [3] * K
    assert_close(report.residual, true_residuals(matrix, x, rows), operations=D, scale=1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_does_not_touch_the_others(value: float) -> None:
    matrix, rows = positive_definite(D), ordinary()
    rows[1, 3] = value
    others = [0, 2, 3, 4]
    with pytest.warns(ConvergenceWarning, match="for 1 of 5 right-hand sides"):
        x, report = block_cg(Dense(matrix), rows, rtol=1e-10)
    _, without = block_cg(Dense(matrix), rows[others], rtol=1e-10)
    assert report.converged.tolist() == [True, False, True, True, True]
    assert not report.precision_limit.any()
    assert_solved(matrix, x[others], rows[others], 1e-10)
    assert report.products == without.products


@pytest.mark.parametrize("products", [0, 1, 3])
def test_products_that_overflow_on_the_way_are_never_silent(products: int) -> None:
    with pytest.warns(ConvergenceWarning):
        _, report = block_cg(Spoiled(positive_definite(D), spoiled_from=products), ordinary(), rtol=1e-10)
    assert not (report.converged | report.precision_limit).any()


def indefinite(d: int = 30) -> Tensor:
    return with_spectrum(torch.cat([torch.linspace(0.5, 2.0, d - 3), torch.tensor([-0.4, -0.7, -1.1])]))


def test_indefinite_curvature_is_flagged_and_left_to_single_rows() -> None:
    matrix, rows = indefinite(), torch.randn(K, 30, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x, report = block_cg(Dense(matrix), rows, rtol=1e-8)
    assert report.negative_curvature.all()
    assert report.method == "block conjugate gradients, 5 of 5 rows finished one by one"
    residuals = true_residuals(matrix, x, rows)
    assert torch.equal(report.converged, residuals <= 1e-8)
    assert_close(report.residual, residuals, operations=30, scale=1.0)
    assert_solved(matrix, x[report.converged], rows[report.converged], 1e-8)


def test_negative_curvature_is_in_the_warning_and_maxiter_counts_all_iterations() -> None:
    operator = Spoiled(indefinite())
    with pytest.warns(NegativeCurvatureWarning, match="smallest eigenvalue is -"), pytest.warns(ConvergenceWarning):
        _, report = block_cg(operator, torch.randn(K, 30, dtype=torch.float64), rtol=1e-8, maxiter=6)
    assert int(report.iterations.max()) <= 6


def test_a_singular_matrix_with_consistent_right_hand_sides_gives_the_least_norm_solutions() -> None:
    matrix = with_spectrum(torch.cat([torch.linspace(0.5, 2.0, D - 4), torch.zeros(4)]))
    wanted = torch.randn(K, D, dtype=torch.float64) @ matrix
    x, report = block_cg(Dense(matrix), wanted @ matrix, rtol=1e-12)
    assert report.converged.all()
    assert not report.negative_curvature.any()
    assert_close(x, wanted, operations=1e-12 / tolerance(torch.float64), condition=4.0)


def test_more_rows_than_a_singular_matrix_has_rank() -> None:
    """P A Pᵀ itself is then singular, which is no negative curvature."""
    d, rank = 20, 6
    matrix = with_spectrum(torch.cat([torch.linspace(0.5, 2.0, rank), torch.zeros(d - rank)]))
    rows = torch.randn(d, d, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning):
        _, report = block_cg(Dense(matrix), rows, rtol=1e-8, maxiter=1)
    assert not (report.converged | report.negative_curvature).any()
    _, report = block_cg(Dense(matrix), rows @ matrix, rtol=1e-8)
    assert report.converged.all()
    assert not report.negative_curvature.any()


@pytest.mark.parametrize("seed", range(6))
def test_curvature_that_rounding_hides_is_not_divided_by(seed: int) -> None:
    torch.manual_seed(seed)  # the sign of what is left of 1e-12 is a matter of luck
    eigenvalues = torch.cat([torch.linspace(0.5, 1.0, D - 1), torch.tensor([1e-12])])
    matrix, rows = with_spectrum(eigenvalues).float(), torch.randn(D, D)
    with pytest.warns(ConvergenceWarning):
        x, _ = block_cg(Dense(matrix), rows, rtol=1e-3, maxiter=1)
    assert (true_residuals(matrix, x, rows) <= 1.0).all()


@pytest.mark.parametrize("condition", [1e3, 1e6])
def test_what_float32_cannot_resolve_is_reported_and_not_iterated_on(condition: float) -> None:
    d = 200
    eigenvalues = torch.cat([torch.linspace(0.5, 1.0, d - 2), torch.tensor([2.0, 1.0]) / condition])
    matrix, rows = with_spectrum(eigenvalues).float(), torch.randn(K, d)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x, report = block_cg(Dense(matrix), rows, rtol=1e-9)
    assert report.precision_limit.all()
    assert not report.converged.any()
    assert (report.iterations < 5 * d).all()
    residuals = true_residuals(matrix, x, rows)
    sizes = (x.double().norm(dim=1) / rows.double().norm(dim=1)).max()
    rounding = tolerance(torch.float32, operations=d) * float(1.0 + sizes)
    assert (residuals <= rounding).all()
    assert_close(report.residual, residuals, operations=d, scale=1.0, inherent=rounding)
    few_digits = bool((report.residual > torch.finfo(torch.float32).eps ** 0.5).any())
    assert [w.category for w in caught] == [ConvergenceWarning] * few_digits
    assert few_digits == (condition == 1e6)


def test_rows_that_a_restart_finds_within_reach_of_rounding_end_there() -> None:
    """The recurrence ends at 1e-7, and what is left of b - Ax is rounding in all rows: no direction is left."""
    torch.manual_seed(1)
    eigenvalues = torch.logspace(-5, 0, 400)
    rows = torch.randn(8, 400) * eigenvalues.sqrt()
    operator = Spoiled(torch.diag(eigenvalues))
    x, report = block_cg(operator, rows, rtol=1e-7, on_failure="ignore")
    assert (report.converged | report.precision_limit).all()
    assert min(operator.rows) > 0
    rounding = tolerance(torch.float32, operations=400) * (1 + x.norm(dim=1) / rows.norm(dim=1)).double()
    assert ((report.residual - true_residuals(operator.matrix, x, rows)).abs() <= rounding).all()


@pytest.mark.parametrize("off", [1e-200, 1e-17], ids=["its square is 0", "it is rounding"])
def test_a_first_guess_that_leaves_no_direction(off: float) -> None:
    operator = Spoiled(torch.eye(D, dtype=torch.float64))
    guess = torch.cat([torch.ones(1), torch.zeros(D - 1)]).double()
    row = guess + off * torch.eye(D, dtype=torch.float64)[1]
    x, report = block_cg(operator, row, x0=guess, rtol=0.0)
    assert torch.equal(x, guess)
    assert report.precision_limit.all()
    assert operator.rows == [1]
    _, report = block_cg(operator, torch.stack([row, ordinary()[0]]), x0=torch.stack([guess, guess]), rtol=1e-300)
    assert report.precision_limit[0]
    assert report.residual[1] <= tolerance(torch.float64, operations=D)


def test_a_block_that_makes_no_headway_is_left_to_single_rows() -> None:
    """Products with noise of 1e-3 deceive the recurrence, and true residuals don't fall below it."""
    operator = Spoiled(positive_definite(D), spoiled_from=0, noise=1e-3)
    with pytest.warns(ConvergenceWarning):
        _, report = block_cg(operator, ordinary(), rtol=1e-8, maxiter=300)
    assert "finished one by one" in report.method
    assert not (report.converged | report.precision_limit).any()


def test_a_recurrence_that_does_not_end_is_left_to_single_rows() -> None:
    """An operator that isn't symmetric, with maxiter at its default."""
    noise = torch.randn(D, D, dtype=torch.float64)
    matrix = torch.diag(torch.linspace(1.0, 100.0, D, dtype=torch.float64)) + noise - noise.mT
    with pytest.warns(ConvergenceWarning):
        _, report = block_cg(Dense(matrix), ordinary(), rtol=1e-8)
    assert "finished one by one" in report.method
    assert not (report.converged | report.precision_limit).any()


# -- verification by combinations -------------------------------------------------------------------------------------


def many(k: int = 200, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(k, D, dtype=torch.float64).to(dtype)


@dtypes
def test_many_rows_are_verified_by_a_few_combinations_of_them(dtype: torch.dtype) -> None:
    d, rtol = 800, 1e-2 if dtype == torch.float32 else 1e-5
    matrix, rows = positive_definite(d).to(dtype), torch.randn(64, d, dtype=torch.float64).to(dtype)
    operator = Spoiled(matrix)
    x, report = block_cg(operator, rows, rtol=rtol)
    assert report.converged.all()
    assert "8 random combinations" in report.verification
    assert report.verification in str(report)
    assert operator.rows[-1] < len(rows)  # the combinations, and rows close to their tolerance
    true = true_residuals(matrix, x, rows)
    rounding = tolerance(dtype, operations=d, condition=CONDITION)
    assert true.median() > 0.05 * rtol  # so that they are to be seen
    assert (report.residual >= true - rounding).all()  # a bound
    assert (report.residual <= rtol).all()
    assert report.residual.median() <= 1.2 * true.median() + rounding  # and no loose one
    everyone = Spoiled(matrix)
    same, full = block_cg(everyone, rows, rtol=rtol, verify="all")
    assert torch.equal(x, same)
    assert not full.verification
    assert everyone.rows == [*operator.rows[:-1], len(rows)]
    assert_close(full.residual, true, operations=d, scale=1.0, inherent=rounding)


def test_rows_that_combinations_find_wrong_are_all_judged_and_start_again() -> None:
    """Products with noise of 1e-4 let the recurrence go astray by more than its tolerance."""
    matrix, rows = positive_definite(D, 9.0), many(dtype=torch.float64)
    operator = Spoiled(matrix, spoiled_from=0, noise=1e-4)
    _, report = block_cg(operator, rows, rtol=1e-4, maxiter=40, on_failure="ignore")
    assert len(rows) in operator.rows[1:]
    # What products say has their noise, of norm 1e-4 |x|'s entries' number to the root.
    assert (report.residual[report.converged] <= 1e-4).all()


def test_a_wrong_verification_is_refused() -> None:
    with pytest.raises(ValueError, match='verify: expected "combinations" or "all", got \'none\''):
        block_cg(Dense(positive_definite(D)), ordinary(), verify="none")  # type: ignore[arg-type]


# -- budgets, errors and preconditioners ------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 200])
@pytest.mark.parametrize("budget", [1, 2, 3, 4])
def test_a_budget_of_products_gives_the_iterate_of_so_many_steps_with_its_residual(k: int, budget: int) -> None:
    matrix, rows = positive_definite(D, 1e4), torch.randn(k, D, dtype=torch.float64)
    operator = Spoiled(matrix)
    options: dict[str, Any] = {"rtol": 1e-12, "error_rtol": 0.0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x, report = block_cg(operator, rows, max_products=budget, **options)
    assert len(operator.rows) == report.products
    assert report.products == budget or (report.products < budget and report.converged.all())
    steps, _ = block_cg(Dense(matrix), rows, maxiter=budget, on_failure="ignore", **options)
    assert_close(x, steps, operations=D * budget, condition=1e4)
    true = true_residuals(matrix, x, rows)
    rounding = tolerance(torch.float64, operations=D, condition=1e4)
    assert (report.residual >= true - rounding).all()
    assert (report.residual <= true * (1 + 1e-6) + rounding).all()
    said = [str(w.message) for w in caught if issubclass(w.category, ConvergenceWarning)]
    assert len(said) == (not report.converged.all())
    assert all(f"ended at max_products={budget}" in text for text in said)


def test_a_budget_that_is_spent_raises_nothing_and_one_that_is_enough_says_nothing() -> None:
    matrix, rows = positive_definite(D), ordinary()
    with pytest.warns(ConvergenceWarning, match="max_products=2 with 5 of 5 .* estimated error"):
        block_cg(Dense(matrix), rows, rtol=1e-10, max_products=2, on_failure="raise")
    x, report = block_cg(Dense(matrix), rows, rtol=1e-6, max_products=40)
    same, free = block_cg(Dense(matrix), rows, rtol=1e-6)
    assert torch.equal(x, same)
    assert report.products == free.products < 40


def test_a_budget_covers_rows_that_go_on_by_themselves() -> None:
    operator = Spoiled(indefinite())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, report = block_cg(operator, torch.randn(K, 30, dtype=torch.float64), rtol=1e-8, max_products=8)
    assert len(operator.rows) == report.products <= 8
    assert not report.converged.all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_products": 0}, ValueError, "max_products: expected at least 1, got 0"),
        ({"max_products": 2.0}, TypeError, "max_products: expected an integer or None, got 2.0"),
        ({"max_products": True}, TypeError, "max_products: expected an integer"),
        ({"error_rtol": -1.0}, ValueError, "error_rtol: expected a number >= 0, got -1.0"),
        ({"error_rtol": "1"}, ValueError, "error_rtol: expected a number >= 0"),
        ({"max_products": 1, "M": Nystrom(3)}, ValueError, "expected more than the 1 that M takes, got 1"),
    ],
    ids=str,
)
def test_budgets_that_make_no_sense(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        block_cg(Dense(positive_definite(D)), ordinary(), **options)


class Bounded(Spoiled):
    """Knows the least of its eigenvalues."""

    @property
    def least(self) -> float:
        return float(torch.linalg.eigvalsh(self.matrix.double())[0])


def energy_errors(matrix: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """|x - x*|_A / |x*|_A in float64."""
    exact = solution(matrix, rows)
    off = x.double() - exact
    squares = ((v * (v @ matrix.double())).sum(dim=1) for v in (off, exact))
    return torch.div(*squares).sqrt()


@pytest.mark.parametrize("k", [1, 8, 200])
@pytest.mark.parametrize("damping", [1e-3, 1e-1])
def test_the_estimate_of_the_error_bounds_it_where_the_least_eigenvalue_is_known(k: int, damping: float) -> None:
    """Damped curvature: few large eigenvalues, the others near the damping."""
    values = damping + torch.cat([torch.logspace(0, -6, 40), torch.zeros(160)]).double()
    matrix = with_spectrum(values)
    rows = torch.randn(k, 200, dtype=torch.float64)
    for steps in (1, 2, 4, 8):
        x, report = block_cg(Bounded(matrix), rows, rtol=1e-13, maxiter=steps, on_failure="ignore")
        true = energy_errors(matrix, x, rows)
        assert report.error is not None
        bounds = (report.error + tolerance(torch.float64, operations=200, condition=1 / damping)) / true
        assert (bounds[~report.error.isnan()] >= 1 - 1e-6).all()
        x, report = block_cg(Dense(matrix), rows, rtol=1e-13, maxiter=steps, on_failure="ignore")
        assert report.error is not None
        known = ~report.error.isnan() & (true > 1e-9)
        # By what the steps have gained alone: the same up to a small factor.
        assert (report.error[known] / true[known] <= 10).all()
        assert (report.error[known] / true[known] >= 0.02).all()


@pytest.mark.parametrize("wanted", [0.3, 1e-2, 1e-4])
def test_rows_end_by_their_error_before_their_residual(wanted: float) -> None:
    values = 5e-3 + torch.cat([torch.logspace(0, -3, 100), torch.zeros(100)]).double()
    matrix, rows = with_spectrum(values), torch.randn(4, 200, dtype=torch.float64)
    x, report = block_cg(Bounded(matrix), rows, rtol=1e-12, error_rtol=wanted)
    _, longer = block_cg(Bounded(matrix), rows, rtol=1e-12)
    assert report.converged.all()
    assert report.products < longer.products
    assert (energy_errors(matrix, x, rows) <= wanted).all()
    assert report.error is not None
    assert (report.error <= wanted).all()
    true = true_residuals(matrix, x, rows)
    assert (true > 1e-12).any()
    assert_close(report.residual, true, operations=200, scale=1.0)


@dtypes
@pytest.mark.parametrize("make", RIGHT_HAND_SIDES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("M", [Nystrom(12), Jacobi()], ids=["Nystrom", "Jacobi"])
def test_preconditioned_rows_are_judged_in_their_own_coordinates(M: Any, make: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    scales = torch.logspace(0, 1, D, dtype=torch.float64)
    matrix = (scales[:, None] * positive_definite(D) * scales).to(dtype)
    rows = make().to(dtype)
    rtol = 1e-2 if dtype == torch.float32 else 1e-10
    operator = Spoiled(matrix)
    x, report = block_cg(operator, rows, rtol=rtol, M=M)
    assert report.converged.all()
    some = rows.any(dim=1)
    rounding = tolerance(dtype, operations=D, condition=float(torch.linalg.cond(matrix.double())))
    true = true_residuals(matrix, x[some], rows[some])
    assert (true <= rtol + rounding).all()
    assert_close(report.residual[some], true, operations=D, scale=1.0, inherent=rounding)
    assert report.products == len(operator.rows)


def test_a_preconditioner_saves_products_and_is_kept() -> None:
    values = 1e-4 + torch.cat([torch.logspace(0, -2, 40), torch.logspace(-5, -6, 160)]).double()
    matrix, rows = with_spectrum(values), torch.randn(2, 200, dtype=torch.float64)
    _, without = block_cg(Dense(matrix), rows, rtol=1e-6)
    operator = Spoiled(matrix)
    solver = BlockCG(rtol=1e-6, M=Nystrom(40))
    x, report = solver.solve(operator, rows)
    assert_solved(matrix, x, rows, 1e-6)
    assert report.products == len(operator.rows)
    assert 2 * report.products < without.products
    _, again = solver.solve(operator, rows)
    assert again.products == report.products - 1
    assert "preconditioned by Nystrom(rank=40" in solver.title


def test_one_row_with_a_preconditioner_is_preconditioned_conjugate_gradients() -> None:
    matrix, rows = positive_definite(D, 30.0), torch.randn(1, D, dtype=torch.float64)
    mine, block = block_cg(Dense(matrix), rows, rtol=1e-6, M=Nystrom(10))
    theirs, single = cg(Dense(matrix), rows, rtol=1e-6, M=Nystrom(10))
    assert torch.equal(block.iterations, single.iterations)
    assert_close(mine, theirs, operations=D * int(single.iterations), condition=30.0**2)
    assert block.eigenvalues == pytest.approx(single.eigenvalues, rel=1e-6)


def test_a_preconditioner_that_is_not_definite_is_left_to_single_rows() -> None:
    matrix, rows = positive_definite(D, 9.0), ordinary()
    M = torch.diag(torch.cat([torch.ones(D - 1), -torch.ones(1)])).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, report = block_cg(Dense(matrix), rows, rtol=1e-8, M=M, maxiter=100)
    assert "finished one by one" in report.method


class Dots(Spoiled):
    """A matrix GᵀG/n + I that knows what G makes of the rows that it is multiplied by."""

    def __init__(self, G: Tensor) -> None:
        super().__init__(G.mT @ G / len(G) + torch.eye(G.shape[1]).to(G))
        self.G = G

    def product_and_dots(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.product(rows), self.G @ rows.mT


@pytest.mark.parametrize("k", [1, 5, 200])
@pytest.mark.parametrize("budget", [None, 2, 3])
def test_linear_functions_of_x_are_summed_up_on_the_way(k: int, budget: int | None) -> None:
    G = torch.randn(30, D, dtype=torch.float64)
    rows = torch.randn(k, D, dtype=torch.float64) * torch.logspace(-9, 9, k, dtype=torch.float64)[:, None]
    total = torch.zeros(30, k, dtype=torch.float64)
    calls = []

    def follow(dots: Tensor | None, coefficients: Tensor | None) -> None:
        assert dots is not None
        assert coefficients is not None
        calls.append(dots.shape)
        total.add_(dots @ coefficients.mT)

    x, report = block_cg(Dots(G), rows, rtol=1e-8, max_products=budget, follow=follow, on_failure="ignore")
    assert_close(total / rows.norm(dim=1), G @ x.mT / rows.norm(dim=1), operations=D, condition=100.0)
    assert len(calls) == int(report.iterations.max())


def test_a_follower_is_told_when_x_has_grown_in_another_way() -> None:
    told = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block_cg(
            Dense(indefinite()), torch.randn(K, 30, dtype=torch.float64), follow=lambda dots, by: told.append(dots)
        )
    assert told[-1] is None


@pytest.mark.parametrize("M", [None, Nystrom(40)], ids=["plain", "Nystrom"])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("wanted", [0.3, 1e-2, 1e-4])
def test_single_rows_end_by_their_error_too(wanted: float, known: bool, M: Any) -> None:
    values = 5e-3 + torch.cat([torch.logspace(0, -3, 100), torch.zeros(100)]).double()
    matrix, rows = with_spectrum(values), torch.randn(4, 200, dtype=torch.float64)
    operator = (Bounded if known else Spoiled)(matrix)
    x, report = cg(operator, rows, rtol=1e-12, error_rtol=wanted, M=M)
    _, longer = cg(Dense(matrix), rows, rtol=1e-12, M=M)
    assert report.converged.all()
    assert report.products == len(operator.rows) < longer.products
    assert (energy_errors(matrix, x, rows) <= (1 if known else 10) * wanted).all()
    assert_close(report.residual, true_residuals(matrix, x, rows), operations=200, scale=1.0)


@pytest.mark.parametrize("budget", [2, 3, 9, 40])
def test_single_rows_keep_to_a_budget(budget: int) -> None:
    matrix, rows = positive_definite(D, 1e3), torch.randn(K, D, dtype=torch.float64)
    operator = Spoiled(matrix)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x, report = cg(operator, rows, rtol=1e-3, max_products=budget, on_failure="raise")
    assert report.products == len(operator.rows) <= budget
    assert_close(report.residual, true_residuals(matrix, x, rows), operations=D, scale=1.0)
    assert len(caught) == (not report.converged.all())
    same, _ = cg(Dense(matrix), rows, rtol=1e-3, maxiter=budget - 1, on_failure="ignore")
    if not report.converged.any():
        assert torch.equal(x, same)


def test_single_rows_need_two_products() -> None:
    with pytest.raises(ValueError, match="max_products: expected at least 2, got 1"):
        cg(Dense(positive_definite(D)), ordinary(), max_products=1)
    with pytest.raises(ValueError, match="expected at least 3, as M takes 1, got 2"):
        cg(Dense(positive_definite(D)), ordinary(), max_products=2, M=Nystrom(3))


def test_the_error_of_single_rows_is_bounded_where_the_least_eigenvalue_is_known() -> None:
    matrix, rows = positive_definite(D, 1e3), torch.randn(K, D, dtype=torch.float64)
    x, report = cg(Bounded(matrix), rows, rtol=1e-3)
    assert report.error is not None
    assert (report.error >= energy_errors(matrix, x, rows) * (1 - 1e-6)).all()
    _, report = cg(Spoiled(matrix), rows, rtol=1e-3)
    assert report.error is not None
    assert report.error.isnan().all()
