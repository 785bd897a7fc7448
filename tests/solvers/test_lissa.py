"""LiSSA on matrices: its recursion, its scale, how it fails, and what it says of the quality of its estimate."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import scipy.sparse
import torch
from oracles import assert_close, tolerance, with_spectrum
from torch import Tensor

from torch_influence import backend_info
from torch_influence.linop import Damped, Dense, LinearOperator
from torch_influence.solvers import (
    AutoScale,
    ConvergenceWarning,
    DivergenceWarning,
    SolveError,
    SolveReport,
    lissa,
)
from torch_influence.solvers._series import Series

pytestmark = pytest.mark.filterwarnings("error")

K = 5
SAMPLED = 16  # minibatches that scale="auto" looks at
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
few_steps = {"on_failure": "ignore"}  # the steps are what is looked at, not where they lead


class Minibatches:
    """A Sampled operator over given matrices: sample t of every run is matrix t modulo their number."""

    def __init__(self, matrices: Tensor) -> None:
        self.matrices = matrices
        self.generators: list[torch.Generator | None] = []

    def sampled(self, steps: int, generator: torch.Generator | None) -> Iterator[LinearOperator]:
        self.generators.append(generator)
        for t in range(steps):
            yield Dense(self.matrices[t % len(self.matrices)])

    def damped(self, shift: float) -> Damped:
        mean = Dense(self.matrices.mean(0))
        mean.sampled = self.sampled  # type: ignore[attr-defined]
        return Damped(mean, shift)


class LeastSquares(LinearOperator):
    """XᵀX / n for examples X, in minibatches of so many drawn with replacement."""

    def __init__(self, x: Tensor, batch_size: int) -> None:
        self.x, self.batch_size = x, batch_size
        self.size, self.dtype, self.device = x.shape[1], x.dtype, x.device

    def product(self, rows: Tensor) -> Tensor:
        return rows @ self.x.mT @ self.x / len(self.x)

    def sampled(self, steps: int, generator: torch.Generator | None) -> Iterator[LinearOperator]:
        for _ in range(steps):
            some = torch.randint(len(self.x), (self.batch_size,), generator=generator)
            yield LeastSquares(self.x[some], self.batch_size)


def light(n: int = 2000, d: int = 12) -> Tensor:
    """Gaussian, standard deviations 1/j."""
    return torch.randn(n, d, dtype=torch.float64) / torch.arange(1, d + 1)


def heavy(n: int = 2000, d: int = 12) -> Tensor:
    """Student's t with 3 degrees of freedom: the curvature of an example has no variance."""
    radius = (3 / torch.distributions.Chi2(torch.tensor(3.0, dtype=torch.float64)).sample((n,))).sqrt()
    return light(n, d) * radius[:, None]


def sparse(n: int = 2000, d: int = 12) -> Tensor:
    """One feature each, a large one: in a small minibatch it has d / size times its curvature in all data."""
    x = 0.3 * light(n, d)
    x[torch.arange(n), torch.randint(d, (n,))] = 8.0
    return x


def minibatches(dtype: torch.dtype = torch.float64) -> Minibatches:
    return Minibatches(torch.stack([with_spectrum(torch.linspace(0.2, 1.0, 4)) for _ in range(3)]).to(dtype))


def recursion(matrices: Any, v: Tensor, scale: float, damp: float) -> Tensor:
    h = v.clone()
    eye = torch.eye(len(v), dtype=v.dtype)
    for matrix in matrices:
        h = v + h - (matrix + damp * eye) @ h / scale
    return h / scale


def neumann_sum(matrix: Tensor, rows: Tensor, depth: int, scale: float) -> Tensor:
    """(1/scale) Σ_{t=0..depth} (I - A/scale)^t v: the mean of LiSSA's estimate, as minibatches are independent."""
    step = torch.eye(len(matrix), dtype=matrix.dtype) - matrix / scale
    term, total = rows.clone(), rows.clone()
    for _ in range(depth):
        term = term @ step
        total = total + term
    return total / scale


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def number_in(pattern: str, message: object) -> float:
    found = re.search(pattern + r"([0-9.e+-]+[0-9])", str(message))
    assert found, message
    return float(found.group(1))


def assert_estimates(x: Tensor, report: SolveReport, expected: Tensor, bias: Tensor | float = 0.0) -> None:
    """Within 5 standard errors, that are told, and a known bias."""
    assert report.standard_error is not None
    error = (x - expected).norm(dim=1)
    assert (error <= 5 * report.standard_error * x.norm(dim=1) + bias).all()


# -- the recursion ----------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("damp", [0.0, 0.3])
@pytest.mark.parametrize("repeat", [1, 3])
def test_lissa_is_its_recursion(dtype: torch.dtype, damp: float, repeat: int) -> None:
    depth, scale = 7, 2.0
    sampled = minibatches(dtype)
    rows = torch.randn(K, 4).to(dtype)
    x, report = lissa(sampled.damped(damp), rows, repeat=repeat, depth=depth, scale=scale, **few_steps)
    matrices = [sampled.matrices.double()[t % 3] for t in range(depth)]
    expected = torch.stack([recursion(matrices, row.double(), scale, damp) for row in rows])
    assert_close(x, expected, operations=4 * depth * repeat)
    assert x.dtype == dtype
    assert report.products == repeat * depth
    assert (report.iterations == repeat * depth).all()
    assert report.method == "LiSSA"


def test_an_operator_without_damping_or_with_twice_of_it() -> None:
    sampled = minibatches()
    rows = torch.randn(K, 4, dtype=torch.float64)
    options: dict[str, Any] = {"depth": 3, "scale": 2.0, **few_steps}
    matrices = list(sampled.matrices)
    x, _ = lissa(sampled.damped(0.0).base, rows, **options)
    assert_close(x, torch.stack([recursion(matrices, row, 2.0, 0.0) for row in rows]), operations=4 * 3)
    x, _ = lissa(sampled.damped(0.1).damped(0.2), rows, **options)
    assert_close(x, torch.stack([recursion(matrices, row, 2.0, 0.1 + 0.2) for row in rows]), operations=4 * 3)


def test_lissa_leaves_its_input_alone_and_is_linear() -> None:
    operator = minibatches().damped(0.1)
    rows = torch.randn(2, 4, dtype=torch.float64)
    before = rows.clone()
    options: dict[str, Any] = {"repeat": 2, "depth": 6, "scale": 2.0, **few_steps}
    x, _ = lissa(operator, rows, **options)
    assert torch.equal(rows, before)
    combined, _ = lissa(operator, 3.0 * rows[:1] - rows[1:], **options)
    assert_close(combined[0], 3.0 * x[0] - x[1], operations=4 * 6 * 2, scale=float(4.0 * x.abs().max()))
    alone, _ = lissa(operator, rows[0], **options)
    assert alone.shape == (4,)
    assert_close(alone, x[0], operations=4 * 6 * 2)


AS_GIVEN = {
    "tensors": lambda matrix: matrix,
    "arrays": lambda matrix: matrix.numpy(),
    "sparse matrices": lambda matrix: scipy.sparse.csr_array(matrix.numpy()),
    "callables": lambda matrix: lambda rows: rows @ matrix,
    "operators": Dense,
    "damped operators": lambda matrix: Dense(matrix - 0.1 * torch.eye(4, dtype=torch.float64)).damped(0.1),
}


@pytest.mark.parametrize("kind", AS_GIVEN)
@pytest.mark.parametrize("as_sequence", [list, tuple])
def test_minibatches_in_a_list_are_drawn_uniformly_with_replacement(kind: str, as_sequence: Any) -> None:
    matrices = minibatches().matrices
    rows, depth, repeat, scale = torch.randn(K, 4, dtype=torch.float64), 8, 2, 2.0
    given = as_sequence(AS_GIVEN[kind](matrix) for matrix in matrices)
    x, _ = lissa(given, rows, repeat=repeat, depth=depth, scale=scale, generator=generator(), **few_steps)
    draws = generator()
    runs = [matrices[torch.randint(3, (depth,), generator=draws)] for _ in range(repeat)]
    expected = torch.stack([sum(recursion(run, row, scale, 0.0) for run in runs) / repeat for row in rows])
    assert_close(x, expected, operations=4 * depth * repeat)
    torch.manual_seed(5)
    by_default, _ = lissa(given, rows, depth=depth, scale=scale, **few_steps)
    torch.manual_seed(5)
    run = matrices[torch.randint(3, (depth,))]
    assert_close(by_default, torch.stack([recursion(run, row, scale, 0.0) for row in rows]), operations=4 * depth)


def test_a_single_operator_is_the_neumann_series() -> None:
    matrix = minibatches().matrices[0]
    rows = torch.randn(K, 4, dtype=torch.float64)
    x, report = lissa(matrix, rows, depth=150)
    assert_close(x, torch.linalg.solve(matrix, rows.mT).mT, operations=4 * 150, condition=5.0)
    assert report.converged.all()
    assert report.standard_error is None
    x, report = lissa(Dense(matrix).damped(0.5), rows, repeat=2, depth=10, scale=1.5)
    expected = neumann_sum(matrix + 0.5 * torch.eye(4), rows, 10, 1.5)
    assert_close(x, expected, operations=4 * 10 * 2)
    assert report.standard_error is not None
    assert report.standard_error.max() <= tolerance(torch.float64, operations=4)  # there is nothing random in it


@pytest.mark.parametrize(("k", "shape"), [(1, (4,)), (3, (3, 4))])
def test_the_callbacks_get_a_copy_of_h_after_each_step_and_the_estimate_of_each_repeat(
    k: int, shape: tuple[int, ...]
) -> None:
    calls: list[tuple[int, int, Tensor]] = []
    repeats: list[tuple[int, Tensor]] = []
    x, _ = lissa(
        minibatches().damped(0.1),
        torch.randn(k, 4, dtype=torch.float64),
        repeat=2,
        depth=3,
        scale=2.0,
        callback=lambda run, step, h: calls.append((run, step, h)),
        after_repeat=lambda run, x: repeats.append((run, x)),
        **few_steps,
    )
    assert [(run, step) for run, step, _ in calls] == [(run, step) for run in range(2) for step in range(3)]
    assert all(h.shape == shape for *_, h in calls)
    assert [run for run, _ in repeats] == [0, 1]
    for run, estimate in repeats:
        assert torch.equal(estimate, calls[3 * run + 2][2].reshape(k, 4) / 2.0)
    assert_close(x, (repeats[0][1] + repeats[1][1]) / 2, operations=4)


def test_the_generator_is_handed_to_the_sampler() -> None:
    sampled, given = minibatches(), generator()
    rows = torch.ones(1, 4, dtype=torch.float64)
    lissa(sampled.damped(0.1), rows, repeat=2, depth=1, scale=2.0, generator=given, **few_steps)
    assert sampled.generators == [given, given]


def test_no_rows_and_zero_rows() -> None:
    operator = minibatches().damped(0.1)
    x, report = lissa(operator, torch.empty(0, 4, dtype=torch.float64), repeat=2, depth=2, scale=2.0)
    assert x.shape == (0, 4)
    assert report.converged.shape == (0,)
    x, report = lissa(operator, torch.zeros(2, 4, dtype=torch.float64), repeat=2, depth=2, scale=2.0)
    assert not x.any()
    assert report.converged.all()
    assert report.standard_error is not None
    assert not report.standard_error.any()
    assert not report.residual.any()


@pytest.mark.parametrize("option", ["repeat", "depth", "scale"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_options_that_make_no_sense(option: str, value: float) -> None:
    options: dict[str, Any] = {"repeat": 1, "depth": 1, "scale": 1.0} | {option: value}
    with pytest.raises(ValueError, match=f"^{option}: expected"):
        lissa(minibatches().damped(0.0), torch.ones(1, 4, dtype=torch.float64), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "fast"}, 'scale: expected a number > 0 or "auto", got fast'),
        ({"rtol": -0.1, "repeat": 2}, "rtol: expected a tolerance >= 0 or None, got -0.1"),
        ({"rtol": 0.1}, "repeat: expected at least 2 with rtol.* got 1"),
        ({"on_failure": "stop"}, "on_failure: expected"),
    ],
)
def test_other_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lissa(minibatches().damped(0.0), torch.ones(1, 4, dtype=torch.float64), depth=1, **options)


def test_an_empty_list_and_things_that_do_not_multiply() -> None:
    with pytest.raises(ValueError, match="A: expected at least one minibatch"):
        lissa([], torch.ones(4), depth=1)
    with pytest.raises(TypeError, match=r"A: expected a matrix, an operator .* got str"):
        lissa("A", torch.ones(4), depth=1)
    with pytest.raises(ValueError, match=r"A: expected shape \[4, 4\]"):
        lissa([torch.eye(4), torch.eye(3)], torch.ones(4), depth=1)


# -- the scale --------------------------------------------------------------------------------------------------------


def test_auto_is_the_largest_eigenvalue_of_sampled_minibatches_and_draws_as_a_number_does() -> None:
    matrices = [with_spectrum(torch.rand(2) * size) for size in range(1, 31)]
    rows = torch.randn(K, 2, dtype=torch.float64)
    sample = torch.randint(30, (SAMPLED,), generator=generator(0))
    largest = max(float(torch.linalg.eigvalsh(matrices[i])[-1]) for i in sample)
    auto = AutoScale()
    options: dict[str, Any] = {"repeat": 2, "depth": 30, **few_steps}
    x, report = lissa(matrices, rows, scale=auto, generator=generator(3), **options)
    found = auto.scale(0.0)
    assert found is not None
    assert abs(found - largest) <= largest * tolerance(torch.float64, operations=2**3)  # 2 steps of Lanczos are all
    assert report.method == f"LiSSA, scale {largest:.3g} (auto)"
    assert report.products == 2 * 30 + auto.products
    assert auto.products == SAMPLED * 2

    given, _ = lissa(matrices, rows, scale=found, generator=generator(3), **options)
    assert torch.equal(x, given)
    before = torch.get_rng_state()
    again, report = lissa(matrices, rows, generator=generator(3), **options)
    assert torch.equal(again, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert "(auto)" in report.method


@pytest.mark.parametrize("data", [light, heavy])
def test_few_steps_of_lanczos_come_close(data: Any) -> None:
    """Ritz values are within a tenth, their error is added: so is the scale, if Lanczos has come that far."""
    operator = LeastSquares(data(4000, 300), 64)
    auto = AutoScale()
    auto.find(operator)
    sample = operator.sampled(SAMPLED, generator(0))
    largest = max(float(torch.linalg.matrix_norm(minibatch.x, 2)) ** 2 / 64 for minibatch in sample)  # type: ignore[attr-defined]
    found = auto.scale(0.0)
    assert found is not None
    assert largest / 1.1 <= found <= 1.1 * largest


def test_a_scale_is_kept_and_knows_its_damping() -> None:
    operator = LeastSquares(light(), 16)
    auto = AutoScale()
    assert auto.scale(1.0) is None
    rows = torch.ones(1, 12, dtype=torch.float64)
    _, first = lissa(operator.damped(0.5), rows, depth=40, scale=auto)
    spent, undamped = auto.products, auto.scale(0.0)
    _, second = lissa(operator.damped(2.0), rows, depth=40, scale=auto)
    assert auto.products == spent
    assert (first.products, second.products) == (40 + spent, 40)
    assert undamped is not None
    assert auto.scale(2.0) == undamped + 2.0  # the eigenvalues of A + damp I
    assert f"scale {undamped + 2.0:.3g} (auto)" in second.method


def test_a_curvature_of_zero_has_a_scale_too() -> None:
    x, report = lissa(torch.zeros(3, 3), torch.ones(3), depth=1, **few_steps)
    assert x.isfinite().all()
    assert report.method == "LiSSA, scale 1 (auto)"


@pytest.mark.parametrize("data", [light, heavy, sparse])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_auto_converges_to_the_dense_solution_where_the_mean_curvature_misleads(data: Any, batch_size: int) -> None:
    operator, damp = LeastSquares(data(), batch_size), 0.05
    rows = torch.randn(3, 12, dtype=torch.float64)
    matrix = operator.product(torch.eye(12, dtype=torch.float64)) + damp * torch.eye(12, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    x, report = lissa(operator.damped(damp), rows, repeat=8, depth=1500, generator=generator(1))
    scale = number_in("scale ", report.method)
    expected = torch.linalg.solve(matrix, rows.mT).mT
    assert_estimates(x, report, expected, (neumann_sum(matrix, rows, 1500, scale) - expected).norm(dim=1))
    assert report.converged.all()
    if data is sparse and batch_size == 1:
        assert scale > 10 * eigenvalues[-1]
        with pytest.warns(DivergenceWarning, match="raise scale"):
            x, _ = lissa(operator.damped(damp), rows, depth=1500, scale=float(eigenvalues[-1]), generator=generator(1))
        assert x.isnan().all()


def rare(largest: float) -> list[Tensor]:
    """Minibatches of which one, that is not among those looked at, has a much larger curvature."""
    sample = torch.randint(400, (SAMPLED,), generator=generator(0)).tolist()
    minibatches = [torch.diag(torch.tensor([1.0, 0.5, 0.7], dtype=torch.float64))] * 400
    minibatches[next(i for i in range(400) if i not in sample)] = torch.diag(
        torch.tensor([1.0, largest, 0.7], dtype=torch.float64)
    )
    return minibatches


def test_auto_starts_over_with_the_scale_of_a_rare_minibatch() -> None:
    largest = 300.0
    minibatches, rows = rare(largest), torch.ones(2, 3, dtype=torch.float64)
    matrix = torch.stack(minibatches).mean(0)
    calls: list[tuple[int, int]] = []
    repeats: list[int] = []
    auto = AutoScale()
    x, report = lissa(
        minibatches,
        rows,
        repeat=3,
        depth=3000,
        scale=auto,
        generator=generator(2),
        callback=lambda run, step, h: calls.append((run, step)),
        after_repeat=lambda run, x: repeats.append(run),
    )
    found = auto.scale(0.0)
    assert found is not None
    assert largest / 1.1 <= found <= 1.1 * largest
    assert calls.count((0, 0)) == 2
    assert repeats[-3:] == [0, 1, 2]
    assert report.products == len(calls) + auto.products
    expected = torch.linalg.solve(matrix, rows.mT).mT
    assert_estimates(x, report, expected, (neumann_sum(matrix, rows, 3000, found) - expected).norm(dim=1))


# -- divergence -------------------------------------------------------------------------------------------------------


def steps_to_notice(matrices: Tensor, row: Tensor, scale: float) -> int:
    """The first t with |h_t| > 10 (t + 1) |b|."""
    h, t = row.clone(), 0
    while h.norm() <= 10 * (t + 1) * row.norm():
        h, t = row + h - matrices[t % len(matrices)] @ h / scale, t + 1
    return t


@pytest.mark.parametrize("scale", [1e-3, 0.1, 0.3, 0.45])
def test_divergence_is_noticed_by_the_step_that_proves_it(scale: float) -> None:
    calls: list[int] = []
    rows = torch.ones(2, 3, dtype=torch.float64)
    with pytest.warns(DivergenceWarning, match="diverged for 2 of 2 right-hand sides, in step [0-9]+ of repeat 1"):
        x, report = lissa(
            torch.eye(3), rows, repeat=4, depth=10**6, scale=scale, callback=lambda *call: calls.append(0)
        )
    expected = steps_to_notice(torch.eye(3, dtype=torch.float64)[None], rows[0], scale)
    assert len(calls) == expected
    assert report.iterations.tolist() == [expected] * 2
    assert x.isnan().all()
    assert report.residual.isnan().all()
    assert report.standard_error is not None
    assert report.standard_error.isnan().all()
    assert not report.converged.any()


@pytest.mark.parametrize("data", [light, heavy])
@pytest.mark.parametrize("too_small", [0.3, 0.01])
def test_the_scale_that_the_warning_names_converges(data: Any, too_small: float) -> None:
    operator, damp = LeastSquares(data(), 8), 0.05
    rows = torch.randn(3, 12, dtype=torch.float64)
    options: dict[str, Any] = {"repeat": 8, "depth": 1500}
    matrix = operator.product(torch.eye(12, dtype=torch.float64)) + damp * torch.eye(12, dtype=torch.float64)
    scale = too_small * float(torch.linalg.eigvalsh(matrix)[-1])
    with pytest.warns(DivergenceWarning, match=f"scale={scale:g} is below half the largest eigenvalue") as caught:
        lissa(operator.damped(damp), rows, scale=scale, generator=generator(), **options)
    named = number_in("raise scale, to ", caught[0].message)
    x, report = lissa(operator.damped(damp), rows, scale=named, generator=generator(), **options)
    assert report.converged.all()
    expected = torch.linalg.solve(matrix, rows.mT).mT
    assert_estimates(x, report, expected, (neumann_sum(matrix, rows, 1500, named) - expected).norm(dim=1))


@pytest.mark.parametrize("scale", ["auto", 2.0])
def test_the_damping_that_the_warning_names_converges(scale: Any) -> None:
    """Negative eigenvalues, with a scale that is large enough."""
    matrices = [with_spectrum(torch.linspace(-0.3, 1.5, 6)) for _ in range(20)]
    rows = torch.randn(2, 6, dtype=torch.float64)
    with pytest.warns(
        DivergenceWarning, match="curvature of minibatches has negative eigenvalues, -0.3 among"
    ) as caught:
        x, report = lissa(matrices[:1], rows, depth=10**5, scale=scale)
    assert x.isnan().all()
    damp = number_in("damping larger by ", caught[0].message)
    assert 0.3 < damp < 0.4
    damped = [matrix + damp * torch.eye(6, dtype=torch.float64) for matrix in matrices]
    x, report = lissa(damped, rows, repeat=8, depth=1500, scale=scale, generator=generator())
    expected = torch.linalg.solve(torch.stack(damped).mean(0), rows.mT).mT
    assert_estimates(x, report, expected)


def test_rows_that_have_not_failed_go_on_and_equal_themselves_alone() -> None:
    """The third row has nothing in the direction that expands; the second is zero."""
    matrices = torch.stack([torch.diag(torch.tensor([9.0, 1.0, a])) for a in (0.5, 1.0)]).double()
    rows = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    options: dict[str, Any] = {"repeat": 2, "depth": 40, "scale": 2.0}
    with pytest.warns(DivergenceWarning, match="diverged for 1 of 3 "):
        x, report = lissa(Minibatches(matrices).damped(0.0), rows, **options)
    alone, expected = lissa(Minibatches(matrices).damped(0.0), rows[1:], **options)
    assert x[0].isnan().all()
    assert torch.equal(x[1:], alone)
    assert not x[1].any()
    assert report.converged.tolist() == [False, True, True]
    assert report.iterations.tolist() == [steps_to_notice(matrices, rows[0], 2.0), 80, 80]
    for name in ("residual", "standard_error"):
        assert getattr(report, name)[0].isnan()
        assert torch.equal(getattr(report, name)[1:], getattr(expected, name))


def test_a_row_that_fails_in_a_later_repeat_is_nan_and_the_rest_goes_on() -> None:
    class Later(Minibatches):
        def sampled(self, steps: int, generator: torch.Generator | None) -> Iterator[LinearOperator]:
            self.generators.append(generator)
            matrix = self.matrices[min(len(self.generators), 2) - 1]  # the second and all later runs
            return iter([Dense(matrix)] * steps)

    fine, too_large = torch.diag(torch.tensor([1.0, 1.0])), torch.diag(torch.tensor([9.0, 1.0]))
    rows = torch.eye(2)
    with pytest.warns(DivergenceWarning, match="diverged for 1 of 2 right-hand sides, in step [0-9] of repeat 2"):
        x, report = lissa(Later(torch.stack([fine, too_large])).damped(0.0), rows, repeat=3, depth=50, scale=2.0)
    assert x[0].isnan().all()
    assert_close(x[1], rows[1], operations=50)
    assert report.converged.tolist() == [False, True]
    assert 50 < int(report.iterations[0]) < 100
    assert int(report.iterations[1]) == 150


def test_divergence_can_be_raised_or_ignored() -> None:
    with pytest.raises(SolveError, match="LiSSA diverged") as raised:
        lissa(torch.eye(2), torch.ones(2), depth=50, scale=0.1, on_failure="raise")
    assert raised.value.solution is not None
    assert raised.value.solution.isnan().all()
    assert isinstance(raised.value.warnings[0], DivergenceWarning)
    x, report = lissa(torch.eye(2), torch.ones(2), depth=50, scale=0.1, on_failure="ignore")
    assert x.isnan().all()
    assert not report.converged.any()


def test_a_step_that_expands_now_and_then_is_no_divergence() -> None:
    matrices = torch.stack([torch.diag(torch.tensor([a, 0.4])) for a in [0.5] * 19 + [5.0]]).double()
    rows = torch.ones(1, 2, dtype=torch.float64)
    _, report = lissa(Minibatches(matrices).damped(0.0), rows, depth=400, scale=2.0)  # |1 - 5/2| > 1
    assert report.converged.all()


# -- numbers that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0, "auto"])
@pytest.mark.parametrize("repeat", [1, 3])
def test_nan_in_the_curvature_is_told_from_divergence(scale: Any, repeat: int) -> None:
    bad = torch.eye(3)
    bad[1, 2] = bad[2, 1] = float("nan")
    sampled = Minibatches(torch.stack([torch.eye(3)] * 5 + [bad]))
    calls: list[int] = []
    with pytest.warns(ConvergenceWarning, match="LiSSA failed for 2 of 2 .*NaN or infinity in data") as caught:
        x, report = lissa(
            sampled.damped(0.1),
            torch.eye(3)[:2],
            repeat=repeat,
            depth=50,
            scale=scale,
            callback=lambda *c: calls.append(0),
        )
    assert len(caught) == 1
    assert not isinstance(caught[0].message, DivergenceWarning)
    assert x.isnan().all()
    assert report.residual.isnan().all()
    assert not report.converged.any()
    assert len(calls) == (6 if scale == 2.0 else 0)  # at once


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_right_hand_side_that_is_not_finite_fails_alone(value: float) -> None:
    sampled, rows = minibatches(), torch.ones(2, 4, dtype=torch.float64)
    options: dict[str, Any] = {"repeat": 2, "depth": 60, "scale": 1.2}
    expected, _ = lissa(sampled.damped(0.5), rows, **options)
    rows[0, 1] = value
    with pytest.warns(ConvergenceWarning, match=r"LiSSA failed for 1 of 2 .*the right-hand side") as caught:
        x, report = lissa(sampled.damped(0.5), rows, **options)
    assert len(caught) == 1
    assert x[0].isnan().all()
    assert report.converged.tolist() == [False, True]
    assert torch.equal(x[1], expected[1])


def test_an_overflow_is_told_from_divergence() -> None:
    matrix, rows = torch.diag(torch.tensor([2.0**126, 2.0**123])), torch.full((1, 2), 1e5)
    with pytest.warns(ConvergenceWarning, match=r"exceeded the range of torch.float32") as caught:
        x, report = lissa(matrix, rows, depth=50, scale=2.0**126)
    assert not isinstance(caught[0].message, DivergenceWarning)
    assert x.isnan().all()
    x, report = lissa(matrix.double(), rows.double(), depth=50, scale=2.0**126)
    assert_close(x, rows.double() / matrix.diagonal(), operations=50, inherent=0.875**51)
    assert report.converged.all()


def test_divergence_so_fast_that_it_overflows_is_divergence() -> None:
    with pytest.warns(DivergenceWarning, match=r"scale=1e-39 is below half .* raise scale, to 1\."):
        x, _ = lissa(torch.eye(2), torch.ones(2), depth=50, scale=1e-39)
    assert x.isnan().all()


# -- a GPU's lateness -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["in the middle of a run", "after its last step"])
def test_noticing_one_step_late_changes_no_result(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens on a GPU."""
    matrices = torch.stack([torch.diag(torch.tensor([9.0, 1.0, a])) for a in (0.5, 1.0)]).double()
    rows = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    noticed = steps_to_notice(matrices, rows[0], 2.0)
    depth = 40 if where == "in the middle of a run" else noticed
    calls: list[int] = []

    def solve(b: Tensor) -> tuple[Tensor, SolveReport]:
        options: dict[str, Any] = {"repeat": 2, "depth": depth, "scale": 2.0, "on_failure": "ignore"}
        return lissa(Minibatches(matrices).damped(0.0), b, callback=lambda *_: calls.append(0), **options)

    punctual, expected = solve(rows)
    late: list[tuple[int, Tensor]] = []

    def known(self: Series, step: int, squares: Tensor) -> tuple[int, Tensor] | None:
        late.append((step, squares))
        return late[-2] if step else None

    monkeypatch.setattr(Series, "_known", known)
    monkeypatch.setattr(Series, "_last_known", lambda self: late[-1])
    x, report = solve(rows)
    assert x[0].isnan().all()
    assert torch.equal(x[1], punctual[1])
    assert torch.equal(report.converged, expected.converged)
    assert torch.equal(report.residual[1:], expected.residual[1:])
    calls.clear()
    solve(rows[:1])
    assert len(calls) == min(noticed + 1, depth)


no_cuda = pytest.mark.skipif(bool(backend_info().cuda), reason=f"no native CUDA ops: {backend_info().cuda}")


@pytest.mark.cuda
@no_cuda
def test_a_run_does_not_wait_for_the_device_and_notices_divergence() -> None:
    matrix = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64, device="cuda"))
    rows = torch.ones(2, 2, dtype=torch.float64, device="cuda")
    series = Series(rows, 40, 1.5, 0.0, None)
    source = LeastSquares(matrix.sqrt() * 2**0.5, 1)
    source.sampled = lambda steps, generator: iter([Dense(matrix)] * steps)  # type: ignore[method-assign]
    series.run(source, 1, None, None, None)  # loads what is loaded at first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        series.run(source, 1, None, None, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(series.solution().cpu(), (rows / matrix.diagonal()).cpu(), operations=80, inherent=(2 / 3) ** 40)
    with pytest.warns(DivergenceWarning, match="raise scale"):
        x, report = lissa(matrix, rows, depth=10**4, scale=0.1)
    assert x.isnan().all()
    assert int(report.iterations[0]) < 10
