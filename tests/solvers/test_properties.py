"""Properties that hold for any system, and for any way to cut the data into batches: searched for counterexamples."""

from __future__ import annotations

import math
import os
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from oracles import Supervised, assert_close, half_squared_error, tolerance, with_spectrum
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import AutogradInfluenceModule, CGInfluenceModule, InfluenceModule
from torch_influence.linop import Dense, Dual
from torch_influence.solvers import DualFactor, Jacobi, block_cg, cg, direct, lissa, minres

hypothesis.settings.register_profile("suite", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=3000)  # other ones in each run
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

dtypes = st.sampled_from([torch.float32, torch.float64])
solvers = pytest.mark.parametrize("solver", [cg, block_cg, direct], ids=["cg", "block_cg", "direct"])


@st.composite
def systems(draw: st.DrawFn, most_rows: int = 5) -> tuple[Tensor, Tensor, float]:
    """A definite matrix [d, d], rows [k, d] of any size, zero and equal ones among them; and the condition number."""
    d, k = draw(st.integers(1, 12)), draw(st.integers(0, most_rows))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    condition = 10 ** draw(st.floats(0, 3)) if d > 1 else 1.0
    size = 10 ** draw(st.floats(-6, 6))
    spectrum = size * torch.logspace(0, -math.log10(condition), d, dtype=torch.float64)
    rows = torch.randn(k, d, dtype=torch.float64)
    for row in range(k):
        rows[row] *= draw(st.sampled_from([0.0, 1e-12, 1.0, 1.0, 1e12]))
        if row and draw(st.integers(0, 4)) == 0:
            rows[row] = rows[row - 1]
    dtype = draw(dtypes)
    return with_spectrum(spectrum).to(dtype), rows.to(dtype), condition


def options(solver: Any, rtol: float) -> dict[str, Any]:
    return {} if solver is direct else {"rtol": rtol}


@solvers
@hypothesis.given(systems())
def test_a_solve_keeps_its_word(solver: Any, system: tuple[Tensor, Tensor, float]) -> None:
    matrix, rows, condition = system
    before = matrix.clone(), rows.clone()
    rtol = 1e-4
    x, report = solver(matrix, rows, **options(solver, rtol))
    assert torch.equal(matrix, before[0])
    assert torch.equal(rows, before[1])
    assert x.shape == rows.shape
    assert x.dtype == rows.dtype
    assert report.converged.all()
    residual = (rows.double() - x.double() @ matrix.double()).norm(dim=1)
    size = rows.double().norm(dim=1)
    allowed = max(rtol, report.rtol) + tolerance(rows.dtype, operations=matrix.shape[0] + 1, condition=condition)
    assert (residual <= allowed * size).all()
    smallest, largest = report.eigenvalues
    if smallest == smallest:
        exact = torch.linalg.eigvalsh(matrix.double())
        slack = torch.finfo(rows.dtype).eps ** 0.5 * float(exact[-1])
        assert exact[0] - slack <= smallest <= largest <= exact[-1] + slack


@solvers
@hypothesis.given(systems(), st.randoms())
def test_the_order_of_rows_and_their_sizes_do_not_matter(
    solver: Any, system: tuple[Tensor, Tensor, float], random: Any
) -> None:
    matrix, rows, condition = system
    d, order = matrix.shape[0], list(range(len(rows)))
    random.shuffle(order)
    rtol = 10 * tolerance(rows.dtype, operations=d + 1, condition=condition)
    x, _ = solver(matrix, rows, **options(solver, rtol))
    y, _ = solver(matrix, 4.0 * rows[order], **options(solver, rtol))
    allowed = 2 * condition * (rtol + tolerance(rows.dtype, operations=d + 1, condition=condition))
    for mine, other in zip(x[order], y, strict=True):
        assert (4.0 * mine - other).norm() <= allowed * (4.0 * mine).norm()


def shifted(rows: Tensor, by: int) -> Tensor:
    """Rows times 2^by, which may be beyond float64 itself."""
    return torch.from_numpy(np.ldexp(rows.numpy(), by))


EVERY_SOLVER: dict[str, Any] = {
    "cg": cg,
    "cg with Jacobi": lambda A, B, **options: cg(A, B, M=Jacobi(), **options),
    "block_cg": block_cg,
    "minres": minres,
    "direct": lambda A, B, rtol, **options: direct(A, B, **options),
    "dual": lambda A, B, **options: DualFactor(Whole(A).damped(0.5 * float(A.diagonal().min()))).solve(B, **options),
    "lissa": lambda A, B, rtol, **options: lissa(A, B, depth=20, scale=float(A.norm()), repeat=2, **options),
}


class Whole(Dual):
    """A matrix as GᵀG with G = Lᵀ of its Cholesky factor."""

    multiple = 0.0

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.lower = matrix, torch.linalg.cholesky(matrix)
        self.size = self.rank = len(matrix)
        self.dtype, self.device = matrix.dtype, matrix.device

    def product(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix

    def push(self, rows: Tensor) -> Tensor:
        return rows @ self.lower

    def pull(self, rows: Tensor) -> Tensor:
        return rows @ self.lower.mT

    def assemble(self) -> Tensor:
        return self.lower.mT @ self.lower


@pytest.mark.parametrize("name", EVERY_SOLVER)
@hypothesis.given(system=systems(), share=st.floats(-1, 1))
@hypothesis.settings(max_examples=20)
def test_a_power_of_two_changes_no_digit(name: str, system: tuple[Tensor, Tensor, float], share: float) -> None:
    """Though squares of such rows are 0 or infinite: float64 ends at 2^±1022, float32 at 2^±126."""
    matrix, rows, _ = system
    matrix = matrix / matrix.diagonal().mean()  # so that x is about as large as b
    rows = torch.where(rows.abs() > 1e6, rows * 1e-12, rows)
    by = int(share * (80 if rows.dtype == torch.float32 else 900))
    solver = EVERY_SOLVER[name]
    x, report = solver(matrix, rows, rtol=1e-3, on_failure="ignore")
    y, shifted_report = solver(matrix, shifted(rows, by), rtol=1e-3, on_failure="ignore")
    assert torch.equal(y, shifted(x, by))
    assert torch.equal(shifted_report.iterations, report.iterations)
    assert torch.equal(shifted_report.converged, report.converged)
    torch.testing.assert_close(shifted_report.residual, report.residual, rtol=1e-14, atol=0, equal_nan=True)
    if report.standard_error is not None:
        torch.testing.assert_close(shifted_report.standard_error, report.standard_error, rtol=1e-14, atol=0)


@hypothesis.given(systems(most_rows=3), st.floats(0, 10))
def test_damping_moves_the_matrix(system: tuple[Tensor, Tensor, float], damp: float) -> None:
    matrix, rows, condition = system
    damp *= float(matrix.norm())
    moved = matrix + damp * torch.eye(len(matrix), dtype=matrix.dtype)
    rtol = 10 * tolerance(rows.dtype, operations=len(matrix) + 1, condition=condition)
    x, _ = cg(Dense(matrix).damped(damp), rows, rtol=rtol)
    y, _ = direct(moved, rows)
    allowed = condition * (rtol + 4 * tolerance(rows.dtype, operations=len(matrix) + 1, condition=condition))
    for mine, other in zip(x, y, strict=True):
        assert (mine - other).norm() <= allowed * other.norm()


# -- systems that rounding fools --------------------------------------------------------------------------------------


@st.composite
def at_the_limit(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A matrix [d, d] that float32 can hardly solve, rows [k, d], and options: solvers restart often here."""
    d, k = draw(st.integers(10, 150)), draw(st.integers(1, 20))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    lowest = -draw(st.floats(5, 9))
    kind = draw(st.sampled_from(["even", "clusters", "few small", "few large"]))
    if kind == "even":
        exponents = torch.linspace(lowest, 0.0, d, dtype=torch.float64)
    else:
        places = torch.linspace(lowest, 0.0, draw(st.integers(3, 5)) if kind == "clusters" else 2, dtype=torch.float64)
        some = torch.arange(d) < draw(st.integers(1, 5))
        at = torch.randint(len(places), (d,)) if kind == "clusters" else (some == (kind == "few large")).long()
        exponents = places[at] + 1e-3 * torch.rand(d, dtype=torch.float64)
    spectrum = 10 ** (exponents + draw(st.floats(-4, 4)))
    negative = torch.rand(d) < draw(st.sampled_from([0.0, 0.0, 0.0, 0.02, 0.5]))
    basis = torch.eye(d, dtype=torch.float64)
    if draw(st.booleans()):
        basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    matrix = (basis * torch.where(negative, -spectrum, spectrum)) @ basis.mT
    rows = torch.randn(k, d, dtype=torch.float64) * spectrum ** draw(st.sampled_from([0.0, 0.5, 1.0])) @ basis.mT
    if draw(st.booleans()):
        few = rows[: draw(st.integers(1, k))]
        rows = torch.randn(k, len(few), dtype=torch.float64) @ few
    steps = draw(st.sampled_from([4 * d, 4 * d, 4 * d, d // 5]))
    options: dict[str, Any] = {"rtol": 10 ** draw(st.floats(-9, -3)), "maxiter": steps}
    if draw(st.integers(0, 3)) == 0:
        options["x0"] = torch.linalg.solve(matrix, rows.mT).mT.float()
    rows[0] *= draw(st.sampled_from([1.0, 1.0, 0.0, math.nan]))
    return (0.5 * (matrix + matrix.mT)).float(), rows.float(), options


@pytest.mark.parametrize("solver", [block_cg, cg, minres], ids=["block_cg", "cg", "minres"])
@hypothesis.given(at_the_limit())
def test_what_is_said_of_a_solution_is_true(solver: Any, system: tuple[Tensor, Tensor, dict[str, Any]]) -> None:
    """``HYPOTHESIS_PROFILE=thorough pytest tests/solvers/test_properties.py -k is_true`` tries thousands."""
    matrix, rows, options = system
    x, report = solver(matrix, rows, on_failure="ignore", **options)
    A, b, size = matrix.double(), rows.double(), rows.double().norm(dim=1)
    known = report.residual.isfinite()
    assert torch.equal(x.isfinite().all(dim=1), known)
    assert torch.equal(x.isnan().any(dim=1), ~known)
    assert not ((report.converged | report.precision_limit) & ~known).any()
    assert not (report.converged & report.precision_limit).any()
    residual = (b - x.double() @ A).norm(dim=1)[known]
    # Each entry of b - Ax is a sum of d + 1 terms in float32.
    rounding = tolerance(torch.float32, operations=len(A) + 1) * (b.abs() + x.double().abs() @ A.abs()).norm(dim=1)
    said = torch.where(size > 0, report.residual * size, report.residual)[known]
    assert ((residual - said).abs() <= rounding[known]).all()
    assert (report.residual[report.converged] <= options["rtol"]).all()
    reach = 64 * tolerance(torch.float32) * (float(torch.linalg.matrix_norm(A, 2)) * x.double().norm(dim=1) + size)
    assert (residual <= (reach + rounding)[known])[report.precision_limit[known]].all()


# -- batches ----------------------------------------------------------------------------------------------------------


@st.composite
def ragged(draw: st.DrawFn) -> dict[str, Any]:
    """A regression problem of any shape, and a way to cut its n examples into batches, in order."""
    n, inputs, outputs = draw(st.integers(1, 13)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=5))) if n > 1 else []
    return {
        "sizes": [stop - start for start, stop in zip([0, *cuts], [*cuts, n], strict=True)],
        "shape": (n, inputs, outputs),
        "batch_size": draw(st.integers(1, n + 2)),
        "drop_last": draw(st.booleans()),
        "shuffle": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32)),
        "dtype": draw(dtypes),
        "hidden": draw(st.integers(0, 3)),
        "cache": draw(st.sampled_from(["auto", False])),
    }


def problem(case: dict[str, Any], split: str) -> dict[str, Any]:
    n, inputs, outputs = case["shape"]
    torch.manual_seed(case["seed"])
    dtype, hidden = case["dtype"], case["hidden"]
    layers = (
        [nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)] if hidden else [nn.Linear(inputs, outputs)]
    )
    model = nn.Sequential(*layers).to(dtype)
    data = TensorDataset(torch.randn(n, inputs, dtype=torch.float64).to(dtype), torch.randn(n, outputs).to(dtype))
    if split == "whole":
        loader = DataLoader(data, batch_size=n)
    elif split == "batch_size":
        size = min(case["batch_size"], n)
        loader = DataLoader(data, batch_size=size, shuffle=case["shuffle"], drop_last=case["drop_last"])
    else:
        starts = [sum(case["sizes"][:i]) for i in range(len(case["sizes"]))]
        batches = [list(range(a, a + size)) for a, size in zip(starts, case["sizes"], strict=True)]
        loader = DataLoader(data, batch_sampler=batches)
    return {
        "model": model,
        "objective": Supervised(half_squared_error, l2=0.1),
        "train_loader": loader,
        "test_loader": DataLoader(data, batch_size=2),
        "device": "cpu",
        "damp": 30.0,  # definite, whatever the network
        "cache": case["cache"] if split != "whole" else "auto",
    }


@pytest.mark.parametrize(("split", "gnh"), [("batch_size", False), ("batch_sampler", True)])
@hypothesis.settings(max_examples=15)
@hypothesis.given(ragged())
def test_how_the_data_are_cut_changes_nothing(split: str, gnh: bool, case: dict[str, Any]) -> None:
    whole = CGInfluenceModule(**problem(case, "whole"), gnh=gnh)
    cut = CGInfluenceModule(**problem(case, split), gnh=gnh)
    n, inputs, outputs = case["shape"]
    d = len(whole.flat_parameters())
    torch.manual_seed(0)
    rows = torch.randn(2, d, dtype=torch.float64).to(case["dtype"])
    operations = 10 * (n + d) * max(inputs, outputs, 1)  # sums over examples and layers, forward, backward and again
    expected = whole.hvp(rows)
    assert_close(cut.hvp(rows), expected, operations=operations, scale=float(max(expected.abs().max(), 1.0)))
    gradient = whole.train_loss_grad(range(n))
    assert_close(cut.train_loss_grad(range(n)), gradient, operations=operations, scale=float(gradient.abs().max() + 1))
    scores = whole.influences(range(n), None, stest=rows[0])
    assert_close(
        cut.influences(range(n), None, stest=rows[0]),
        scores,
        operations=operations,
        scale=float(scores.abs().max() + 1),
    )


@pytest.mark.filterwarnings("error")
@hypothesis.given(ragged())
@hypothesis.settings(max_examples=15)
def test_every_solver_gives_the_same_scores_however_the_data_are_cut(case: dict[str, Any]) -> None:
    case["dtype"] = torch.float64
    exact = AutogradInfluenceModule(**problem(case, "whole"))
    expected = exact.influence_matrix()
    for solver in ("auto", "cg", "block", "direct"):
        scores = InfluenceModule(**problem(case, "batch_sampler"), solver=solver, rtol=1e-12).influence_matrix()
        # With A = damp·I and more: |s - s*| <= 1e-12 |b| / damp, and |s*| >= |b| / |A|.
        condition = 1 + float(exact.hess.norm()) / exact.damp
        operations = 1e-12 / tolerance(torch.float64) + 10 * sum(case["shape"]) ** 2
        size = float(expected.abs().max() + 1)
        assert_close(scores, expected, operations=operations, condition=condition, scale=size)
