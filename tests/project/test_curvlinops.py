"""Our solvers on curvlinops' operators: the same solutions as a dense solve, and as the modules, on the same model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import Supervised, assert_close, dense_gauss_newton, dense_hessian, loader_batches, query_gradients
from problems import loader, network
from torch import Tensor, nn
from torch.nn import functional as F

from torch_influence import InfluenceModule
from torch_influence.linop import aslinearoperator
from torch_influence.solvers import block_cg, cg, direct, lanczos

curvlinops = pytest.importorskip("curvlinops")
pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # torch's own, in a jvp
]

L2, DAMP, RTOL = 0.05, 0.5, 1e-13
N, BATCH, QUERIES = 23, 5, 7  # the last batch of training data has 3 examples
OPERATORS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "Hessian": ("HessianLinearOperator", dense_hessian),
    "Gauss-Newton": ("GGNLinearOperator", dense_gauss_newton),
}
kinds = pytest.mark.parametrize("kind", OPERATORS)
SOLVERS: dict[str, Callable[..., Any]] = {
    "cg": functools.partial(cg, rtol=RTOL),
    "block_cg": functools.partial(block_cg, rtol=RTOL),
    "direct": direct,
}


def theirs(kind: str, dtype: torch.dtype = torch.float64, reduction: str = "mean") -> Any:
    model, train = network(dtype), loader(N, BATCH, dtype)
    loss = nn.CrossEntropyLoss(reduction=reduction)
    return getattr(curvlinops, OPERATORS[kind][0])(model, loss, list(model.parameters()), train)


@functools.cache
def dense(kind: str) -> Tensor:
    """(1/n) Σ_b |b| of the batches' curvature, without a regulariser."""
    return OPERATORS[kind][1](network(), Supervised(F.cross_entropy), loader_batches(loader(N, BATCH)))


@functools.cache
def damped(kind: str) -> Tensor:
    return dense(kind) + (L2 + DAMP) * torch.eye(len(dense(kind)), dtype=torch.float64)


def queries() -> Tensor:
    return query_gradients(network(), Supervised(F.cross_entropy), loader(n=QUERIES, batch_size=3, seed=3))


@kinds
def test_their_mean_loss_is_a_mean_over_the_data_ragged_batches_included(kind: str) -> None:
    like = queries()
    size = float(dense(kind).abs().max())
    assert_close(aslinearoperator(theirs(kind), like).dense(), dense(kind), operations=N * len(dense(kind)), scale=size)
    summed = aslinearoperator(theirs(kind, reduction="sum"), like).dense()
    assert_close(summed, N * dense(kind), operations=N * len(dense(kind)), scale=N * size)


@kinds
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("one", [True, False], ids=["one query", "many"])
def test_solutions_are_those_of_a_dense_solve(kind: str, solver: str, one: bool) -> None:
    rows = queries()[0] if one else queries()
    operator = aslinearoperator(theirs(kind), rows).damped(L2 + DAMP)
    s, report = SOLVERS[solver](operator, rows)
    assert report.converged.all()
    expected = torch.linalg.solve(damped(kind), rows.reshape(-1, len(damped(kind))).mT).mT.reshape(rows.shape)
    condition = float(torch.linalg.cond(damped(kind)))
    inherent = 0.0 if solver == "direct" else RTOL * condition
    assert_close(s, expected, operations=N * len(damped(kind)), condition=condition, inherent=inherent)


@kinds
def test_solutions_are_the_modules(kind: str) -> None:
    """Their curvature leaves the ridge out; it is ½ l2 |θ|², so that it adds l2 to the damping."""
    rows = queries()
    s, _ = cg(aslinearoperator(theirs(kind), rows).damped(L2 + DAMP), rows, rtol=RTOL)
    module = InfluenceModule(
        network(),
        Supervised(F.cross_entropy, L2),
        loader(N, BATCH),
        loader(n=QUERIES, batch_size=3, seed=3),
        "cpu",
        damp=DAMP,
        gnh=kind == "Gauss-Newton",
        solver="cg",
        rtol=RTOL,
    )
    condition = float(torch.linalg.cond(damped(kind)))
    assert_close(
        module.stests(), s, operations=N * len(damped(kind)), condition=condition, inherent=2 * RTOL * condition
    )


@kinds
def test_extreme_eigenvalues(kind: str) -> None:
    found = lanczos(aslinearoperator(theirs(kind), queries()), rtol=1e-10)
    exact = torch.linalg.eigvalsh(dense(kind))
    size = float(exact.abs().max())
    assert_close(found.values[[0, -1]], exact[[0, -1]], operations=N * len(exact), scale=size, inherent=1e-10)


@kinds
def test_single_precision(kind: str) -> None:
    rows = queries().float()
    s, report = cg(aslinearoperator(theirs(kind, torch.float32), rows).damped(L2 + DAMP), rows, rtol=1e-5)
    assert report.converged.all()
    condition = float(torch.linalg.cond(damped(kind)))
    expected = torch.linalg.solve(damped(kind), queries().mT).mT
    assert_close(s, expected, operations=N * len(damped(kind)), condition=condition, inherent=1e-5 * condition)


def test_another_dtype_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"A: expected torch.float32, .* got an operator of torch.float64"):
        cg(theirs("Hessian"), queries().float())


def test_operators_of_their_own_algebra() -> None:
    rows = queries()
    both = theirs("Hessian") + 0.5 * theirs("Gauss-Newton")
    expected = rows @ (dense("Hessian") + 0.5 * dense("Gauss-Newton"))
    operator = aslinearoperator(both, rows)
    assert_close(operator.product(rows), expected, operations=N * len(dense("Hessian")))
    through_scipy = aslinearoperator(both.to_scipy(), rows)
    assert_close(through_scipy.product(rows), expected, operations=N * len(dense("Hessian")))
