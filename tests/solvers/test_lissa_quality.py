"""What LiSSA says of the quality of its estimate: standard errors, the residual, too little depth."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from oracles import assert_close, tolerance, with_spectrum
from test_lissa import K, LeastSquares, dtypes, few_steps, generator, light, neumann_sum, number_in, sparse
from torch import Tensor

from torch_influence.solvers import AutoScale, ConvergenceWarning, NegativeCurvatureWarning, lissa

pytestmark = pytest.mark.filterwarnings("error")


@dtypes
def test_the_standard_error_is_that_of_the_repeats(dtype: torch.dtype) -> None:
    runs: list[Tensor] = []
    operator = LeastSquares(light().to(dtype), 8).damped(0.05)
    rows = torch.randn(K, 12).to(dtype)
    options: dict[str, Any] = {"repeat": 7, "depth": 300, "generator": generator()}
    x, report = lissa(operator, rows, after_repeat=lambda run, x: runs.append(x.double()), **options)
    assert report.standard_error is not None
    sample = torch.stack(runs)
    variance = (sample - sample.mean(0)).square().sum(dim=(0, 2)) / 6
    expected = (variance / 7).sqrt() / sample.mean(0).norm(dim=1)
    # A difference of two runs has the rounding of the runs, which is their size by its own size larger.
    assert_close(
        report.standard_error, expected, operations=0, inherent=100 * torch.finfo(dtype).eps / float(expected.min())
    )
    assert str(report).count("std. error") == 1
    assert x.dtype == dtype


def test_the_standard_error_is_right_on_average() -> None:
    """E[se²] = E|mean - expectation|², over 150 solves of 4 repeats each; 5 standard errors of that comparison."""
    operator, damp, depth, scale = LeastSquares(light(), 4), 0.2, 60, 6.0
    rows = torch.randn(1, 12, dtype=torch.float64)
    matrix = operator.product(torch.eye(12, dtype=torch.float64)) + damp * torch.eye(12, dtype=torch.float64)
    expectation = neumann_sum(matrix, rows, depth, scale)
    draws, told, actual = generator(), [], []
    for _ in range(150):
        x, report = lissa(operator.damped(damp), rows, repeat=4, depth=depth, scale=scale, generator=draws)
        assert report.standard_error is not None
        told.append((float(report.standard_error) * float(x.norm())) ** 2)
        actual.append(float((x - expectation).norm()) ** 2)
    difference = torch.tensor(told) - torch.tensor(actual)
    assert abs(float(difference.mean())) <= 5 * float(difference.std()) / 150**0.5
    assert float(difference.std()) / 150**0.5 < 0.1 * sum(told) / 150  # or this would not say much


def test_rtol_stops_as_soon_as_the_standard_errors_are_within_it() -> None:
    operator, rows = LeastSquares(light(), 4).damped(0.05), torch.randn(K, 12, dtype=torch.float64)
    repeats: list[int] = []
    options: dict[str, Any] = {"depth": 400, "scale": 6.0, "after_repeat": lambda run, x: repeats.append(run)}
    x, report = lissa(operator, rows, repeat=50, rtol=0.04, generator=generator(), **options)
    taken = len(repeats)
    assert 2 < taken < 50
    assert report.products == taken * 400
    assert (report.iterations == taken * 400).all()
    assert report.converged.all()
    assert report.rtol == 0.04
    assert report.standard_error is not None
    assert report.standard_error.max() <= 0.04
    same, _ = lissa(operator, rows, repeat=taken, generator=generator(), **options)
    assert torch.equal(x, same)
    _, before = lissa(operator, rows, repeat=taken - 1, generator=generator(), **options)
    assert before.standard_error is not None
    assert before.standard_error.max() > 0.04


def test_an_rtol_that_is_not_reached_names_the_repeats_that_it_takes() -> None:
    operator, rows = LeastSquares(light(), 4).damped(0.05), torch.randn(K, 12, dtype=torch.float64)
    options: dict[str, Any] = {"depth": 400, "scale": 6.0, "rtol": 0.02}
    with pytest.warns(
        ConvergenceWarning, match=r"after 3 repeats .* standard error of .* where rtol=0.02 was"
    ) as caught:
        _, report = lissa(operator, rows, repeat=3, generator=generator(), **options)
    assert not report.converged.all()
    assert report.standard_error is not None
    worst = float(report.standard_error.max())
    needed = number_in("raise repeat, to about ", caught[0].message)
    assert needed - 1 < 3 * (worst / 0.02) ** 2 <= needed
    _, report = lissa(operator, rows, repeat=2 * int(needed), generator=generator(), **options)
    assert report.converged.all()


@dtypes
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 7, 8, 33, 64])
def test_the_residual_is_that_of_the_mean_of_the_last_steps(dtype: torch.dtype, depth: int) -> None:
    """Exactly, for a single operator."""
    matrix = with_spectrum(torch.linspace(0.1, 1.0, 8)).to(dtype)
    rows, scale = torch.randn(K, 8).to(dtype), 1.5
    iterates = [rows.double()]
    keep = lambda run, step, h: iterates.append(h.double())  # noqa: E731
    _, report = lissa(matrix, rows, depth=depth, scale=scale, callback=keep, **few_steps)
    half = max(1, depth // 2)
    segments = min(4, half)
    window = half // segments * segments
    mean = torch.stack(iterates[depth - window : depth]).mean(0) / scale
    expected = (rows.double() - mean @ matrix.double()).norm(dim=1) / rows.double().norm(dim=1)
    # h is up to depth + 1 times b, and h_D - h_{D/2} has its rounding.
    error = (report.residual - expected).abs().max()
    assert error <= tolerance(dtype, operations=8 * depth * (depth + 1))


def test_the_residual_of_many_repeats_is_that_of_the_expectation() -> None:
    """5 standard errors of the mean of single runs' residuals, which are computed here from their iterates."""
    operator, damp, depth, scale, repeat = LeastSquares(light(), 4), 0.2, 16, 6.0, 400
    rows = torch.randn(1, 12, dtype=torch.float64)
    matrix = operator.product(torch.eye(12, dtype=torch.float64)) + damp * torch.eye(12, dtype=torch.float64)
    iterates: list[Tensor] = []
    keep = lambda run, step, h: iterates.append(h)  # noqa: E731
    _, report = lissa(
        operator.damped(damp),
        rows,
        repeat=repeat,
        depth=depth,
        scale=scale,
        generator=generator(),
        callback=keep,
        **few_steps,
    )
    half = depth // 2
    changes = torch.stack(iterates).reshape(repeat, depth, 12)
    of_runs = (changes[:, -1] - changes[:, half - 1]) / half
    mean_of_estimates = sum(neumann_sum(matrix, rows, t, scale) for t in range(half, depth)) / half
    expected = float((rows - mean_of_estimates @ matrix).norm() / rows.norm())
    noise = float(of_runs.std(0).norm() / repeat**0.5 / rows.norm())
    assert abs(float(report.residual) - expected) <= 5 * noise
    assert 5 * noise < expected


def missing(matrix: Tensor, rows: Tensor, depth: int, scale: float) -> Tensor:
    """How much of the solution is missing in LiSSA's expectation, [k]."""
    expected = torch.linalg.solve(matrix, rows.mT).mT
    return (neumann_sum(matrix, rows, depth, scale) - expected).norm(dim=1) / expected.norm(dim=1)


DECAYS = {"flat": 0.0, "decaying": 1.0, "steep": 2.0}
quality = pytest.mark.parametrize("decay", DECAYS)


def decaying(decay: str, batch_size: int, d: int = 30) -> tuple[LeastSquares, Tensor, float]:
    """Eigenvalues j^-2decay, and damping of a hundredth of the largest."""
    operator = LeastSquares(
        torch.randn(3000, d, dtype=torch.float64) * torch.arange(1, d + 1).pow(-DECAYS[decay]), batch_size
    )
    matrix = operator.product(torch.eye(d, dtype=torch.float64))
    damp = 0.01 * float(torch.linalg.eigvalsh(matrix)[-1])
    return operator, matrix + damp * torch.eye(d, dtype=torch.float64), damp


@quality
@pytest.mark.parametrize(("batch_size", "repeat"), [(1, 1), (4, 4), (32, 1)])
def test_runs_of_enough_depth_are_silent_however_noisy(decay: str, batch_size: int, repeat: int) -> None:
    operator, matrix, damp = decaying(decay, batch_size)
    auto = AutoScale()
    auto.find(operator)
    scale = auto.scale(damp)
    assert scale is not None
    depth = int(3 * scale / damp)
    rows = torch.randn(10, 30, dtype=torch.float64)
    assert missing(matrix, rows, depth, scale).max() < 0.06
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, report = lissa(operator.damped(damp), rows, repeat=repeat, depth=depth, scale=scale, generator=generator())
    assert not [warning for warning in caught if "depth" in str(warning.message)]
    if repeat > 1 and report.standard_error is not None:  # noise is told of as what it is
        assert torch.equal(~report.converged, report.standard_error > 0.5)


@quality
@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("repeat", [1, 4])
def test_far_too_little_depth_is_told_and_the_depth_named_is_enough(decay: str, batch_size: int, repeat: int) -> None:
    operator, matrix, damp = decaying(decay, batch_size)
    scale = 6 * float(max(torch.linalg.matrix_norm(m.x, 2) ** 2 / batch_size for m in operator.sampled(30, None)))
    depth = next(
        t for t in (10, 20, 40, 80, 160, 320, 640) if missing(matrix, torch.eye(30).double(), 2 * t, scale).min() < 0.5
    )
    rows = torch.randn(10, 30, dtype=torch.float64)
    assert missing(matrix, rows, depth, scale).min() > 0.4
    options: dict[str, Any] = {"repeat": repeat, "scale": scale, "generator": generator()}
    with pytest.warns(
        ConvergenceWarning, match=f"10 of 10 .* depth={depth} is too small.*raise damp, or lower"
    ) as caught:
        _, report = lissa(operator.damped(damp), rows, depth=depth, **options)
    assert not report.converged.any()
    enough = number_in("3 scale/damp = ", caught[0].message)
    assert missing(matrix, rows, int(enough), scale).max() < 0.06


@pytest.mark.parametrize("repeat", [1, 4])
@pytest.mark.parametrize("smallest", [-0.02, -0.1])
def test_slow_growth_is_negative_curvature_and_not_too_little_depth(smallest: float, repeat: int) -> None:
    """Long before it would be called divergence: exp(-depth λ / scale) is e²."""
    mean, apart = with_spectrum(torch.linspace(smallest, 1.0, 6)), with_spectrum(torch.linspace(-0.01, 0.01, 6))
    rows, depth = torch.randn(K, 6, dtype=torch.float64), int(2 * 2.0 / -smallest)
    options: dict[str, Any] = {"repeat": repeat, "depth": depth, "scale": 2.0}
    with pytest.warns(NegativeCurvatureWarning, match=r"grew for 5 of 5 right-hand sides.*damping larger by") as caught:
        _, report = lissa([mean + apart, mean - apart], rows, generator=generator(), **options)
    assert len(caught) == 1
    assert report.negative_curvature.all()
    assert not report.converged.any()


def test_an_estimate_that_is_mostly_noise_is_told() -> None:
    """Of one run too, whose standard error is not known: it is guessed from its changes."""
    operator, rows = LeastSquares(sparse(d=60), 1), torch.randn(K, 60, dtype=torch.float64)
    for repeat in (1, 2):
        with pytest.warns(ConvergenceWarning, match="has a standard error of .* of its size; raise repeat") as caught:
            x, report = lissa(operator.damped(0.3), rows, repeat=repeat, depth=3000, scale=33.0, generator=generator())
        assert len(caught) == 1
        assert not report.converged.any()
        assert x.isfinite().all()
