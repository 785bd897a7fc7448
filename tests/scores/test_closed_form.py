"""Every quantity of the package on models whose derivatives are formulas: linear, logistic and softmax regression."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import (
    ClosedForm,
    Supervised,
    assert_close,
    half_squared_error,
    logistic_loss,
    tolerance,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import (
    AutogradInfluenceModule,
    BaseInfluenceModule,
    CGInfluenceModule,
    LiSSAInfluenceModule,
)

pytestmark = pytest.mark.filterwarnings("error")

N, QUERIES, INPUTS = 23, 11, 4
L2, DAMP = 0.05, 0.1
LOSSES = {"linear": half_squared_error, "logistic": logistic_loss, "softmax": F.cross_entropy}
OUTPUTS = {"linear": 2, "logistic": 1, "softmax": 3}
DTYPES = [torch.float32, torch.float64]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A closed form, and the same as a model with data sets for the package."""

    form: ClosedForm
    model: nn.Module
    train: TensorDataset
    test: TensorDataset
    query_features: Tensor
    query_targets: Tensor

    @property
    def objective(self) -> Supervised:
        return Supervised(LOSSES[self.form.kind], self.form.l2)

    @functools.cached_property
    def curvature(self) -> Tensor:
        return self.form.hessian()

    @functools.cached_property
    def damped(self) -> Tensor:
        return self.curvature + DAMP * torch.eye(len(self.curvature), dtype=torch.float64)

    @functools.cached_property
    def stests(self) -> Tensor:
        gradients = self.form.query_gradients(self.query_features, self.query_targets)
        return torch.linalg.solve(self.damped, gradients.mT).mT

    @property
    def condition(self) -> float:
        return float(torch.linalg.cond(self.damped))

    @property
    def operations(self) -> int:
        return N * len(self.curvature)

    def module(self, solver: str, batch_size: int = 7) -> BaseInfluenceModule:
        train = DataLoader(self.train, batch_size=batch_size)
        test = DataLoader(self.test, batch_size=3)
        return SOLVERS[solver](self.model, self.objective, train, test, "cpu", DAMP)


def conjugate_gradients(gnh: bool) -> Callable[..., BaseInfluenceModule]:
    def build(model: nn.Module, *args: Any) -> BaseInfluenceModule:
        dtype = next(model.parameters()).dtype
        return CGInfluenceModule(model, *args, gnh, rtol=tolerance(dtype, operations=N))

    return build


SOLVERS: dict[str, Callable[..., BaseInfluenceModule]] = {
    "direct": AutogradInfluenceModule,
    "cg": conjugate_gradients(gnh=False),
    "cg gauss-newton": conjugate_gradients(gnh=True),
}


def targets_of(kind: str, n: int, dtype: torch.dtype) -> Tensor:
    if kind == "linear":
        return torch.randn(n, OUTPUTS[kind]).to(dtype)
    if kind == "logistic":
        return torch.randint(2, (n, 1)).to(dtype)
    return torch.randint(OUTPUTS[kind], (n,))


def problem(kind: str, dtype: torch.dtype = torch.float64) -> Problem:
    """Data and parameters are float32 numbers, so that the float64 formulas hold exactly for both dtypes."""
    torch.manual_seed(1)
    inputs, query_inputs = torch.randn(N, INPUTS), torch.randn(QUERIES, INPUTS)
    targets, query_targets = targets_of(kind, N, dtype), targets_of(kind, QUERIES, dtype)
    model = nn.Linear(INPUTS, OUTPUTS[kind])
    wide = [t.double() for t in (inputs, query_inputs, model.weight.detach(), model.bias.detach())]

    def double(labels: Tensor) -> Tensor:
        return labels if kind == "softmax" else labels.double()

    ones = torch.ones(N, 1, dtype=torch.float64)
    form = ClosedForm(
        kind, torch.cat([wide[0], ones], 1), double(targets), torch.cat([wide[2], wide[3][:, None]], 1), L2
    )
    return Problem(
        form=form,
        model=model.to(dtype),
        train=TensorDataset(inputs.to(dtype), targets),
        test=TensorDataset(query_inputs.to(dtype), query_targets),
        query_features=torch.cat([wide[1], ones[:QUERIES]], 1),
        query_targets=double(query_targets),
    )


kinds = pytest.mark.parametrize("kind", LOSSES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
solvers = pytest.mark.parametrize("solver", SOLVERS)
batch_sizes = pytest.mark.parametrize("batch_size", [1, 7, N])


@kinds
@dtypes
@batch_sizes
@pytest.mark.parametrize("solver", ["cg", "cg gauss-newton"])
def test_hvp_of_one_row_and_of_many(kind: str, dtype: torch.dtype, batch_size: int, solver: str) -> None:
    p = problem(kind, dtype)
    module = p.module(solver, batch_size)
    rows = torch.randn(5, p.form.theta.numel()).to(dtype)
    expected = rows.double() @ p.curvature
    assert_close(module.hvp(rows), expected, operations=p.operations)
    assert_close(module.hvp(rows[2]), expected[2], operations=p.operations)
    assert module.hvp(rows).dtype == dtype


@kinds
@dtypes
@batch_sizes
def test_the_hessian_of_the_direct_module(kind: str, dtype: torch.dtype, batch_size: int) -> None:
    p = problem(kind, dtype)
    module = p.module("direct", batch_size)
    assert isinstance(module, AutogradInfluenceModule)
    assert_close(module.hess, p.curvature, operations=p.operations)
    inverse = torch.linalg.inv(p.damped)
    assert_close(module.inverse_hess, inverse, operations=p.operations, condition=p.condition)


@kinds
@dtypes
@solvers
def test_inverse_hvp_of_one_row_and_of_many(kind: str, dtype: torch.dtype, solver: str) -> None:
    p = problem(kind, dtype)
    module = p.module(solver)
    rows = torch.randn(5, p.form.theta.numel()).to(dtype)
    expected = torch.linalg.solve(p.damped, rows.double().mT).mT
    bound: dict[str, float] = {"operations": p.operations, "condition": p.condition}
    assert_close(module.inverse_hvp(rows), expected, **bound)
    assert_close(module.inverse_hvp(rows[2]), expected[2], **bound)


@kinds
@dtypes
def test_mean_gradients(kind: str, dtype: torch.dtype) -> None:
    p = problem(kind, dtype)
    module = p.module("cg", batch_size=3)
    some = [20, 3, 11, 0, 7]
    expected = p.form.train_gradients()[some].mean(0)
    assert_close(module.train_loss_grad(some), expected, operations=p.operations)
    queries = p.form.query_gradients(p.query_features, p.query_targets)
    assert_close(module.test_loss_grad([4, 0, 2, 1]), queries[[4, 0, 2, 1]].mean(0), operations=p.operations)


@kinds
@dtypes
@solvers
def test_scores(kind: str, dtype: torch.dtype, solver: str) -> None:
    p = problem(kind, dtype)
    module = p.module(solver)
    bound: dict[str, float] = {"operations": p.operations, "condition": p.condition}
    queries, some = [9, 1, 4], [22, 0, 13, 5]

    assert_close(module.stests(queries), p.stests[queries], **bound)
    assert_close(module.stest(queries), p.stests[queries].mean(0), **bound)

    scores = p.form.train_gradients() @ p.stests.mT / N
    assert_close(module.influences(some, queries), scores[some][:, queries].mean(1), **bound)
    assert_close(module.influences(some, None, stest=p.stests[4].to(dtype)), scores[some, 4], **bound)
    assert_close(module.influence_matrix(), scores, **bound)
    assert_close(module.influence_matrix(some, queries), scores[some][:, queries], **bound)


@kinds
@dtypes
@solvers
def test_self_influences(kind: str, dtype: torch.dtype, solver: str) -> None:
    p = problem(kind, dtype)
    module = p.module(solver)
    gradients = p.form.train_gradients()
    expected = (gradients * torch.linalg.solve(p.damped, gradients.mT).mT).sum(1) / N
    bound: dict[str, float] = {"operations": p.operations, "condition": p.condition}
    assert_close(module.self_influences(), expected, **bound)
    assert_close(module.self_influences([8, 2]), expected[[8, 2]], **bound)
    assert (expected > 0).all()


@pytest.mark.parametrize("method", ["influence_matrix", "self_influences"])
@pytest.mark.parametrize("solver", ["direct", "cg"])
def test_scores_do_not_depend_on_the_batch_size_of_the_loader(solver: str, method: str) -> None:
    p = problem("softmax")
    results = [getattr(p.module(solver, size), method)() for size in (1, 7, N)]
    for other in results[1:]:
        assert_close(other, results[0], operations=p.operations, condition=p.condition)


class TwoBlocks(nn.Module):
    """A linear model in two parameters whose order of registration can be chosen."""

    def __init__(self, first: str) -> None:
        super().__init__()
        values = {"left": torch.linspace(-1, 1, 2).double(), "right": torch.linspace(2, 3, 3).double()}
        for name in sorted(values, key=lambda name: name != first):
            self.register_parameter(name, nn.Parameter(values[name]))

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :2] @ self.left + (x[:, 2:] @ self.right).tanh()).unsqueeze(1)


@pytest.mark.parametrize("gnh", [False, True])
def test_the_order_of_parameters_permutes_vectors_and_leaves_scores_alone(gnh: bool) -> None:
    inputs, targets = torch.randn(N, 5, dtype=torch.float64), torch.randn(N, 1, dtype=torch.float64)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=4)
    objective = Supervised(half_squared_error, L2)
    modules = [
        CGInfluenceModule(TwoBlocks(first), objective, loader, loader, "cpu", 1.0, gnh, rtol=1e-14)
        for first in ("left", "right")
    ]
    swap = [2, 3, 4, 0, 1]
    v = torch.randn(5, dtype=torch.float64)
    assert modules[0].params_names == modules[1].params_names[::-1]
    assert_close(modules[1].hvp(v[swap]), modules[0].hvp(v)[swap], operations=5 * N)
    scores = [module.influence_matrix(test_idxs=[0, 1]) for module in modules]
    damped = modules[0].hvp(torch.eye(5, dtype=torch.float64)) + torch.eye(5, dtype=torch.float64)
    assert_close(scores[1], scores[0], operations=5 * N, condition=float(torch.linalg.cond(damped)))


# -- LiSSA ------------------------------------------------------------------------------------------------------------


class SharedDesign(nn.Module):
    """One design matrix X for all examples, so that all have the same curvature XᵀX; inputs are offsets."""

    def __init__(self, rows: int, d: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("design", (torch.eye(rows, d) + 0.2 * torch.randn(rows, d)).to(dtype))
        self.theta = nn.Parameter(torch.randn(d).to(dtype))

    def forward(self, offsets: Tensor) -> Tensor:
        return self.design @ self.theta + offsets


def shared_design(
    dtype: torch.dtype, batch_size: int, **options: Any
) -> tuple[LiSSAInfluenceModule, Tensor, DataLoader]:
    """A LiSSA module for data of equal curvature, and that curvature with damping, float64."""
    torch.manual_seed(2)
    model = SharedDesign(rows=6, d=4, dtype=dtype)
    data = TensorDataset(torch.randn(N, 6).to(dtype), torch.randn(N, 6).to(dtype))
    loader = DataLoader(data, batch_size=batch_size)
    module = LiSSAInfluenceModule(
        model, Supervised(half_squared_error, L2), loader, loader, "cpu", damp=DAMP, **options
    )
    design = model.design.double()
    return module, design.mT @ design + (L2 + DAMP) * torch.eye(4, dtype=torch.float64), loader


def neumann_sum(matrix: Tensor, rows: Tensor, depth: int, scale: float) -> Tensor:
    """(1/scale) Σ_{t=0..depth} (I - A/scale)^t v for each row v."""
    step = torch.eye(len(matrix), dtype=matrix.dtype) - matrix / scale
    term, total = rows.clone(), rows.clone()
    for _ in range(depth):
        term = term @ step
        total = total + term
    return total / scale


@dtypes
@pytest.mark.parametrize("gnh", [False, True])
@pytest.mark.parametrize(("repeat", "depth"), [(1, 1), (3, 8)])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_lissa_is_the_neumann_sum_where_all_examples_have_one_curvature(
    dtype: torch.dtype, gnh: bool, repeat: int, depth: int, batch_size: int
) -> None:
    scale = 5.0
    module, matrix, _ = shared_design(dtype, batch_size, repeat=repeat, depth=depth, scale=scale, gnh=gnh)
    module.on_failure = "ignore"  # so few steps as these
    rows = torch.randn(3, 4).to(dtype)
    expected = neumann_sum(matrix, rows.double(), depth, scale)
    operations = 4 * 6 * batch_size * (depth + 1)
    assert_close(module.inverse_hvp(rows), expected, operations=operations)
    assert_close(module.inverse_hvp(rows[1]), expected[1], operations=operations)


@pytest.mark.parametrize("scale", [3.0, 9.0])
def test_the_fixed_point_of_lissa_is_the_inverse_with_damping_added_once_whatever_the_scale(scale: float) -> None:
    module, matrix, _ = shared_design(torch.float64, 5, repeat=1, depth=1, scale=scale)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    contraction = float((1 - eigenvalues / scale).abs().max())
    assert contraction < 1
    unit = tolerance(torch.float64)
    module.depth = next(t for t in range(10**5) if contraction**t < unit)
    v = torch.randn(4, dtype=torch.float64)
    condition = float(eigenvalues[-1] / eigenvalues[0])
    # The iteration sums up to scale/λ_min roundings of A⁻¹v.
    operations = 4 * 6 * 5 * scale / float(eigenvalues[0])
    assert_close(module.inverse_hvp(v), torch.linalg.solve(matrix, v), operations=operations, condition=condition)


@pytest.mark.parametrize(("kind", "gnh"), [("linear", False), ("logistic", False), ("logistic", True)])
def test_lissa_is_an_unbiased_estimate_of_the_neumann_sum(kind: str, gnh: bool) -> None:
    """Minibatches are independent, so E[h_T] is the Neumann sum of the mean curvature; 5 standard errors around it."""
    p = problem(kind)
    runs, depth, scale = 40, 6, 30.0
    last_of_runs: list[Tensor] = []

    def keep_last(run: int, step: int, h: Tensor) -> None:
        if step == depth - 1:
            last_of_runs.append(h)

    module = LiSSAInfluenceModule(
        p.model, p.objective, DataLoader(p.train, batch_size=2), None, "cpu", DAMP, runs, depth, scale, gnh,
        keep_last, generator=torch.Generator().manual_seed(0), on_failure="ignore",
    )  # fmt: skip
    v = torch.randn(len(p.damped), dtype=torch.float64)
    estimate = module.inverse_hvp(v)
    per_run = torch.stack(last_of_runs) / scale
    assert_close(estimate, per_run.mean(0), operations=runs)
    spread = per_run.std(0) / runs**0.5
    assert (spread > 0).all()
    assert ((estimate - neumann_sum(p.damped, v, depth, scale)).abs() <= 5 * spread).all()


def test_scores_of_lissa_come_from_its_neumann_sum() -> None:
    depth, scale = 6, 5.0
    module, matrix, loader = shared_design(torch.float64, 5, repeat=1, depth=depth, scale=scale)
    design, theta = module.model.design, module.model.theta.detach()
    offsets, targets = loader.dataset.tensors
    query_gradients = (design @ theta + offsets - targets) @ design
    expected_stests = neumann_sum(matrix, query_gradients, depth, scale)
    train_gradients = query_gradients + L2 * theta
    operations = 4 * 6 * 5 * (depth + 1)
    queries = [3, 1]
    assert_close(module.stests(queries), expected_stests[queries], operations=operations)
    matrix_of_scores = train_gradients @ expected_stests[queries].mT / N
    size = float(train_gradients.norm(dim=1).max() * expected_stests.norm(dim=1).max()) / N
    assert_close(module.influence_matrix(None, queries), matrix_of_scores, operations=operations, scale=size)
    assert_close(module.influences(range(N), queries), matrix_of_scores.mean(1), operations=operations, scale=size)
