"""Operators: whatever can be given as A multiplies alike, and what can't be is refused with words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from oracles import assert_close, tolerance, with_spectrum
from torch import Tensor

from torch_influence.linop import Damped, Dense, LinearOperator, aslinearoperator
from torch_influence.solvers import block_cg, cg, direct

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
]

D, K, CONDITION = 12, 3, 10.0
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def symmetric(dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(2)
    return with_spectrum(torch.linspace(1, CONDITION, D, dtype=torch.float64)).to(dtype)


class Own(LinearOperator):
    """A subclass as a user writes it, with nothing but a product."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.size, self.dtype, self.device = matrix, len(matrix), matrix.dtype, matrix.device

    def product(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix


class Columns:
    """Multiplies columns of torch with @, and says nothing of itself."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.seen: list[Any] = []

    def __matmul__(self, columns: Any) -> Any:
        self.seen.append(columns)
        return self.matrix @ columns


class Declared(Columns):
    """Says its shape and dtype, as curvlinops' operators do."""

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.matrix.shape)  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype


class Undeclared(Columns):
    """As curvlinops' base class, whose dtype is for subclasses to say."""

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError


class OfSciPy(scipy.sparse.linalg.LinearOperator):
    """A subclass outside SciPy."""

    def __init__(self, matrix: np.ndarray) -> None:
        super().__init__(matrix.dtype, matrix.shape)
        self.matrix = matrix

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        assert isinstance(x, np.ndarray)
        return self.matrix @ x


OPERANDS: dict[str, Callable[[Tensor], Any]] = {
    "Dense": Dense,
    "Damped": lambda m: Dense(m - 0.5 * torch.eye(D, dtype=m.dtype)).damped(0.5),
    "LinearOperator": Own,
    "tensor": lambda m: m,
    "tensor that requires grad": lambda m: m.clone().requires_grad_(),
    "ndarray": lambda m: m.numpy(),
    "sparse tensor": lambda m: m.to_sparse(),
    "sparse CSR tensor": lambda m: m.to_sparse_csr(),
    "SciPy sparse matrix": lambda m: scipy.sparse.csr_matrix(m.numpy()),
    "SciPy sparse array": lambda m: scipy.sparse.csc_array(m.numpy()),
    "SciPy LinearOperator": lambda m: scipy.sparse.linalg.aslinearoperator(m.numpy()),
    "subclass of SciPy's LinearOperator": lambda m: OfSciPy(m.numpy()),
    "columns": Columns,
    "columns, declared": Declared,
    "columns, undeclared": Undeclared,
    "callable": lambda m: lambda rows: rows @ m,
    "callable to NumPy": lambda m: lambda rows: rows.numpy() @ m.numpy(),
    "callable with a graph": lambda m: lambda rows: rows @ m.clone().requires_grad_(),
}
operands = pytest.mark.parametrize("kind", OPERANDS)


# -- operands ---------------------------------------------------------------------------------------------------------


@operands
@pytest.mark.parametrize(("k", "dtype"), [(0, torch.float32), (1, torch.float64), (K, torch.float32)])
def test_every_operand_multiplies_rows(kind: str, dtype: torch.dtype, k: int) -> None:
    matrix, rows = symmetric(dtype), torch.randn(k, D).to(dtype)
    before = rows.clone()
    operator = aslinearoperator(OPERANDS[kind](matrix), rows)
    product = operator.product(rows)
    assert (operator.size, operator.dtype, operator.device) == (D, dtype, rows.device)
    assert (product.shape, product.dtype, product.requires_grad) == (rows.shape, dtype, False)
    assert torch.equal(rows, before)
    assert_close(product, rows.double() @ matrix.double(), operations=D + 2, scale=CONDITION * max(1.0, norm(rows)))


@operands
@dtypes
def test_every_operand_can_be_made_dense(kind: str, dtype: torch.dtype) -> None:
    matrix = symmetric(dtype)
    dense = aslinearoperator(OPERANDS[kind](matrix), matrix[:1]).dense()
    assert (dense.layout, dense.dtype) == (torch.strided, dtype)
    assert_close(dense.detach(), matrix.double(), operations=D + 2, scale=CONDITION)


@operands
@pytest.mark.parametrize(("solver", "dtype"), [(cg, torch.float32), (block_cg, torch.float64), (direct, torch.float32)])
def test_every_operand_is_solved_with(kind: str, dtype: torch.dtype, solver: Callable[..., Any]) -> None:
    matrix, rows = symmetric(dtype), torch.randn(K, D).to(dtype)
    rtol = tolerance(dtype, operations=D)
    options = {} if solver is direct else {"rtol": rtol}
    x, report = solver(OPERANDS[kind](matrix), rows, **options)
    assert x.dtype == dtype
    assert (report.converged | report.precision_limit).all()
    assert_close(x, solved(matrix, rows), operations=D * D, condition=CONDITION)


@operands
def test_damping_is_added_to_every_operand(kind: str) -> None:
    matrix, rows = symmetric(), torch.randn(K, D, dtype=torch.float64)
    damped = aslinearoperator(OPERANDS[kind](matrix), rows).damped(0.7)
    assert isinstance(damped, Damped)
    assert damped.shift == 0.7
    expected = rows @ matrix + 0.7 * rows
    assert_close(damped.product(rows), expected, operations=D + 3, scale=CONDITION * norm(rows))
    assert_close(damped.dense(), matrix + 0.7 * torch.eye(D, dtype=torch.float64), operations=D + 3, scale=CONDITION)


def test_each_kind_is_handed_what_it_multiplies() -> None:
    rows = torch.randn(K, D, dtype=torch.float64)
    columns = Columns(symmetric())
    aslinearoperator(columns, rows).product(rows)
    assert torch.equal(columns.seen[0], rows.mT)
    handed: list[Tensor] = []
    aslinearoperator(lambda v: handed.append(v) or v, rows).product(rows)
    assert torch.equal(handed[0], rows)


def test_products_are_new_tensors() -> None:
    rows = torch.randn(K, D, dtype=torch.float64)
    product = aslinearoperator(lambda v: v, rows).product(rows)
    assert product.data_ptr() != rows.data_ptr()
    assert torch.equal(product, rows)


@pytest.mark.parametrize("kind", ["tensor", "ndarray", "sparse tensor", "SciPy sparse matrix", "SciPy LinearOperator"])
def test_matrices_are_taken_to_the_dtype_of_the_rows(kind: str) -> None:
    matrix, rows = symmetric(), torch.randn(K, D)
    x, _ = cg(OPERANDS[kind](matrix), rows, rtol=tolerance(torch.float32, operations=D))
    assert x.dtype == torch.float32
    assert_close(x, solved(matrix, rows), operations=D * D, condition=CONDITION)


def test_integers_are_numbers() -> None:
    rows = torch.randn(K, D, dtype=torch.float64)
    for A in (2 * torch.eye(D, dtype=torch.int64), 2 * np.eye(D, dtype=int), scipy.sparse.eye_array(D, dtype=int) * 2):
        x, _ = cg(A, rows)
        assert_close(x, rows / 2, operations=D)


# -- right-hand sides -------------------------------------------------------------------------------------------------

RIGHT_HAND_SIDES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda rows: rows,
    "tensor that requires grad": lambda rows: rows.clone().requires_grad_(),
    "not contiguous": lambda rows: torch.stack([rows, -rows], dim=-1)[..., 0],
    "ndarray": lambda rows: rows.numpy(),
}


@pytest.mark.parametrize("kind", RIGHT_HAND_SIDES)
@pytest.mark.parametrize(
    ("k", "dtype"), [(None, torch.float64), (0, torch.float32), (1, torch.float64), (K, torch.float32)]
)
@pytest.mark.parametrize("solver", [cg, block_cg, direct], ids=lambda solver: solver.__name__)
def test_right_hand_sides_of_every_kind(
    kind: str, dtype: torch.dtype, k: int | None, solver: Callable[..., Any]
) -> None:
    matrix = symmetric(dtype)
    rows = torch.randn(D).to(dtype) if k is None else torch.randn(k, D).to(dtype)
    options = {} if solver is direct else {"rtol": tolerance(dtype, operations=D)}
    x, report = solver(matrix, RIGHT_HAND_SIDES[kind](rows), **options)
    assert isinstance(x, Tensor)
    assert (x.shape, x.dtype, x.requires_grad) == (rows.shape, dtype, False)
    assert len(report.iterations) == (1 if k is None else k)
    assert_close(x, solved(matrix, rows), operations=D * D, condition=CONDITION)


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "tensor of another size": (
        torch.eye(D + 1),
        ValueError,
        r"A: expected shape \[12, 12\].* got \[13, 13\]",
    ),
    "not square": (np.ones((D, D + 1)), ValueError, r"A: expected shape .* got \[12, 13\]"),
    "a vector": (torch.ones(D), ValueError, r"A: expected shape .* got \[12\]"),
    "sparse of another size": (scipy.sparse.eye_array(D - 1), ValueError, r"A: expected shape .* got \[11, 11\]"),
    "operator of another size": (Declared(torch.eye(D + 1)), ValueError, r"A: expected shape .* got \[13, 13\]"),
    "own operator of another size": (Dense(torch.eye(D + 1)), ValueError, "A: expected size 12, .* got size 13"),
    "own operator of another dtype": (
        Dense(torch.eye(D).double()),
        ValueError,
        "A: expected size 12, torch.float32 .* torch.float64",
    ),
    "operator of another dtype": (
        Declared(torch.eye(D).double()),
        ValueError,
        "A: expected torch.float32, .* torch.float64",
    ),
    "complex": (torch.eye(D, dtype=torch.complex64), TypeError, "A: expected real numbers, got torch.complex64"),
    "complex array": (np.eye(D, dtype=complex), TypeError, "A: expected real numbers, got torch.complex128"),
    "a list": (torch.eye(D).tolist(), TypeError, "A: expected a matrix, an operator with @ or a callable.* got list"),
    "a number": (3.0, TypeError, "A: expected a matrix.* got float"),
    "None": (None, TypeError, "A: expected a matrix.* got NoneType"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_operand_is_refused(kind: str) -> None:
    A, error, message = REFUSED[kind]
    for solver in (cg, block_cg, direct):
        with pytest.raises(error, match=message):
            solver(A, torch.ones(K, D))


def test_a_product_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"A: expected a product of shape \[3, 12\], got \[3, 2\]"):
        cg(lambda rows: rows[:, :2], torch.ones(K, D))


@pytest.mark.parametrize(
    ("B", "error", "message"),
    [
        (torch.ones(2, K, D), ValueError, r"B: expected right-hand sides as rows \[k, d\].* got shape \[2, 3, 12\]"),
        (torch.tensor(1.0), ValueError, r"B: expected right-hand sides as rows .* got shape \[\]"),
        (torch.ones(K, D, dtype=torch.int64), TypeError, "B: expected floating point numbers, got torch.int64"),
        (np.ones((K, D), dtype=complex), TypeError, "B: expected floating point numbers, got torch.complex128"),
    ],
    ids=["three dimensions", "a number", "integers", "complex"],
)
def test_right_hand_sides_that_are_none(B: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cg(torch.eye(D), B)


def test_a_dense_matrix_has_two_equal_sides() -> None:
    with pytest.raises(ValueError, match=r"matrix: expected shape \[d, d\], got \[2, 3\]"):
        Dense(torch.ones(2, 3))


# -- helpers ----------------------------------------------------------------------------------------------------------


def norm(rows: Tensor) -> float:
    return float(rows.double().norm(dim=-1).max()) if len(rows) else 0.0


def solved(matrix: Tensor, rows: Tensor) -> Tensor:
    """The oracle, float64; [d] or [k, d]."""
    return torch.linalg.solve(matrix.double(), rows.double().reshape(-1, D).mT).mT.reshape(rows.shape)


class Coarse(Own):
    """Has products in bfloat16, and knows the exact operator."""

    product_dtype = torch.bfloat16

    @property
    def exact(self) -> LinearOperator:
        return Own(self.matrix)

    def product(self, rows: Tensor) -> Tensor:
        return (rows.bfloat16() @ self.matrix.bfloat16()).to(rows.dtype)


def test_solutions_are_judged_by_the_exact_operator() -> None:
    matrix = symmetric(torch.float32)
    coarse, plain = Coarse(matrix).damped(0.5), Own(matrix).damped(0.5)
    assert plain.exact is plain
    assert plain.product_dtype == torch.float32
    assert coarse.product_dtype == torch.bfloat16
    torch.manual_seed(3)
    b = torch.randn(K, D)
    assert torch.equal(coarse.exact.product(b), plain.product(b))
    x, report = cg(coarse, b, rtol=1e-2)
    left = (b - plain.product(x)).norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(report.residual, left.double(), rtol=0, atol=1e-6)
    assert report.converged.all()
    assert report.method == "conjugate gradients, products in bfloat16"
    # Restarts from exact residuals reach what products in bfloat16 alone do not: their own errors are 2e-3.
    assert cg(coarse, b, rtol=1e-5)[1].converged.all()
