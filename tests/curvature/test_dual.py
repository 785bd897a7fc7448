"""Dual systems against dense float64: what they are made of, what they solve, and when there are none."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from heads import HEADS, NO_HEADS, Case, N, classes, linear, padded, real, sequences, two_layers, uses
from oracles import assert_close, tolerance, with_spectrum
from torch import Tensor, nn
from torch.nn import functional as F

from torch_influence.curvature import GaussNewton, LinearHead
from torch_influence.linop import Dense, Dual
from torch_influence.plan import NotPossible
from torch_influence.solvers import ConvergenceWarning, DualFactor

# Losses that couple the examples of a batch are among the cases; test_errors.py has what is said of them.
pytestmark = pytest.mark.filterwarnings(
    "error", "ignore:.* over the batch, got something else", "ignore:the training loss has no curvature"
)

SWEEPS = 4  # forward, backward, and the two of the second derivative
ROOM = 2.0**30
DAMP = 0.1


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3))


CASES = {
    name: (HEADS | NO_HEADS)[name]
    for name in (
        "softmax",
        "class weights",
        "the weight alone",
        "logistic",
        "Dogfish",
        "squared error",
        "the weight alone, blocks",
        "frozen trunk",
        "two layers",
        "two layers, class weights, data sorted",
        "two layers, padding",
        "sequences",
    )
} | {
    "two layers, squared error": Case(two_layers, F.mse_loss, real, ""),
    "conv net": Case(conv_net, F.cross_entropy, classes, "", inputs=lambda n: torch.randn(n, 1, 5, 5)),
    "an output that is the whole batch's": Case(
        uses(lambda head, x: head(x).sum(1).mean()), lambda o, t: (o - t.mean()) ** 2, real, "", inputs=sequences
    ),
}
SINGULAR = {"softmax", "class weights", "the weight alone", "frozen trunk", "two layers", "conv net", "sequences"} | {
    name for name in CASES if name.startswith("two layers,") and name != "two layers, squared error"
}  # softmax does not see a constant added to its outputs


def found(case: Case, dtype: torch.dtype = torch.float64, gnh: bool = True, **options: Any) -> Dual:
    values = {"damp": DAMP, "room": ROOM} | options
    return case.module(dtype, gnh)._problem.curvature().dual(values["damp"], values["room"])


def assert_solved(matrix: Tensor, x: Tensor, rows: Tensor, rtol: float, operations: float) -> None:
    """Each row by its own size: |x - A⁻¹b| <= cond(A) (residual asked for + rounding in products) |A⁻¹b|."""
    expected = torch.linalg.solve(matrix, rows.double().mT).mT
    error, condition = (x.double() - expected).norm(dim=1), float(torch.linalg.cond(matrix))
    allowed = condition * (rtol + tolerance(x.dtype, operations=operations)) * expected.norm(dim=1)
    assert (error <= allowed).all(), f"{error} where {allowed} is allowed"


def damped(matrix: Tensor, damp: float) -> Tensor:
    return matrix + damp * torch.eye(len(matrix), dtype=torch.float64)


# -- right ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_solves_equal_dense_ones(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    matrix, random_state = case.reference(gnh=True), torch.get_rng_state()
    d, rtol = len(matrix), 1e-5 if dtype == torch.float32 else 1e-12
    it = found(case, dtype)
    operations = SWEEPS * N * d
    unit, ones = torch.eye(d, dtype=dtype), torch.eye(it.rank, dtype=dtype)
    whole = it.pull(it.push(unit)).add_(unit, alpha=it.multiple)
    assert_close(whole, matrix, operations=operations, inherent=case.inherent)
    assert_close(it.kernel, it.push(it.pull(ones)).double(), operations=operations)
    factor = DualFactor(it.damped(DAMP))
    assert torch.equal(torch.get_rng_state(), random_state)  # nothing of this is a pass over the data

    rows = torch.randn(5, d, dtype=torch.float64).to(dtype)
    x, report = factor.solve(rows, rtol=rtol)
    assert report.converged.all(), report
    assert (report.residual <= rtol).all()
    assert_solved(damped(matrix, DAMP), x, rows, rtol + case.inherent, operations)


@pytest.mark.parametrize("name", CASES)
def test_as_many_rows_as_the_outputs_have_curvature(name: str) -> None:
    case = CASES[name]
    it, cost = found(case), case.module(gnh=True)._problem.curvature().dual_cost(DAMP)
    assert it.rank <= cost.rank
    if name in SINGULAR:
        assert it.rank == N * 2
    elif name != "an output that is the whole batch's":
        assert it.rank == N * (1 if name in {"logistic", "Dogfish"} else 3)


@pytest.mark.parametrize("name", ["softmax", "Dogfish", "a loss that joins the outputs"])
def test_linear_heads_need_no_gauss_newton(name: str) -> None:
    case = HEADS[name]
    it, matrix = found(case, gnh=False), case.reference()
    rows = torch.randn(3, len(matrix), dtype=torch.float64)
    x, report = DualFactor(it.damped(DAMP)).solve(rows, rtol=1e-11)
    assert report.converged.all()
    assert_solved(damped(matrix, DAMP), x, rows, 1e-11 + case.inherent, SWEEPS * N * len(matrix))


@pytest.mark.parametrize("name", ["softmax", "two layers"])
def test_other_damping_needs_another_factor_only(name: str) -> None:
    case = CASES[name]
    it, matrix = found(case), case.reference(gnh=True)
    kernel, rows = it.kernel, torch.randn(2, len(matrix), dtype=torch.float64)
    before = kernel.clone()
    for damp in (1.0, DAMP, -0.01):  # with the regulariser's 0.02 all are positive
        x, _ = DualFactor(it.damped(damp)).solve(rows, rtol=1e-12)
        assert_solved(damped(matrix, damp), x, rows, 1e-12, SWEEPS * N * len(matrix))
    assert it.kernel is kernel
    assert torch.equal(kernel, before)


def test_a_loss_without_curvature_leaves_the_damping() -> None:
    it = found(Case(two_layers, lambda outputs, targets: outputs.mean(), real, ""))
    assert it.rank == 0
    rows = torch.randn(2, it.size, dtype=torch.float64)
    x, report = DualFactor(it.damped(DAMP)).solve(rows, rtol=1e-14)
    assert report.converged.all()
    assert_close(x, rows / (DAMP + 0.02), operations=4)


# -- none -------------------------------------------------------------------------------------------------------------

WIDE = 12  # outputs: blocks take more than anything else


def concave(outputs: Tensor, targets: Tensor) -> Tensor:
    return -F.mse_loss(outputs, targets)


def kinked(outputs: Tensor, targets: Tensor) -> Tensor:
    """Has a slope at 0, and no curvature."""
    return (outputs - outputs.detach()).abs().pow(1.5).mean()


def of_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.square().sum() / len(targets)


def with_one_more(head: nn.Linear, x: Tensor) -> Tensor:
    z = head(x).sum(1)
    return z if len(z) == 1 else torch.cat([z, 0 * z[:1]])


REFUSED: dict[str, tuple[Case, dict[str, Any], str]] = {
    "Hessian": (NO_HEADS["two layers"], {"gnh": False}, "that of gnh=True has"),
    "regulariser that is not diagonal": (HEADS["regulariser that is not diagonal"], {}, "no multiple of the identity"),
    "regulariser that differs": (
        HEADS["regulariser with another factor for each"],
        {},
        "no multiple of the identity",
    ),
    "no damping": (Case(two_layers, F.mse_loss, real, "", regularizer=lambda p: 0.0), {"damp": 0.0}, "0, is not pos"),
    "negative damping": (NO_HEADS["two layers"], {"damp": -0.02}, "is not positive"),
    "concave": (Case(two_layers, concave, real, ""), {}, "negative eigenvalues: -"),
    "concave, head": (Case(linear(), concave, real, ""), {"gnh": False}, "negative eigenvalues: -"),
    "not finite": (Case(two_layers, kinked, real, ""), {}, "not finite"),
    "statistic of the batch": (NO_HEADS["statistic of the batch"], {}, "may join the outputs of different examples"),
    "no room for blocks": (
        Case(linear(WIDE), F.mse_loss, lambda n: torch.randn(n, WIDE), ""),
        {"cache": N * 8 * (4 + WIDE**2) - 1},
        "no room as a block per example",
    ),
    "no room": (NO_HEADS["two layers"], {"room": 10_000}, "51 outputs of all examples would take about"),
    "batches of different shapes": (
        Case(uses(lambda head, x: head(x)), of_squares, classes, "", inputs=sequences, batch=1, collate=padded),
        {},
        "outputs of different batches differ",
    ),
    "another shape for one example": (
        Case(uses(lambda head, x: head(x).sum(1).squeeze(0)), of_squares, classes, "", inputs=sequences),
        {},
        "one example differ in shape",
    ),
    "another number for one example": (
        Case(uses(with_one_more), of_squares, classes, "", inputs=sequences),
        {},
        "one example differ in number",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name: str) -> None:
    case, options, reason = REFUSED[name]
    curvature = case.module(
        gnh=options.get("gnh", True), **{key: options[key] for key in ("cache",) if key in options}
    )._problem.curvature()
    with pytest.raises(NotPossible) as refused:
        curvature.dual(options.get("damp", DAMP), options.get("room", ROOM))
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["softmax", "logistic", "two layers"])
def test_room_is_asked_for_before_anything_is_computed(name: str) -> None:
    curvature = CASES[name].module(gnh=True)._problem.curvature()
    assert isinstance(curvature, LinearHead if name != "two layers" else GaussNewton)
    cost = curvature.dual_cost(DAMP)
    it = curvature.dual(DAMP, cost.nbytes)
    with pytest.raises(NotPossible):
        curvature.dual(DAMP, cost.nbytes - 1)
    held = [it.kernel, DualFactor(it.damped(DAMP))._lower, *(t for t in vars(it).values() if isinstance(t, Tensor))]
    assert sum(t.nbytes for t in held) <= cost.nbytes
    assert cost.operations >= it.rank**3 / 3
    assert cost.operations_per_row >= 2 * curvature.operations


# -- the solver -------------------------------------------------------------------------------------------------------

D, M = 60, 20


class Explicit(Dual):
    """G in memory, and a product that may be that of another matrix."""

    def __init__(self, g: Tensor, multiple: float = 0.0, product_multiple: float | None = None) -> None:
        self.g, self.multiple = g, multiple
        self.product_multiple = multiple if product_multiple is None else product_multiple
        self.rank, self.size = g.shape
        self.dtype, self.device = g.dtype, g.device

    def product(self, rows: Tensor) -> Tensor:
        return self.pull(self.push(rows)).add_(rows, alpha=self.product_multiple)

    def push(self, rows: Tensor) -> Tensor:
        return rows @ self.g.mT

    def pull(self, rows: Tensor) -> Tensor:
        return rows @ self.g

    def assemble(self) -> Tensor:
        return self.g @ self.g.mT


def thin(condition: float = 10.0) -> Tensor:
    """G [M, D] whose largest singular value is 1, and whose smallest the inverse of ``condition``."""
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), M, dtype=torch.float64)
    return with_spectrum(values) @ torch.linalg.qr(torch.randn(D, M, dtype=torch.float64)).Q.mT


def test_small_damping_in_float32_is_refined() -> None:
    """Rows that G spans: b / σ is a thousand times as large as the solution, and so are the digits that cancel."""
    it, sigma, rtol = Explicit(thin().float()), 1e-5, 1e-5
    rows = it.pull(torch.randn(3, M))
    factor = DualFactor(it.damped(sigma))
    matrix = damped(it.g.double().mT @ it.g.double(), sigma)

    def residuals(x: Tensor) -> Tensor:
        return (rows.double() - x.double() @ matrix).norm(dim=1)

    x, report = factor.solve(rows, rtol=rtol)
    size = rows.double().norm(dim=1)
    assert (residuals(factor._solve(rows)) > 4 * rtol * size).all()
    assert report.converged.all()
    assert (report.iterations >= 1).all()
    assert report.products == int(report.iterations.max()) + 1
    # Besides: rounding in the product with x that judges it, sums of D and then M terms; |A| = 1.
    rounding = tolerance(torch.float32, operations=D + M) * x.double().norm(dim=1)
    assert (residuals(x) <= rtol * size + rounding).all()


def test_what_the_arithmetic_does_not_reach_is_said() -> None:
    factor = DualFactor(Explicit(thin().float()).damped(1e-3))
    rows = torch.randn(3, D)
    _, report = factor.solve(rows, rtol=1e-12)
    assert not report.converged.any()
    assert report.precision_limit.all()


def test_the_residual_is_that_of_the_product() -> None:
    """A kernel of another matrix never passes for the solution."""
    factor = DualFactor(Explicit(thin(), 1.0, product_multiple=4.0).damped(0.5))
    rows = torch.randn(3, D, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="3 of 3 right-hand sides"):
        x, report = factor.solve(rows)
    assert not (report.converged | report.precision_limit).any()
    matrix = damped(factor.dual.g.mT @ factor.dual.g, 4.5)
    assert_close(report.residual, (rows - x @ matrix).norm(dim=1) / rows.norm(dim=1), operations=4 * D * M)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_of_all_sizes(dtype: torch.dtype) -> None:
    g = thin().to(dtype)
    factor = DualFactor(Explicit(g, 0.25).damped(0.25))
    sizes = torch.tensor([1.0, 1e-20, 1e20, 0.0], dtype=dtype)[:, None]
    rows = torch.cat([torch.randn(4, D, dtype=dtype) * sizes, torch.full((1, D), torch.nan, dtype=dtype)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of the row that is not finite
        x, report = factor.solve(rows)
    assert report.converged.tolist() == [True] * 4 + [False]
    assert not x[3].any()
    assert report.residual[3] == 0
    assert_solved(damped(g.double().mT @ g.double(), 0.5), x[:3], rows[:3], 1e-5, 4 * D * M)
    nothing, _ = factor.solve(rows[:0])
    assert nothing.shape == (0, D)
    _, report = factor.solve(rows[:1], rtol=0.0, atol=float(rows[0].norm()) * 1e-3)
    assert report.converged.all()


def test_mistakes_are_named() -> None:
    it = Explicit(thin().float(), 0.5)
    with pytest.raises(TypeError, match="Dual"):
        DualFactor(Dense(torch.eye(3)).damped(1.0))
    for damp in (-0.5, -1.0, float("nan")):
        with pytest.raises(ValueError, match="damp: expected one that makes damping plus regulariser positive"):
            DualFactor(it.damped(damp))
    with pytest.raises(ValueError, match="not finite"):
        DualFactor(Explicit(it.g * torch.nan, 0.5).damped(1.0))
    twice = torch.cat([it.g, it.g[::2] + it.g[1::2]])
    with pytest.raises(torch.linalg.LinAlgError, match=r"less than the rounding of torch\.float32"):
        DualFactor(Explicit(twice * 1e3, 0.0).damped(1e-12))


def test_the_factor_has_the_regulariser_and_the_damping_in_it() -> None:
    """Refinement would make up for one that has not, at the price of its rounds."""
    factor = DualFactor(Explicit(torch.randn(3, 20, dtype=torch.float64), multiple=0.5).damped(0.25))
    assert factor.sigma == 0.75
    _, report = factor.solve(torch.randn(4, 20, dtype=torch.float64), rtol=1e-8)
    assert report.converged.all()
    assert not report.iterations.any()
