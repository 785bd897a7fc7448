"""Random combinations of rows: how often they miss a residual that is not what the recurrence says."""

from __future__ import annotations

import math

import pytest
import torch
from matrices import positive_definite
from oracles import assert_close
from torch import Tensor

from torch_influence.solvers._combinations import MISSED, Combinations, missed, number_of_combinations, safety

D, K, RUNS = 30, 40, 1000
WITHIN = 1e-3  # the tolerance of each residual


def closed_form(combinations: int, factor: float) -> float:
    """P(χ²ₛ <= s / factor²), by the error function for one variable and by a Poisson sum for an even number."""
    half = combinations / (2 * factor**2)
    if combinations == 1:
        return math.erf(half**0.5)
    # In terms of what is left: 1 - Σ_{j < s/2} would cancel.
    return math.exp(-half) * sum(half**j / math.factorial(j) for j in range(combinations // 2, combinations // 2 + 40))


@pytest.mark.parametrize("factor", [2.0, 10.0, 100.0])
@pytest.mark.parametrize("combinations", [1, 2, 8, 32])
def test_the_probability_of_missing_a_factor(combinations: int, factor: float) -> None:
    assert missed(combinations, factor) == pytest.approx(closed_form(combinations, factor), rel=1e-9)


def test_the_probabilities_that_are_told() -> None:
    assert missed(1, 10.0) == pytest.approx(0.0797, rel=1e-3)
    assert missed(2, 10.0) == pytest.approx(0.00995, rel=1e-3)
    assert missed(8, 10.0) < 2e-7


@pytest.mark.parametrize("combinations", [1, 2, 8, 31])
def test_the_bound_is_missed_once_in_a_million(combinations: int) -> None:
    assert missed(combinations, safety(combinations)) == pytest.approx(MISSED, rel=1e-6)
    assert missed(combinations, 2 * safety(combinations)) < MISSED


def estimates(combinations: int, factor: float) -> Tensor:
    """Of |δ| in tolerances, in runs in which one row's residual is ``factor`` tolerances off the recurrence's."""
    matrix = positive_definite(D, 10.0)
    generator = torch.Generator().manual_seed(0)
    found = []
    for seed in range(RUNS):
        told = WITHIN * torch.rand(K, D, generator=generator, dtype=torch.float64) / D**0.5
        b = torch.randn(K, D, generator=generator, dtype=torch.float64)
        x = torch.linalg.solve(matrix, (b - told).mT).mT
        wrong = int(torch.randint(K, (), generator=generator))
        direction = torch.randn(D, generator=generator, dtype=torch.float64)
        x[wrong] += torch.linalg.solve(matrix, factor * WITHIN * direction / direction.norm())
        few = Combinations(K, D, b.dtype, "cpu", combinations, seed)
        every, unit = torch.arange(K), torch.full((K,), WITHIN, dtype=torch.float64)
        few.tell(every[:10], unit[:10], torch.eye(K, dtype=torch.float64)[:10], told)  # in parts, as rows are done
        few.tell(every[10:], unit[10:], torch.eye(K, dtype=torch.float64)[10:], told)
        found.append(few.apart(few.of(every, unit, b) - few.of(every, unit, x) @ matrix) / few.factor)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("combinations", [1, 2, 8])
def test_a_residual_that_is_ten_times_too_large_is_missed_as_often_as_the_formula_says(combinations: int) -> None:
    misses = int((estimates(combinations, 10.0) < 1.0).sum())
    p = missed(combinations, 10.0)
    # Five standard deviations of a binomial variable, and none where none is expected.
    spread = 5 * (RUNS * p * (1 - p)) ** 0.5
    assert abs(misses - RUNS * p) <= spread + (0.5 if RUNS * p < 0.5 else 0.0)
    if combinations == 8:
        assert misses == 0


def test_the_estimate_is_unbiased() -> None:
    squares = estimates(8, 3.0).square()
    assert float(squares.mean()) == pytest.approx(9.0, rel=5 * (2 / 8 / RUNS) ** 0.5)


def test_as_many_combinations_as_rows_are_the_rows() -> None:
    few = Combinations(5, D, torch.float64, "cpu")
    assert few.exact
    rows = torch.randn(5, D, dtype=torch.float64)
    off = torch.zeros(5, D, dtype=torch.float64)
    off[3, 2] = 0.25
    unit = torch.full((5,), 0.5, dtype=torch.float64)
    few.tell(torch.arange(5), unit, torch.eye(5, dtype=torch.float64), rows)
    assert_close(few.of(torch.arange(5), unit, rows), rows / 0.5, operations=5)
    assert few.apart(few.of(torch.arange(5), unit, rows + off)) == pytest.approx(0.5)


@pytest.mark.parametrize(("rows", "combinations"), [(1, 1), (7, 7), (64, 8), (128, 8), (500, 31)])
def test_how_many_there_are(rows: int, combinations: int) -> None:
    assert number_of_combinations(rows) == combinations
