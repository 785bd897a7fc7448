"""Conjugate gradients' use of cg_step: results are the references', and no iteration waits for its own end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import assert_close
from torch import Tensor

from torch_influence import backend_info
from torch_influence.linop import LinearOperator
from torch_influence.ops._cg_step import reference
from torch_influence.solvers import _cg, cg

D, K = 40, 6
CONDITION = 9.0
no_cuda = pytest.mark.skipif(bool(backend_info().cuda), reason=f"no native CUDA ops: {backend_info().cuda}")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, no_cuda])])


class Dense(LinearOperator):
    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.size, self.dtype, self.device = matrix, len(matrix), matrix.dtype, matrix.device

    def product(self, rows: Tensor) -> Tensor:
        """Every row by itself, so that it rounds the same whichever others are still at work."""
        return torch.stack([row @ self.matrix for row in rows])


def problem(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    orthogonal = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=generator))[0]
    eigenvalues = torch.linspace(1 / CONDITION, 1.0, D, dtype=torch.float64)
    rows = torch.randn(K, D, dtype=torch.float64, generator=generator)
    rows[0] = orthogonal[0]  # an eigenvector: done after one iteration
    rows[1] = 0
    return (orthogonal.mT * eigenvalues @ orthogonal).to(dtype).to(device), rows.to(dtype).to(device)


def options_with(preconditioned: bool, matrix: Tensor) -> dict[str, Any]:
    return {"M": Dense(torch.diag(1 / matrix.diagonal()))} if preconditioned else {}


@devices
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_native_and_reference_solve_alike(
    dtype: torch.dtype, preconditioned: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, rows = problem(dtype, device)
    options = options_with(preconditioned, matrix)
    mine, native = cg(Dense(matrix), rows, rtol=1e-4, **options)
    monkeypatch.setattr(_cg, "cg_step", reference)
    theirs, plain = cg(Dense(matrix), rows, rtol=1e-4, **options)
    assert torch.equal(native.iterations, plain.iterations)
    assert torch.equal(native.converged, plain.converged)
    assert native.products == plain.products
    assert_close(mine, theirs, operations=D * int(plain.iterations.max()), condition=CONDITION)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("rtol", [1e-4, 1e-9])
def test_noticing_one_iteration_late_changes_no_bit(
    preconditioned: bool, rtol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens on a GPU. 1e-9 is beyond float32: rows start again, and how often depends on when it was looked."""
    matrix, rows = problem(torch.float32, "cpu")
    options = {"rtol": rtol, "maxiter": 60, **options_with(preconditioned, matrix)}
    punctual, expected = cg(Dense(matrix), rows, **options)

    def some_stopped(self: Any, wait: bool) -> bool:
        now = not bool(self.row.active.all())
        before, self.late = self.late, now
        return now if wait else bool(before)

    monkeypatch.setattr(_cg._State, "some_stopped", some_stopped)
    late, report = cg(Dense(matrix), rows, **options)
    fields = ["converged", "precision_limit", "negative_curvature"]
    if rtol == 1e-4:
        assert torch.equal(late, punctual)
        fields += ["iterations", "residual"]
    for field in fields:
        assert torch.equal(getattr(report, field), getattr(expected, field))


@pytest.mark.cuda
@no_cuda
@pytest.mark.parametrize("preconditioned", [False, True])
def test_an_iteration_makes_no_host_synchronisation_and_replays_from_a_graph(preconditioned: bool) -> None:
    matrix, rows = problem(torch.float64, "cuda")
    precondition = options_with(preconditioned, matrix)["M"].product if preconditioned else None
    states = [_cg._State(Dense(matrix), rows, None, 1e-10 * rows.norm(dim=1), precondition) for _ in range(2)]
    eager, captured = states
    for state in states:
        state.step()  # loads what is loaded at first use
    steps = 5
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(steps):
            eager.step()
            eager.some_stopped(wait=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(steps):
        graph.replay()
    assert torch.equal(captured.x, eager.x)
    assert torch.equal(captured.scalars, eager.scalars)
