"""What a SolveReport tells, in numbers, words and a picture."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import pytest
import torch
from oracles import assert_close, with_spectrum
from problems import module
from torch import Tensor

from torch_influence import CGInfluenceModule, InfluenceModule, SolveReport
from torch_influence.linop import Dense
from torch_influence.solvers import ConvergenceWarning, NegativeCurvatureWarning, block_cg, cg, direct

mpl.use("Agg")
pytestmark = pytest.mark.filterwarnings("error")
D, K = 40, 3
both = pytest.mark.parametrize("solver", [cg, block_cg], ids=["cg", "block_cg"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def matrix_of(*eigenvalues: float, condition: float = 50.0) -> Tensor:
    rest = torch.linspace(1.0, 1 / condition, D - len(eigenvalues), dtype=torch.float64)
    return with_spectrum(torch.cat([rest, torch.tensor(eigenvalues, dtype=torch.float64)]))


def rows_of(k: int = K) -> Tensor:
    return torch.randn(k, D, dtype=torch.float64)


# -- eigenvalues ------------------------------------------------------------------------------------------------------


@both
@dtypes
@pytest.mark.parametrize("outliers", [(), (3.0, 0.001), (-0.7,), (-0.2, -0.1, 5.0)], ids=str)
def test_eigenvalues_are_ritz_values(
    solver: Callable[..., Any], dtype: torch.dtype, outliers: tuple[float, ...]
) -> None:
    """They lie within the spectrum; once d products have been made, rounding aside, they are its ends."""
    torch.manual_seed(2)
    matrix = matrix_of(*outliers).to(dtype)
    exact = torch.linalg.eigvalsh(matrix.double())
    rounding = torch.finfo(dtype).eps ** 0.5 * float(exact.abs().max())
    for maxiter in (2, 4, 10 * D):
        _, report = solver(matrix, rows_of().to(dtype), rtol=1e-6, maxiter=maxiter, on_failure="ignore")
        smallest, largest = report.eigenvalues
        assert exact[0] - rounding <= smallest <= largest <= exact[-1] + rounding
    if report.converged.all():  # an eigenvector that b has a part of has been found
        assert smallest == pytest.approx(float(exact[0]), rel=0.05, abs=rounding)
        assert largest == pytest.approx(float(exact[-1]), rel=0.05)


@both
@dtypes
def test_eigenvalues_of_a_singular_matrix_stay_within_its_spectrum(
    solver: Callable[..., Any], dtype: torch.dtype
) -> None:
    """Where p'Ap is rounding, so are the step and what follows: that must not pass for negative curvature."""
    matrix = with_spectrum(torch.cat([torch.linspace(0.5, 2.0, D - 4), torch.zeros(4)])).to(dtype)
    _, report = solver(matrix, rows_of().to(dtype), on_failure="ignore")
    assert not report.converged.any()
    assert not report.negative_curvature.any()
    rounding = torch.finfo(dtype).eps ** 0.5 * 2.0
    assert -rounding <= report.eigenvalues[0] <= report.eigenvalues[1] <= 2.0 + rounding


def test_eigenvalues_with_a_preconditioner_are_those_of_the_product() -> None:
    matrix = matrix_of()
    weights = torch.logspace(0, 1, D, dtype=torch.float64)
    root = weights.sqrt()
    exact = torch.linalg.eigvalsh(root[:, None] * matrix * root)
    _, report = cg(matrix, rows_of(), M=torch.diag(weights), rtol=1e-10)
    assert report.eigenvalues == pytest.approx((float(exact[0]), float(exact[-1])), rel=0.01)


@both
def test_no_iteration_sees_no_eigenvalue(solver: Callable[..., Any]) -> None:
    for rows in (torch.zeros(K, D, dtype=torch.float64), rows_of(0)):
        _, report = solver(matrix_of(), rows)
        assert all(math.isnan(value) for value in report.eigenvalues)
        assert "eigenvalues" not in str(report)


# -- history, truncation ----------------------------------------------------------------------------------------------


@both
def test_history_has_each_iteration_of_each_row(solver: Callable[..., Any]) -> None:
    torch.manual_seed(3)
    matrix, rows = matrix_of(), rows_of()
    rows[1] *= 1e3
    _, report = solver(matrix, rows, rtol=1e-8, history=True)
    history = report.history
    assert history.dtype == torch.float64
    assert history.shape == (int(report.iterations.max()) + 1, K)
    assert torch.equal(history[0], torch.ones(K, dtype=torch.float64))
    assert torch.equal((~history[1:].isnan()).sum(dim=0), report.iterations)
    last = history[report.iterations, torch.arange(K)]
    # In float64 at this condition the recurrence has drifted by rounding alone.
    assert_close(last, report.residual, operations=D * int(report.iterations.max()), scale=1.0)
    _, short = solver(matrix, rows, rtol=1e-8)
    assert short.history is None


def test_history_is_of_the_true_residuals_of_the_iterates() -> None:
    matrix, b = matrix_of(), rows_of(1)
    iterates: list[Any] = []
    _, report = cg(matrix, b, rtol=1e-8, history=True, callback=iterates.append)
    true = torch.stack([(b[0] - torch.from_numpy(x) @ matrix).norm() for x in iterates]) / b.norm()
    assert_close(report.history[1:, 0], true, operations=D * len(iterates), scale=1.0)


def test_truncation_stops_before_the_direction_of_negative_curvature() -> None:
    torch.manual_seed(4)
    matrix, rows = matrix_of(-0.5), rows_of()
    iterates: list[Tensor] = []
    with pytest.warns(NegativeCurvatureWarning), pytest.warns(ConvergenceWarning):
        x, report = cg(matrix, rows, truncate=True)
    assert report.negative_curvature.all()
    assert not report.converged.any()
    for row, b in enumerate(rows):
        iterates.clear()
        _, alone = cg(matrix, b, on_failure="ignore", callback=lambda it: iterates.append(torch.from_numpy(it.copy())))
        taken = int(report.iterations[row])
        assert 0 < taken < int(alone.iterations)
        assert_close(x[row], iterates[taken - 1], operations=D * taken, condition=50.0)
        # Up to there x minimises ½ x'Ax - b'x over a space on which A is positive definite: it decreases.
        energy = [0.5 * it @ matrix @ it - b @ it for it in iterates[:taken]]
        assert all(later < earlier for earlier, later in itertools.pairwise(energy))


def test_truncation_changes_nothing_where_the_matrix_is_definite() -> None:
    matrix, rows = matrix_of(), rows_of()
    x, report = cg(matrix, rows, truncate=True)
    y, _ = cg(matrix, rows)
    assert torch.equal(x, y)
    assert report.converged.all()


# -- words and pictures -----------------------------------------------------------------------------------------------


def test_a_report_prints_as_a_table() -> None:
    _, report = cg(matrix_of(), rows_of(), rtol=1e-4)
    lines = str(report).splitlines()
    assert lines[0].startswith("conjugate gradients: 3 of 3 converged, ")
    assert lines[1].split() == ["row", "iterations", "residual", "state"]
    for row, line in enumerate(lines[2:5]):
        cells = line.split()
        assert [int(cells[0]), int(cells[1])] == [row, int(report.iterations[row])]
        assert float(cells[2]) == pytest.approx(float(report.residual[row]), rel=0.1)
        assert cells[3] == "converged"
    assert lines[5].startswith("eigenvalues seen: 0.0")
    assert repr(report) == f"<SolveReport: {lines[0]}>"


def test_of_many_rows_the_worst_are_shown() -> None:
    rows = rows_of(30)
    rows[17, 0] = float("nan")
    with pytest.warns(ConvergenceWarning):
        _, report = cg(matrix_of(), rows)
    lines = str(report).splitlines()
    assert lines[2].split() == ["17", "0", "nan", "NOT", "KNOWN"]
    assert len(lines) == 2 + 8 + 1 + 1
    assert lines[10].strip() == "these are the worst of 30"


def test_no_rows_have_a_report() -> None:
    _, report = cg(matrix_of(), rows_of(0))
    assert str(report) == "conjugate gradients: no right-hand sides"


@pytest.mark.parametrize("history", [False, True])
def test_the_plot_has_the_rows_and_the_tolerance(history: bool) -> None:
    with pytest.warns(ConvergenceWarning):
        _, report = cg(matrix_of(condition=1e3), rows_of(), rtol=1e-3, maxiter=12, history=history)
    axes = report.plot()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[-1] == "rtol = 0.001"
    assert labels[0].startswith(("converged (", "not converged ("))
    assert sum(int(label.split("(")[1][:-1]) for label in labels[:-1]) == K
    assert axes.get_xlabel() == ("iteration" if history else "right-hand side")
    assert report.plot(ax=axes) is axes


def test_a_report_can_be_copied_and_pickled() -> None:
    _, report = block_cg(matrix_of(), rows_of())
    for again in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert str(again) == str(report)


# -- of several solves ------------------------------------------------------------------------------------------------


def test_reports_of_parts_join_into_one() -> None:
    matrix, rows = matrix_of(), rows_of(5)
    _, whole = cg(matrix, rows, history=True)
    parts = [cg(matrix, part, history=True)[1] for part in rows.split(2)]
    joined = SolveReport.joined(parts)
    assert torch.equal(joined.iterations, whole.iterations)
    torch.testing.assert_close(joined.residual, whole.residual)
    torch.testing.assert_close(joined.history, whole.history, equal_nan=True)
    assert joined.products == sum(part.products for part in parts)
    assert joined.eigenvalues == pytest.approx(whole.eigenvalues)
    assert joined.method == whole.method
    mixed = SolveReport.joined([parts[0], direct(matrix, rows)[1]])
    assert mixed.method == "conjugate gradients and Cholesky"
    assert mixed.history is None
    assert mixed.eigenvalues == parts[0].eigenvalues


def test_last_report_is_of_the_whole_public_call(monkeypatch: pytest.MonkeyPatch) -> None:
    it = module(CGInfluenceModule)
    assert it.last_report is None
    monkeypatch.setattr("torch_influence.memory.free_memory", lambda device: 2 * 4 * 8 * 8 * 43)  # tiles of two queries
    it.influence_matrix()
    assert len(it.last_report.iterations) == 7
    it.influences([0, 1], [0])
    assert len(it.last_report.iterations) == 1
    report = it.last_report
    it.influences([0, 1], None, stest=torch.ones(43, dtype=torch.float64))  # solves nothing
    it.hvp(torch.ones(43, dtype=torch.float64))
    assert it.last_report is report


@pytest.mark.parametrize("solver", ["direct", "cg", "block"])
def test_every_solver_of_the_front_door_reports(solver: str) -> None:
    it = module(InfluenceModule, damp=1.0, solver=solver)
    s = it.stests()
    residual = (it.hvp(s) + s - torch.stack([it.test_loss_grad([i]) for i in range(7)])).norm(dim=1)
    assert it.last_report.converged.all()
    size = torch.stack([it.test_loss_grad([i]) for i in range(7)]).norm(dim=1)
    assert_close(it.last_report.residual, residual / size, operations=43 * 23, scale=1.0)


def test_a_dense_operator_reports_what_a_matrix_does() -> None:
    matrix, rows = matrix_of(), rows_of()
    x, report = cg(Dense(matrix), rows)
    y, other = cg(matrix.numpy(), rows.numpy())
    assert torch.equal(x, y)
    assert torch.equal(report.residual, other.residual)
