"""A solve is the same with native ops and with their references."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from oracles import assert_close
from problems import loader, module, network
from torch import Tensor

from torch_influence import CGInfluenceModule, LiSSAInfluenceModule, backend_info

D = 43  # parameters of the small network
pytestmark = pytest.mark.skipif(not backend_info().ops, reason=f"no native ops: {backend_info().cpu}")


def solve(monkeypatch: pytest.MonkeyPatch, native: bool, rows: Tensor, kind: Any, **options: Any) -> Tensor:
    """Solves with the ops that the solvers use by default, or with the references in their place."""
    dtype = rows.dtype
    data = {"train_loader": loader(dtype=dtype), "test_loader": loader(n=7, dtype=dtype)}
    it = module(kind, model=network(dtype), **data, **options)
    with monkeypatch.context() as patch:
        if not native:
            for solver, op in (("_cg", "cg_step"), ("_series", "lissa_step")):
                reference = importlib.import_module(f"torch_influence.ops._{op}").reference
                patch.setattr(f"torch_influence.solvers.{solver}.{op}", reference)
        torch.manual_seed(0)
        return it.inverse_hvp(rows)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gnh", [False, True])
def test_conjugate_gradients(monkeypatch: pytest.MonkeyPatch, gnh: bool, dtype: torch.dtype, k: int) -> None:
    rows, rtol = torch.randn(k, D, dtype=dtype), 1e-4
    options = {"gnh": gnh, "rtol": rtol}
    native = solve(monkeypatch, True, rows, CGInfluenceModule, **options)
    reference = solve(monkeypatch, False, rows, CGInfluenceModule, **options)
    matrix = module(CGInfluenceModule, gnh=gnh).hvp(torch.eye(D, dtype=torch.float64)) + torch.eye(D)
    # Both have |b - Ax| <= rtol |b|, so they are at most 2 rtol |b| |A⁻¹| apart.
    allowed = 2 * rtol * rows.double().norm(dim=1) / torch.linalg.eigvalsh(matrix)[0]
    assert ((native - reference).double().norm(dim=1) <= allowed).all()
    # And the recurrences take the same way: as many roundings apart as an iteration's dot products have, per iteration.
    assert_close(native, reference, operations=20 * D, condition=float(torch.linalg.cond(matrix)))


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gnh", [False, True])
def test_lissa(monkeypatch: pytest.MonkeyPatch, gnh: bool, dtype: torch.dtype, k: int) -> None:
    rows, depth = torch.randn(k, D, dtype=dtype), 20
    options = {"gnh": gnh, "repeat": 2, "depth": depth, "scale": 20.0}
    native = solve(monkeypatch, True, rows, LiSSAInfluenceModule, **options)
    reference = solve(monkeypatch, False, rows, LiSSAInfluenceModule, **options)
    assert_close(native, reference, operations=depth * D)
