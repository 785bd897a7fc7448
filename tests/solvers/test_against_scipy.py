"""Conjugate gradients beside SciPy's; and "converged" against the true residual, over condition numbers and dtypes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import scipy.sparse.linalg
import torch
from oracles import with_spectrum
from torch import Tensor

from torch_influence.solvers import block_cg, cg, direct

RTOL = 1e-8


def system(seed: int) -> tuple[Tensor, Tensor, float]:
    """A random matrix, definite for even seeds, a right-hand side, and the condition number.

    Where many more iterations than dimensions are needed, how many is up to rounding: conditions stay below that.
    """
    torch.manual_seed(seed)
    d = int(torch.randint(20, 120, ()))
    indefinite = seed % 2 == 1
    condition = 10 ** float(torch.rand(()) * (1.3 if indefinite else 3.0))
    eigenvalues = torch.logspace(0, -math.log10(condition), d, dtype=torch.float64)
    if indefinite:
        eigenvalues = torch.where(torch.rand(d) < 0.2, -eigenvalues, eigenvalues)
    return with_spectrum(eigenvalues), torch.randn(d, dtype=torch.float64), condition


@pytest.mark.parametrize("seed", range(50))
def test_solution_and_iterations_are_those_of_scipy(seed: int) -> None:
    matrix, b, condition = system(seed)
    steps: list[Any] = []
    theirs, failed = scipy.sparse.linalg.cg(matrix.numpy(), b.numpy(), rtol=RTOL, callback=steps.append)
    ours, report = cg(matrix, b, rtol=RTOL, on_failure="ignore")
    assert not failed
    assert report.converged.all()
    # Both have a residual within RTOL |b|: their difference is A⁻¹ times one within twice that.
    difference = (ours - torch.from_numpy(theirs)).norm()
    assert difference <= 2 * RTOL * b.norm() * condition
    assert abs(int(report.iterations) - len(steps)) <= 0.1 * len(steps)


@pytest.mark.parametrize("solver", [cg, block_cg, direct], ids=["cg", "block_cg", "direct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("exponent", range(7))
@pytest.mark.parametrize("smooth", [False, True], ids=["any b", "b in the range of A²"])
def test_converged_is_true_only_where_the_true_residual_is_within_tolerance(
    solver: Callable[..., Any], dtype: torch.dtype, exponent: int, smooth: bool
) -> None:
    torch.manual_seed(exponent)
    d = 60
    matrix = with_spectrum(torch.logspace(0, -exponent, d, dtype=torch.float64))
    rows = torch.randn(4, d, dtype=torch.float64)
    matrix, rows = matrix.to(dtype), (rows @ matrix @ matrix if smooth else rows).to(dtype)
    options = {} if solver is direct else {"rtol": 1e-5}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x, report = solver(matrix, rows, **options)
    residual = (rows.double() - x.double() @ matrix.double()).norm(dim=1) / rows.double().norm(dim=1)
    # The report's residual is computed in the rows' dtype: it may be off by the rounding of b - Ax, which is in 1-norms
    # at most d + 1 roundings of |A||x| + |b| in each entry.
    size = matrix.double().norm() * x.double().norm(dim=1) / rows.double().norm(dim=1)
    rounding = 0.5 * torch.finfo(dtype).eps * (d + 1) * (size + 1)
    assert (residual[report.converged] <= report.rtol + rounding[report.converged]).all()
    assert ((report.residual - residual).abs() <= rounding).all()
    assert torch.equal(report.converged, report.residual <= report.rtol)
    # Nothing is silent: what is neither converged nor at the limit with half of the digits right is warned of.
    poor = ~(report.converged | report.precision_limit & (report.residual <= torch.finfo(dtype).eps ** 0.5))
    assert len(caught) == int(poor.any())
