"""Curvature of linear heads in closed form, and of batches put together: right where taken, not taken where wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heads import (
    BLOCKS,
    GRAPHS,
    HEADS,
    NO_HEADS,
    SOFTMAX,
    Case,
    N,
    centred_error,
    contrastive,
    linear,
    quartic,
)
from oracles import Loss, assert_close, dense_hessian, loader_batches
from torch import Tensor
from torch.nn import functional as F

from torch_influence import AutogradInfluenceModule
from torch_influence.curvature import Curvature, Hessian, LinearHead, linear_head
from torch_influence.plan import NotPossible

# Losses that couple the examples of a batch are among the cases; test_errors.py has what is said of them.
pytestmark = pytest.mark.filterwarnings(
    "error",
    "ignore:.* over the batch, got something else",
    "ignore:the training loss has no curvature",
    "ignore:params. (never gets|0.weight, 0.bias get) no gradient from any",
)

SWEEPS = 4  # forward, backward, and the two of the second derivative

heads = pytest.mark.parametrize("name", HEADS)
kinds = pytest.mark.parametrize("gnh", [False, True], ids=["hessian", "gauss-newton"])


def assert_products(actual: Tensor, rows: Tensor, matrix: Tensor, inherent: float = 0.0) -> None:
    """Of rows and a symmetric matrix; to be so close, each product is summed in any order."""
    rows, size = rows.double(), float((rows.double().abs() @ matrix.abs()).max())
    assert_close(actual, rows @ matrix, operations=SWEEPS * N * len(matrix), scale=size, inherent=inherent)


@heads
@pytest.mark.parametrize(
    ("gnh", "dtype"), [(False, torch.float64), (True, torch.float64), (False, torch.float32)], ids=str
)
def test_heads_are_taken_and_right(name: str, gnh: bool, dtype: torch.dtype) -> None:
    case = HEADS[name]
    module, matrix = case.module(dtype, gnh), case.reference(gnh)
    rows = torch.randn(4, len(matrix)).to(dtype)
    for some in (rows, rows[1:2]):
        assert_products(module.hvp(some), some, matrix, case.inherent)
    head = module._problem._curvature[1]
    assert type(head) is LinearHead
    assert head.at_outputs.form == case.form
    assert case.grouped in head.plain.why_not_grouped
    assert bool(case.grouped) == bool(head.plain.why_not_grouped) or case.batch > N


@heads
def test_dense_matrix_of_heads(name: str) -> None:
    case = HEADS[name]
    module, matrix = AutogradInfluenceModule(*case.arguments(), 1.0, params=case.params), case.reference()
    assert type(module._problem._curvature[1]) is LinearHead
    assert_close(module.hess, matrix, operations=SWEEPS * N * len(matrix), inherent=case.inherent)
    assert torch.equal(module.hess, module.hess.mT)


@heads
@pytest.mark.parametrize(
    ("gnh", "dtype", "scratch"), [(False, torch.float32, 1), (True, torch.float64, 64 * 2**20)], ids=str
)
def test_diagonal_of_heads(
    name: str, gnh: bool, dtype: torch.dtype, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch_influence.curvature._linear_head._TILE_BYTES", scratch)  # 1: an example at a time
    case = HEADS[name]
    operator, matrix = case.module(dtype, gnh)._problem.curvature(), case.reference(gnh)
    diagonal = operator.diagonal()
    if name == "regulariser that is not diagonal":
        assert diagonal is None
        return
    assert diagonal is not None
    assert diagonal.dtype == dtype
    expected = matrix.diagonal()
    assert_close(diagonal, expected, operations=SWEEPS * N, inherent=case.inherent)
    damped = operator.damped(0.5).diagonal()
    assert damped is not None
    assert_close(damped, expected + 0.5, operations=SWEEPS * N, inherent=case.inherent)


@pytest.mark.parametrize("name", ["softmax", "the weight alone", "Dogfish", "a loss that joins the outputs"])
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_dense_matrix_by_halves(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 inputs, or 5 with the bias: cut once, in halves of unequal size, and down to single columns."""
    monkeypatch.setattr("torch_influence.curvature._dual._COLUMNS_OF_GRAM", columns)
    test_dense_matrix_of_heads(name)


@pytest.mark.parametrize("name", ["softmax", "Dogfish", "squared error"])
def test_half_precision_heads(name: str) -> None:
    case = HEADS[name]
    dtype = torch.bfloat16
    module = case.module(dtype)
    rows = torch.eye(module._problem.space.size)
    model, loader = case.model(dtype).double(), case.loader(dtype)
    batches = (([t.double() if t.is_floating_point() else t for t in batch], b) for batch, b in loader_batches(loader))
    matrix = dense_hessian(model, case.objective, batches)
    actual = module.hvp(rows)
    assert actual.dtype == torch.float32
    # Sums over examples are in float32; the model, the loss and its two derivatives run in bfloat16, a chain of
    # below 64 operations per number.
    assert_close(actual.to(dtype), matrix, operations=64)


# Gauss-Newton is made of other parts of the objective, needs outputs with a graph, and sees no penalty of gradient 0.
SOME = list(NO_HEADS)[:3]
HESSIAN_ONLY = {
    "overridden train_loss",
    "the regulariser alone",
    "a batch without labels",
    "weight used besides, without a gradient",
}


@pytest.mark.parametrize(
    ("name", "gnh", "cache"),
    [
        (name, gnh, cache)
        for name in NO_HEADS
        for gnh, cache in ((False, "auto"), (True, "auto"), (False, False), (False, 3000))
        if not (gnh and name in HESSIAN_ONLY) and (cache != 3000 or name in SOME)
    ],
)
def test_what_is_no_head_is_right(name: str, gnh: bool, cache: Any) -> None:
    case = NO_HEADS[name]
    module, matrix = case.module(gnh=gnh, cache=cache), case.reference(gnh)
    rows = torch.randn(4, len(matrix), dtype=torch.float64)
    for some in (rows, rows[1:2]):
        assert_products(module.hvp(some), some, matrix)
    plain = module._problem._curvature[1]
    assert isinstance(plain, Curvature)
    if cache is not False:
        assert case.form in module._problem.curvature().why_no_head
        assert case.grouped in plain.why_not_grouped
        assert bool(case.grouped) == bool(plain.why_not_grouped)
    else:
        why = module._problem.curvature().why_no_head
        assert "cache=False" in why or case.form in why
        assert "cache=False" in plain.why_not_grouped or case.grouped in plain.why_not_grouped
        assert plain.kept_bytes == 0


WIDE = 12  # outputs: blocks take more than anything else


@pytest.mark.parametrize("loss", [F.mse_loss, quartic, contrastive, centred_error])
@kinds
@pytest.mark.parametrize("bias", [True, False])
def test_heads_with_no_room_for_blocks(loss: Loss, gnh: bool, bias: bool) -> None:
    case = Case(linear(WIDE, bias), loss, lambda n: torch.randn(n, WIDE), GRAPHS)
    module, matrix = case.module(gnh=gnh, cache=N * 8 * (4 + WIDE**2) - 1), case.reference(gnh)
    rows = torch.randn(4, len(matrix), dtype=torch.float64)
    for some in (rows, rows[1:2]):
        assert_products(module.hvp(some), some, matrix)
    head = module._problem._curvature[1]
    assert type(head) is LinearHead, module._problem.curvature().why_no_head
    assert head.at_outputs.form == GRAPHS
    assert head.diagonal() is None
    assert head.kept_bytes <= head.plain.budget
    direct = AutogradInfluenceModule(*case.arguments(), 1.0, cache=N * 8 * (4 + WIDE**2) - 1)
    assert_close(direct.hess, case.reference(), operations=SWEEPS * N * len(matrix))


def head_or_why(plain: Hessian) -> LinearHead | str:
    try:
        return linear_head(plain)
    except NotPossible as why:
        return str(why)


@pytest.mark.parametrize("loss", [quartic, F.mse_loss, F.cross_entropy])
def test_what_a_head_keeps_fits_the_budget(loss: Loss) -> None:
    case = Case(linear(WIDE), loss, lambda n: torch.randn(n, WIDE).softmax(-1), "")
    module = case.module()
    forms = []
    for budget in range(500, N * 8 * (5 + WIDE**2) + 500, 250):
        plain = Hessian(module._problem.evaluation, module._problem.train, module.device, budget)
        head = head_or_why(plain)
        forms.append(head.at_outputs.form if isinstance(head, LinearHead) else "")
        if isinstance(head, LinearHead):
            assert head.kept_bytes <= budget
        else:
            assert "budget" in head
    assert forms[0] == ""
    assert list(dict.fromkeys(forms)) == (["", SOFTMAX] if loss is F.cross_entropy else ["", GRAPHS, BLOCKS])


def test_a_head_with_no_room_for_blocks_is_compared_too() -> None:
    case = NO_HEADS["weight used besides, without a gradient"]
    module, matrix = case.module(), case.reference()
    rows = torch.randn(4, len(matrix), dtype=torch.float64)
    for budget in range(400, 3000, 200):  # too little for the inputs, for blocks, enough for all
        plain = Hessian(module._problem.evaluation, module._problem.train, module.device, budget)
        head = head_or_why(plain)
        assert isinstance(head, str), f"budget {budget}"
        with module._problem.evaluation.session():
            assert_products(plain.product(rows), rows, matrix)
