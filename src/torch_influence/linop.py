"""LinearOperator: a symmetric matrix known by its products with rows. No model and no data in here.

Solvers and curvatures meet at this file: a curvature is an operator, a solver takes one.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from torch_influence.plan import NotPossible


def as_tensor(value: Any) -> Tensor:
    """Returns a tensor as it is; an array or numbers as a tensor on the CPU, whatever torch's default device is."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def probe_rows(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Draws normal numbers to try a linear map with; the same ones, up to rounding, for every dtype and device."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)


class LinearOperator(abc.ABC):
    """A symmetric [d, d] matrix A that multiplies rows: product(V)[j] = A V[j].

    Attributes:
        size: d.
        dtype, device: of the rows it takes and gives.
    """

    size: int
    dtype: torch.dtype
    device: torch.device

    @abc.abstractmethod
    def product(self, rows: Tensor) -> Tensor:
        """Multiplies rows [k, d] by A; returns a new tensor [k, d]."""

    def product_and_dots(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Multiplies rows [k, d] by A, and returns beside it what is known on the way of an A made of n vectors gᵢ.

        Returns:
            The product [k, d], and the dot products gᵢ·v [n, k] with these rows, in an order that the operator's maker
            knows; None where they are not computed.
        """
        return self.product(rows), None

    @property
    def least(self) -> float | None:
        """A lower bound of A's eigenvalues; None where none is known."""
        return None

    def damped(self, shift: float) -> Damped:
        """Returns A + shift·I. Damping is part of the operator, so that no solver can get it wrong."""
        return Damped(self, shift)

    def diagonal(self) -> Tensor | None:
        """Returns the matrix's diagonal [d], where it is known without products; None where it is not."""
        return None

    def dense(self) -> Tensor:
        """Computes the matrix itself, [d, d], symmetrised against rounding."""
        matrix = self.product(torch.eye(self.size, dtype=self.dtype, device=self.device))
        return matrix.add_(matrix.mT.clone()).mul_(0.5)

    # -- products that are rounded on purpose -------------------------------------------------------------------------

    @property
    def exact(self) -> LinearOperator:
        """The operator that solutions are judged by: itself, unless its products are rounded on purpose."""
        return self

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype that products are computed in: ``dtype``, unless they are rounded on purpose."""
        return self.dtype

    # -- what solvers ask of it before they choose a way ----------------------------------------------------------

    @property
    def operations(self) -> float:
        """Additions and multiplications of a product with one row; a dense matrix's where nothing else is known."""
        return 2.0 * self.size**2

    @property
    def operations_of_dense(self) -> float:
        """Additions and multiplications of ``dense``."""
        return self.operations * self.size

    @property
    def operations_of_minibatch(self) -> float:
        """Additions and multiplications of a minibatch's product with one row; the whole's where there is none."""
        return self.operations

    def inverse(self, shift: float) -> LinearOperator:
        """(A + shift·I)⁻¹, where the operator knows it in closed form; raises ``NotPossible`` where it does not."""
        raise NotPossible("its inverse is not known in closed form")

    def dual(self, shift: float, room: float) -> Dual:
        """A as GᵀG + multiple·I, for solves of A + shift·I; raises ``NotPossible`` where that is not known.

        Args:
            shift: the damping that it is for first.
            room: bytes that it may take, with what is made of it.

        Raises:
            NotPossible: with the reason.
        """
        self.dual_cost(shift)  # says why not
        raise NotPossible("it is not known as GᵀG plus a multiple of the identity")

    def dual_cost(self, shift: float) -> DualCost:
        """Tells what solves by ``dual`` take, before it is made; raises ``NotPossible`` where that is seen already."""
        raise NotPossible("it is not known as GᵀG plus a multiple of the identity")


class Damped(LinearOperator):
    """The operator base + shift·I; solvers that fuse the shift into their update read both parts."""

    def __init__(self, base: LinearOperator, shift: float) -> None:
        self.base = base
        self.shift = float(shift)
        self.size, self.dtype, self.device = base.size, base.dtype, base.device

    def product(self, rows: Tensor) -> Tensor:  # noqa: D102
        return self.base.product(rows).add_(rows, alpha=self.shift)

    def product_and_dots(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:  # noqa: D102
        product, dots = self.base.product_and_dots(rows)
        return product.add_(rows, alpha=self.shift), dots

    @property
    def least(self) -> float | None:  # noqa: D102
        least = self.base.least
        return None if least is None else least + self.shift

    @property
    def exact(self) -> LinearOperator:  # noqa: D102
        exact = self.base.exact
        return self if exact is self.base else exact.damped(self.shift)

    @property
    def product_dtype(self) -> torch.dtype:  # noqa: D102
        return self.base.product_dtype

    def diagonal(self) -> Tensor | None:  # noqa: D102
        known = self.base.diagonal()
        return None if known is None else known + self.shift

    def dense(self) -> Tensor:  # noqa: D102
        matrix = self.base.dense()
        matrix = matrix.clone() if isinstance(self.base, Dense) else matrix  # that is the user's own
        matrix.diagonal().add_(self.shift)
        return matrix

    @property
    def operations(self) -> float:  # noqa: D102
        return self.base.operations

    @property
    def operations_of_dense(self) -> float:  # noqa: D102
        return self.base.operations_of_dense

    @property
    def operations_of_minibatch(self) -> float:  # noqa: D102
        return self.base.operations_of_minibatch


def base_and_shift(operator: LinearOperator) -> tuple[LinearOperator, float]:
    """Takes an operator apart: the one that nothing was added to, and the sum of what was."""
    shift = 0.0
    while isinstance(operator, Damped):
        shift, operator = shift + operator.shift, operator.base
    return operator, shift


class Dense(LinearOperator):
    """A symmetric matrix that is held in memory."""

    def __init__(self, matrix: Tensor) -> None:
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix: expected shape [d, d], got {list(matrix.shape)}")
        self.matrix = matrix
        self.size, self.dtype, self.device = matrix.shape[0], matrix.dtype, matrix.device

    def product(self, rows: Tensor) -> Tensor:  # noqa: D102
        return rows @ self.matrix

    def diagonal(self) -> Tensor:  # noqa: D102
        return self.matrix.diagonal()

    def dense(self) -> Tensor:  # noqa: D102
        return self.matrix


class Multiplied(LinearOperator):
    """An operator made from a function of the user, or of another library, that multiplies rows."""

    def __init__(self, multiply: Callable[[Tensor], Any], like: Tensor) -> None:
        self._multiply = multiply
        self.size, self.dtype, self.device = like.shape[-1], like.dtype, like.device

    def product(self, rows: Tensor) -> Tensor:  # noqa: D102
        if not len(rows):  # some operators fail for zero rows
            return torch.empty_like(rows)
        product = as_tensor(self._multiply(rows))
        if product.shape != rows.shape:
            raise ValueError(f"A: expected a product of shape {list(rows.shape)}, got {list(product.shape)}")
        return product.detach().to(rows, copy=True)


def aslinearoperator(A: Any, like: Tensor) -> LinearOperator:
    """Makes a LinearOperator, for rows like ``like`` [k, d], of anything that multiplies.

    Args:
        A: symmetric; a LinearOperator of this package; a tensor or array [d, d], sparse tensors among them, which is
            taken to the rows' dtype and device; an object that multiplies columns [d, k] with ``@``: torch's
            (curvlinops' operators, say) if it takes tensors, else NumPy's (SciPy's sparse matrices and linear
            operators), on the host; or a callable from rows [k, d] to rows [k, d].
        like: of the rows' d, dtype and device.

    Returns:
        The operator; A itself if it is one of this package.

    Raises:
        TypeError: none of these; complex numbers.
        ValueError: a size, dtype or device other than the rows'.

    Examples:
        >>> operator = aslinearoperator(lambda rows: 2.0 * rows, like=torch.ones(1, 3))
        >>> operator.damped(0.5).product(torch.ones(1, 3)).tolist()
        [[2.5, 2.5, 2.5]]
    """
    d = like.shape[-1]
    if isinstance(A, LinearOperator):
        if (A.size, A.dtype, torch.device(A.device)) != (d, like.dtype, like.device):
            raise ValueError(
                f"A: expected size {d}, {like.dtype} on {like.device}, as the right-hand sides are, got size {A.size}, "
                f"{A.dtype} on {A.device}"
            )
        return A
    shape = tuple(getattr(A, "shape", (d, d)))
    if shape != (d, d):
        raise ValueError(
            f"A: expected shape [{d}, {d}], since right-hand sides are rows of length {d}, got {list(shape)}"
        )
    if isinstance(A, Tensor | np.ndarray):
        matrix = as_tensor(A).detach()
        if matrix.is_complex():
            raise TypeError(f"A: expected real numbers, got {matrix.dtype}")
        if matrix.layout is torch.strided:
            return Dense(matrix.to(like))
        A = matrix.to(like)
    if hasattr(A, "__matmul__"):
        if any(base.__module__.partition(".")[0] == "scipy" for base in type(A).__mro__):
            return Multiplied(lambda rows: (A @ rows.cpu().numpy().T).T, like)
        declared = _declared_dtype(A)
        if declared not in (None, like.dtype):
            raise ValueError(
                f"A: expected {like.dtype}, as the right-hand sides are, got an operator of {declared}; "
                "convert the right-hand sides, or what the operator is made of"
            )
        return Multiplied(lambda rows: (A @ rows.mT).mT, like)
    if callable(A):
        return Multiplied(A, like)
    raise TypeError(f"A: expected a matrix, an operator with @ or a callable on rows [k, d], got {type(A).__name__}")


def _declared_dtype(A: Any) -> torch.dtype | None:
    """Reads the dtype of another library's operator; None where it has none (curvlinops' base class raises then)."""
    try:
        dtype = A.dtype
    except (AttributeError, NotImplementedError):
        return None
    return dtype if isinstance(dtype, torch.dtype) else None


@dataclasses.dataclass(frozen=True)
class DualCost:
    """The cost of solves by a ``Dual``, known before anything is computed.

    Attributes:
        rank: m, the outputs of all examples; fewer where the curvature at the outputs is singular.
        nbytes: memory at the most: three [m, m] matrices, G where it is kept, and what they are made of.
        operations: additions and multiplications for the kernel and its factor, once.
        operations_per_row: those for a right-hand side, with one round of refinement.
    """

    rank: int
    nbytes: int
    operations: float
    operations_per_row: float


class Dual(LinearOperator):
    """The operator GᵀG + multiple·I with G [m, d]: where m < d, it is cheaper to invert by the small matrix G Gᵀ.

    ``product`` need not use G: solutions are judged by it.

    Attributes:
        rank: m.
        multiple: the multiple of the identity in the operator.
    """

    rank: int
    multiple: float

    @abc.abstractmethod
    def push(self, rows: Tensor) -> Tensor:
        """Computes G v for rows v: [k, d] -> [k, m], a new tensor."""

    @abc.abstractmethod
    def pull(self, rows: Tensor) -> Tensor:
        """Computes Gᵀ u for rows u: [k, m] -> [k, d], a new tensor."""

    @functools.cached_property
    def kernel(self) -> Tensor:
        """The matrix G Gᵀ, [m, m]; made when first read, and kept also when the damping changes."""
        return self.assemble()

    @abc.abstractmethod
    def assemble(self) -> Tensor:
        """Computes G Gᵀ; nothing is kept."""

    def dual(self, shift: float, room: float) -> Dual:
        """Itself."""
        return self

    def dual_cost(self, shift: float) -> DualCost:
        """The cost of a G that is in memory."""
        m, d = self.rank, self.size
        if not self.multiple + shift > 0:
            raise NotPossible(f"its multiple of the identity, {self.multiple + shift:g}, is not positive")
        element = torch.finfo(self.dtype).bits // 8
        return DualCost(
            m, 3 * m * m * element, m**3 / 3 + float(m) * m * d, 2 * (4.0 * m * d + 2.0 * m * m + self.operations)
        )


@runtime_checkable
class Sampled(Protocol):
    """An operator that is a mean over data, and can be estimated from minibatches."""

    def sampled(self, steps: int, generator: torch.Generator | None) -> Iterator[LinearOperator]:
        """Yields ``steps`` unbiased estimates of the operator, each from one minibatch drawn with replacement."""
        ...
