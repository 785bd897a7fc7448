"""Preconditioners: the forms of M that conjugate gradients take, and recipes for M (Jacobi, randomized Nyström)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from torch_influence.linop import Damped, LinearOperator, as_tensor, base_and_shift
from torch_influence.solvers._base import rounding
from torch_influence.solvers._solver import Cost, Memo, row_bytes

_ENTRIES = 1 << 24  # of the rows that are multiplied at once, and of float64 copies


@runtime_checkable
class Preconditioner(Protocol):
    """A recipe: makes M of the operator that it is to precondition."""

    def of(self, operator: LinearOperator) -> LinearOperator:
        """Makes an approximate inverse of the operator, up to a factor; symmetric positive definite.

        The solver hands over its operator, ``Damped`` as it is, behind a wrapper that counts the products made.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Jacobi:
    """The inverse of the diagonal: M = diag(A)⁻¹, for coordinates of badly different scale, such as features' units.

    It cures nothing else: where scales are alike it may well take more iterations than no M.

    The diagonal is exact where the operator knows it (a matrix in memory, a linear head in closed form) and where
    d <= probes. Else it is estimated from rows z of random signs,

        diag(A)ⱼ ≈ mean over z of zⱼ (A z)ⱼ,     variance of a probe Σ_{i ≠ j} A_ij²

    An entry that is less than its standard error is lifted to that: its estimate may be of either sign, and M too large
    there is worse than no M. Damping is added afterwards. M is positive definite whenever some entry is positive:
    entries below a unit of rounding of the largest are lifted to that, too.

    Args:
        probes: rows that an estimate is made of, at least 2; standard errors fall with their square root.
        generator: of the signs; the same ones each time if None.

    Cost:
        nothing where the operator knows its diagonal; else a product with min(d, probes) rows, in parts of at most
        16 million entries. An application costs d multiplications. Memory d.

    Source:
        Bekas, Kokiopoulou and Saad (2007), An estimator for the diagonal of a matrix, equation (1). Lifting is ours.

    Examples:
        >>> from torch_influence.solvers import Jacobi, cg
        >>> x, report = cg(torch.diag(torch.tensor([8.0, 2.0, 0.5])), torch.ones(3), M=Jacobi())
        >>> x.tolist(), report.iterations.tolist()
        ([0.125, 0.5, 2.0], [1])
    """

    probes: int = 100
    generator: torch.Generator | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.probes, int) or self.probes < 2:
            raise ValueError(f"probes: expected an integer >= 2, got {self.probes!r}")

    def of(self, operator: LinearOperator) -> LinearOperator:
        """Makes M.

        Raises:
            ValueError: the diagonal has no positive entry, or is not finite.
        """
        values = operator.diagonal()
        base, shift = base_and_shift(operator)
        if values is None and operator.size <= self.probes:
            values = exact_diagonal(base) + shift
        elif values is None:
            mean, error = estimated_diagonal(base, self.probes, self.generator)
            values = torch.maximum(mean, error) + max(shift, 0.0)
        largest = float(values.max())
        if not (largest > 0 and values.isfinite().all()):
            raise ValueError(
                f"Jacobi: expected a finite diagonal with a positive entry, got {largest:g} as the largest; look for "
                "NaN in the data, raise damp, or solve without M"
            )
        values = values.double().clamp(min=torch.finfo(operator.dtype).eps * largest)
        return _Scaled(values.reciprocal().to(operator.dtype))


@dataclasses.dataclass(frozen=True)
class Nystrom:
    """The inverse of a randomized low-rank approximation of H plus damping, for A = H + μI.

    From one product Y = H Ω with ``rank`` orthonormal random rows, H ≈ Y (Ωᵀ Y)⁻¹ Yᵀ = U Λ Uᵀ (in columns), and

        M = (λ_ℓ + μ) U (Λ + μI)⁻¹ Uᵀ + I - U Uᵀ                λ_ℓ: the last of the ``rank`` eigenvalues

    With positive semi-definite H and its approximation's error E, M A has a condition number of at most
    (λ_ℓ + μ + |E|) / μ: below 28 on average with rank = 2 ⌈1.5 Σⱼ λⱼ / (λⱼ + μ)⌉ + 1, about thrice the number of
    eigenvalues above μ. As it takes a product with many rows, it pays where μ is small, or rows or solves are many.

    M is positive definite whatever H is. Of an indefinite H the directions of positive curvature are approximated:
    Ωᵀ Y is shifted until it is definite by a margin, and eigenvalues below 0 count as 0. Without damping, or with less
    than rounding can tell, (λ_ℓ + μ) is not let below rounding, so M has a condition number of some 10⁵ in float32.

    Args:
        rank: ℓ, at least 1; no more than d is used.
        generator: of Ω; the same one each time if None.

    Cost:
        a product with ``rank`` rows, 5 d rank² multiplications, and small matrices on the host. An application to k
        rows is two matrix products, 2 k d rank multiplications. Memory rank x d, five times as much while it is made.

    Source:
        Frangella, Tropp and Udell (2023), Randomized Nyström preconditioning: algorithm 2.1 with its stabilising shift,
        M by equation (5.3), bounds by proposition 5.3 and theorem 5.1. The larger shift for indefinite H is ours.

    Examples:
        >>> from torch_influence.linop import Dense
        >>> from torch_influence.solvers import Nystrom, cg
        >>> H = torch.diag(torch.tensor([90.0, 40.0, 7.0, 0.0, 0.0], dtype=torch.float64))
        >>> x, report = cg(Dense(H).damped(1.0), torch.ones(5, dtype=H.dtype), M=Nystrom(rank=4))
        >>> report.iterations.tolist(), report.products
        ([1], 3)
    """

    rank: int
    generator: torch.Generator | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank: expected an integer >= 1, got {self.rank!r}")

    def of(self, operator: LinearOperator) -> LinearOperator:
        """Makes M.

        Raises:
            ValueError: a product is not finite.
        """
        base, shift = base_and_shift(operator)
        values, vectors = low_rank(base, min(self.rank, base.size), self.generator)
        mu = max(shift, 0.0)
        level = torch.maximum(values[-1] + mu, rounding(operator.dtype) * (values[0] + mu))
        factors = (level / (values + mu)).nan_to_num(nan=1.0).clamp(max=1.0)
        return _Deflated(vectors, (factors - 1).to(vectors))


@dataclasses.dataclass(frozen=True)
class MadeOnce:
    """A recipe that makes M of an operator once, for all later solves with it.

    Attributes:
        recipe: makes M.
        operator: what it is made of.
        made: keeps it.
    """

    recipe: Preconditioner
    operator: LinearOperator
    made: Memo[LinearOperator]

    def of(self, operator: LinearOperator) -> LinearOperator:
        """Returns what the recipe makes, or has made; ``operator`` is the same one behind a wrapper that counts."""
        return self.made.of(self.operator, lambda: self.recipe.of(operator), self.recipe)


def made_once(M: Any, operator: LinearOperator, made: Memo[LinearOperator]) -> Any:
    """M as it is; in place of a recipe one that remembers what it has made."""
    return MadeOnce(M, operator, made) if is_recipe(M) else M


def preconditioned(M: Any) -> str:
    """Returns the words that M adds to a solver's title."""
    return "" if M is None else f", preconditioned by {M if is_recipe(M) else 'M'}"


def with_rows(cost: Cost, M: Any, operator: LinearOperator) -> Cost:
    """A cost with the rows [d] that a preconditioner keeps, as far as it says how many."""
    return dataclasses.replace(cost, nbytes=cost.nbytes + getattr(M, "rank", 0) * row_bytes(operator))


def is_recipe(M: Any) -> bool:
    """Tells whether M is a Preconditioner, and not an operator that happens to have a method of the same name."""
    return isinstance(M, Preconditioner) and not isinstance(M, LinearOperator | type)


def as_preconditioner(M: Any, operator: LinearOperator, rows: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    """Returns a function that multiplies rows [k, d] by M, in whatever form M is, and a recipe's number of products."""
    d = rows.shape[1]
    if is_recipe(M):
        base, shift = base_and_shift(operator)
        counted = _Counted(base)
        made = M.of(counted.damped(shift) if isinstance(operator, Damped) else counted)
        return made.product, counted.products
    return _given(M, rows, d), 0


def _given(M: Any, rows: Tensor, d: int) -> Callable[[Tensor], Tensor]:
    if isinstance(M, LinearOperator):
        return M.product
    if isinstance(M, type):
        raise TypeError(f"M: expected an instance, got the class {M.__name__}; write {M.__name__}(...)")
    if isinstance(M, np.ndarray | Tensor):
        matrix = as_tensor(M).to(rows)
        if matrix.shape != (d, d):
            raise ValueError(f"M: expected shape [{d}, {d}], got {list(matrix.shape)}")
        return lambda r: r @ matrix.mT
    if hasattr(M, "shape") and tuple(M.shape) != (d, d):
        raise ValueError(f"M: expected shape [{d}, {d}], got {list(M.shape)}")
    if hasattr(M, "matvec"):
        apply = M.matvec
    elif hasattr(M, "dot"):
        apply = M.dot
    elif callable(M):
        apply = M
    else:
        raise TypeError(f"M: expected an array, sparse matrix, linear operator or callable, got {type(M).__name__}")

    def on_host(r: Tensor) -> Tensor:
        answers = [np.asarray(apply(row)) for row in r.cpu().numpy()]
        return as_tensor(np.stack(answers)).to(r).reshape(r.shape)

    return on_host


# -- what recipes make -------------------------------------------------------------------------------------------------


class _Scaled(LinearOperator):
    """A diagonal matrix."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.size, self.dtype, self.device = len(values), values.dtype, values.device

    def product(self, rows: Tensor) -> Tensor:
        return rows * self.values

    def diagonal(self) -> Tensor:
        return self.values


class _Deflated(LinearOperator):
    """The matrix I + Uᵀ diag(changes) U with orthonormal rows U [m, d] and changes [m] > -1."""

    def __init__(self, vectors: Tensor, changes: Tensor) -> None:
        self.vectors, self.changes = vectors, changes
        self.size, self.dtype, self.device = vectors.shape[1], vectors.dtype, vectors.device

    def product(self, rows: Tensor) -> Tensor:
        return torch.addmm(rows, (rows @ self.vectors.mT).mul_(self.changes), self.vectors)


class _Counted(LinearOperator):
    """An operator that counts its products."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator, self.products = operator, 0
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device

    def product(self, rows: Tensor) -> Tensor:
        self.products += 1
        return self.operator.product(rows)

    def diagonal(self) -> Tensor | None:
        return self.operator.diagonal()


# -- what they are made of ---------------------------------------------------------------------------------------------


def exact_diagonal(operator: LinearOperator) -> Tensor:
    """Computes the diagonal [d] by products with all unit rows."""
    d = operator.size
    diagonal = torch.empty(d, dtype=operator.dtype, device=operator.device)
    for part in torch.arange(d, device=operator.device).split(max(1, _ENTRIES // d)):
        rows = torch.zeros(len(part), d, dtype=operator.dtype, device=operator.device)
        rows[torch.arange(len(part), device=operator.device), part] = 1.0
        diagonal[part] = operator.product(rows).detach()[torch.arange(len(part), device=operator.device), part]
    return diagonal


def estimated_diagonal(
    operator: LinearOperator, probes: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Makes Hutchinson's unbiased estimate of the diagonal, [d], and its standard error, [d], from the probes' spread.

    The probes z are random signs, so z ⊙ z is 1 and z ⊙ A z needs no division by it.
    """
    generator = generator or torch.Generator().manual_seed(0)
    d, step = operator.size, max(1, _ENTRIES // operator.size)
    mean, squares = torch.zeros(2, d, dtype=torch.float64, device=operator.device)
    for first in range(0, probes, step):
        bits = torch.randint(2, (min(step, probes - first), d), generator=generator, device=generator.device)
        signs = bits.to(operator.device, operator.dtype).mul_(2).sub_(1)
        terms = operator.product(signs).detach().mul_(signs).double()
        # Welford's update by parts (Chan, Golub and LeVeque 1983): the spread may be far less than the mean.
        centre = terms.mean(dim=0)
        step_to, seen = centre - mean, first + len(terms)
        squares += (terms - centre).square().sum(dim=0) + step_to.square() * first * len(terms) / seen
        mean += step_to * len(terms) / seen
    error = (squares / (probes - 1) / probes).sqrt()
    return mean.to(operator.dtype), error.to(operator.dtype)


def low_rank(operator: LinearOperator, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Computes Λ [rank], float64, descending, >= 0, and orthonormal rows U [rank, d], H ≈ Uᵀ Λ U: algorithm 2.1."""
    generator = generator or torch.Generator().manual_seed(0)
    d, dtype, device = operator.size, operator.dtype, operator.device
    wide = torch.promote_types(dtype, torch.float32)
    normal = torch.randn(rank, d, dtype=wide, generator=generator, device=generator.device).to(device)
    basis = torch.linalg.qr(normal.mT).Q.mT.contiguous()
    del normal
    sketch = operator.product(basis.to(dtype)).detach().to(wide)
    size = float(torch.linalg.vector_norm(sketch, dtype=torch.float64))
    if not size < float("inf"):
        raise ValueError(
            "Nystrom: a product with the curvature is not finite: look for NaN in the data, scale the loss down, or "
            "use float64"
        )
    if size == 0:
        return torch.zeros(rank, dtype=torch.float64, device=device), basis.to(dtype)
    core = _gram(basis, sketch)
    s, v = torch.linalg.eigh(0.5 * (core + core.mT))
    # Twice the shift that makes the core definite. With just that shift, a direction would have no curvature in the
    # core but some in H: its eigenvalue in the approximation would have no bound.
    nu = max(rounding(wide) * size, -2 * float(s[0]))
    # Any root of the core can replace Cholesky's; this one exists even where the core is nearly singular.
    root = v / (s + nu).sqrt()
    half = root.mT.to(sketch) @ sketch.add_(basis, alpha=nu)
    del basis, sketch
    q, r = torch.linalg.qr(half.mT)
    left, singular, _ = torch.linalg.svd(r.double().cpu())
    vectors = left.mT.to(q) @ q.mT
    return (singular.square() - nu).clamp_(min=0.0).to(device), vectors.to(dtype)


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """Computes a bᵀ in float64, and returns it on the host."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    step = max(1, _ENTRIES // len(a))
    for some, others in zip(a.split(step, dim=1), b.split(step, dim=1), strict=True):
        total.addmm_(some.double(), others.double().mT)
    return total.cpu()
