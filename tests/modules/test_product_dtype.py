"""product_dtype=torch.bfloat16: products of the curvature are rounded, and what is said of solutions is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import dense_gauss_newton, dense_hessian, loader_batches
from problems import Classification
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import (
    AutogradInfluenceModule,
    CGInfluenceModule,
    ConvergenceWarning,
    InfluenceModule,
    LiSSAInfluenceModule,
)
from torch_influence.curvature import Curvature
from torch_influence.solvers import CG

pytestmark = pytest.mark.filterwarnings("error")

DAMP = 0.6  # with which all of these matrices are definite: the smallest eigenvalue is 0.28
MODELS: dict[str, Callable[[], nn.Module]] = {
    "network": lambda: nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 4)),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 20)), nn.Conv1d(1, 4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(64, 4)
    ),
    "head": lambda: nn.Linear(20, 4),
}


def model(kind: str = "network", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]().to(dtype)


def data(dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(90, 20, generator=generator), torch.randint(4, (90,), generator=generator)
    return DataLoader(TensorDataset(x.to(dtype), y), batch_size=30)


def module(kind: str = "network", **options: Any) -> InfluenceModule:
    options = {"damp": DAMP, "gnh": True, "solver": "cg", "rtol": 1e-2, "product_dtype": torch.bfloat16} | options
    return InfluenceModule(model(kind), Classification(), data(), data(), "cpu", **options)


def rows(it: InfluenceModule | CGInfluenceModule, k: int = 6) -> Tensor:
    return torch.randn(k, it.flat_parameters().numel(), generator=torch.Generator().manual_seed(2))


def dense(kind: str, gnh: bool, damp: float) -> Tensor:
    """The damped curvature in float64, from its definition."""
    wide, objective = model(kind, torch.float64), Classification()
    matrix = (dense_gauss_newton if gnh else dense_hessian)(wide, objective, loader_batches(data(torch.float64)))
    return matrix + damp * torch.eye(len(matrix), dtype=torch.float64)


@pytest.mark.parametrize("gnh", [True, False], ids=["gauss-newton", "hessian"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("solver", ["", "block "])
def test_residuals_are_those_of_float32(solver: str, kind: str, gnh: bool) -> None:
    it = module(kind, gnh=gnh, **({"solver": "block"} if solver else {}))
    b = rows(it)
    x = it.inverse_hvp(b)
    left = (b.double() - x.double() @ dense(kind, gnh, DAMP)).norm(dim=1) / b.double().norm(dim=1)
    report = it.last_report
    assert report is not None
    assert report.converged.all()
    assert (left <= 1e-2).all()
    # A product in float32 has an error of some units of 1e-7, and x is at most |b| / 0.28 long.
    torch.testing.assert_close(report.residual, left, rtol=0, atol=3e-6)
    assert report.method == f"{solver}conjugate gradients, products in bfloat16"
    assert it.explain()["curvature"].path.endswith("; products in bfloat16, residuals in float32")


@pytest.mark.parametrize("gnh", [True, False], ids=["gauss-newton", "hessian"])
@pytest.mark.parametrize("kind", MODELS)
def test_products_are_rounded_and_the_modules_own_are_not(kind: str, gnh: bool) -> None:
    it, plain = module(kind, gnh=gnh), module(kind, gnh=gnh, product_dtype=None)
    b = rows(it)
    exact = plain.hvp(b)
    with it._session():
        rounded = it._problem.rounded(torch.bfloat16)
        error = (rounded.product(b) - exact).norm(dim=1) / exact.norm(dim=1)
    assert (error > 1e-4).all()  # float32 has 1e-7
    # Operands are rounded by 2^-9 at most, in five products one after the other, those of the network's own pass among
    # them; random signs make it less.
    assert (error < 2**-6).all()
    torch.testing.assert_close(it.hvp(b), exact, rtol=0, atol=1e-6 * float(exact.abs().max()))
    many = torch.cat([rounded.product(row[None]) for row in b])
    assert ((many - exact).norm(dim=1) / exact.norm(dim=1) < 2**-6).all()


def test_the_module_of_conjugate_gradients_takes_it() -> None:
    it = CGInfluenceModule(
        model(), Classification(), data(), data(), "cpu", DAMP, True, rtol=1e-2, product_dtype=torch.bfloat16
    )
    b = rows(it)
    left = b.double() - it.inverse_hvp(b).double() @ dense("network", True, DAMP)
    assert (left.norm(dim=1) <= 1e-2 * b.double().norm(dim=1)).all()
    assert "products in bfloat16" in str(it.last_report)
    scores = it.influence_matrix()
    exact = module(product_dtype=None, rtol=1e-6).influence_matrix()
    assert float((scores - exact).norm() / exact.norm()) < 2e-2


def test_a_floor_above_the_tolerance_is_told() -> None:
    """With so little damping x is long, and products are off by more than they make headway; float32's are not."""
    damp = 3e-6
    it = module("head", damp=damp, maxiter=100)
    it.objective.l2 = 0.0
    b = rows(it)
    with pytest.warns(ConvergenceWarning, match="products in bfloat16 did not .* leave product_dtype out"):
        x = it.inverse_hvp(b)
    report = it.last_report
    assert report is not None
    with_no_ridge = dense("head", True, damp) - Classification.l2 * torch.eye(84, dtype=torch.float64)
    left = (b.double() - x.double() @ with_no_ridge).norm(dim=1) / b.double().norm(dim=1)
    torch.testing.assert_close(report.residual, left, rtol=1e-2, atol=1e-4)
    assert torch.equal(report.converged, report.residual <= 1e-2)
    it.product_dtype = None
    it.inverse_hvp(b)  # and float32 does converge: a warning would be an error


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rtol": ({"rtol": 1e-3}, ValueError, "product_dtype, rtol: .* reach about 8e-3; give rtol=0.01 or more, got 0.001"),
    "rtol, default": ({"rtol": 1e-5}, ValueError, "product_dtype, rtol: .* got 1e-05"),
    "direct": ({"solver": "direct"}, ValueError, "product_dtype, solver: .* got solver='direct'"),
    "dual": ({"solver": "dual"}, ValueError, "product_dtype, solver: .* got solver='dual'"),
    "minres": ({"solver": "minres"}, ValueError, "product_dtype, solver: .* got solver='minres'"),
    "object": ({"solver": CG(rtol=1e-2), "rtol": 1e-5}, ValueError, "product_dtype, solver: .* got solver=a CG"),
    "float16": ({"product_dtype": torch.float16}, ValueError, "product_dtype: expected torch.bfloat16 or None, got"),
    "name": (
        {"product_dtype": "bfloat16"},
        TypeError,
        "product_dtype: expected torch.bfloat16 or None, got 'bfloat16'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        module(**options)


def test_parameters_of_float64_are_refused() -> None:
    wide = data(torch.float64)
    arguments = (model(dtype=torch.float64), Classification(), wide, wide, "cpu", DAMP)
    for kind, options in ((InfluenceModule, {"solver": "cg"}), (CGInfluenceModule, {})):
        with pytest.raises(ValueError, match=r"product_dtype, model: .* got torch.float64"):
            kind(*arguments, rtol=1e-2, product_dtype=torch.bfloat16, **options)


def test_modules_without_products_do_not_take_it() -> None:
    arguments = (model(), Classification(), data(), data(), "cpu", DAMP)
    for kind, options in ((AutogradInfluenceModule, {}), (LiSSAInfluenceModule, {"repeat": 1, "depth": 1})):
        with pytest.raises(TypeError, match="product_dtype"):
            kind(*arguments, product_dtype=torch.bfloat16, **options)
    with pytest.raises(ValueError, match="product_dtype, rtol"):
        CGInfluenceModule(*arguments, product_dtype=torch.bfloat16)


def test_options_that_are_set_later_are_looked_at() -> None:
    it = module()
    b = rows(it, 1)
    it.rtol = 1e-4
    with pytest.raises(ValueError, match="product_dtype, rtol"):
        it.inverse_hvp(b)
    it.product_dtype = None
    it.inverse_hvp(b)
    assert it.last_report is not None
    assert it.last_report.method == "conjugate gradients"
    assert "bfloat16" not in str(it.explain())


def test_auto_may_find_that_float32_costs_less() -> None:
    it = module("head", solver="auto")
    exact = module("head", solver="auto", product_dtype=None, rtol=1e-5)
    b = rows(it, 60)
    torch.testing.assert_close(it.inverse_hvp(b), exact.inverse_hvp(b))
    assert it.last_report is not None
    assert it.last_report.method == exact.last_report.method
    assert "bfloat16" not in it.last_report.method


class NoOther(Curvature):
    """Has products in its own precision only."""

    title = "twice the identity"

    def product(self, rows: Tensor) -> Tensor:
        return 2 * rows

    def describe(self) -> str:
        return self.title


class Picky(nn.Module):
    """Works with float32 alone."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError(f"only float32, got {x.dtype}")
        return x


class Cancelling(nn.Module):
    """Loses in bfloat16 all digits that matter."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1000.0) - 1000.0


WHY_NOT: dict[str, tuple[dict[str, Any], nn.Module | None, str]] = {
    "a curvature without": ({"curvature": NoOther, "gnh": False}, None, "in its own precision only"),
    "a layer that refuses": ({}, Picky(), "a product failed: only float32"),
    "another result": ({}, Cancelling(), "differs from the curvature's own by more than rounding"),
}


@pytest.mark.parametrize("case", WHY_NOT)
def test_where_it_can_not_be_had_products_are_the_curvatures_own(case: str) -> None:
    options, layer, why = WHY_NOT[case]
    found = []
    for dtype in (torch.bfloat16, None):
        it = module(product_dtype=dtype, **options)
        if layer is not None:
            it.model = nn.Sequential(model()[0], layer, *model()[1:])
        found.append(it.inverse_hvp(rows(it)))
        assert it.last_report is not None
        assert it.last_report.method == "conjugate gradients"
        said = dict(it.explain()["curvature"].why_not)
        assert (why in said.get("products in bfloat16", "")) == (dtype is not None)
    assert torch.equal(*found)


def test_it_is_as_new_after_changes_and_in_copies() -> None:
    it = module()
    b = rows(it)
    first = it.inverse_hvp(b)
    again = copy.deepcopy(it).inverse_hvp(b)
    torch.testing.assert_close(again, first, rtol=0, atol=1e-2 * float(first.abs().max()))
    with torch.no_grad():
        it.model[0].weight.mul_(3.0)
    left = b - (it.hvp(x := it.inverse_hvp(b)) + DAMP * x)
    assert (left.norm(dim=1) <= 1e-2 * b.norm(dim=1) * (1 + 1e-4)).all()
