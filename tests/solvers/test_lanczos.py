"""The Lanczos process against eigvalsh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import tolerance, with_spectrum
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torch_influence.linop import Dense, LinearOperator, Multiplied
from torch_influence.solvers import lanczos

D = 60
SPECTRA = {
    "indefinite": torch.linspace(-1.0, 2.0, D),
    "definite": torch.logspace(0, -6, D),
    "clustered at both ends": torch.cat([1e-3 * torch.rand(20), torch.rand(20), 1 + 1e-3 * torch.rand(20)]),
}
DTYPES = [torch.float64, torch.float32]

spectra = pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def size_of(values: Tensor) -> float:
    return float(values.abs().max())


@spectra
@dtypes
def test_run_to_its_end_it_finds_all_eigenvalues(spectrum: Tensor, dtype: torch.dtype) -> None:
    matrix = with_spectrum(spectrum).to(dtype)
    expected = torch.linalg.eigvalsh(matrix.double())
    found = lanczos(Dense(matrix), D // 2, rtol=0.0)
    assert found.converged
    assert found.products == len(found.values) == D
    # Weyl: T is the matrix in an orthonormal basis, and rounding of d products of d terms.
    assert (found.values - expected).abs().max() <= tolerance(dtype, operations=D * D) * size_of(expected)


@spectra
@dtypes
@pytest.mark.parametrize("relative_to", ["largest", "each"])
@pytest.mark.parametrize("maxiter", [None, 8, 20])
def test_errors_are_bounds(spectrum: Tensor, dtype: torch.dtype, relative_to: Any, maxiter: int | None) -> None:
    matrix = with_spectrum(spectrum).to(dtype)
    expected = torch.linalg.eigvalsh(matrix.double())
    found = lanczos(Dense(matrix), 3, rtol=1e-2, relative_to=relative_to, maxiter=maxiter)
    nearest = (found.values[:, None] - expected).abs().min(dim=1).values
    assert (nearest <= found.errors + tolerance(dtype, operations=D * D) * size_of(expected)).all()
    assert found.products == len(found.values) <= (maxiter or D)
    ends = torch.cat([found.errors[:3], found.errors[-3:]])
    reference = size_of(found.values) if relative_to == "largest" else found.values[[0, 1, 2, -3, -2, -1]].abs()
    within = ends <= (1e-2 * torch.as_tensor(reference)).clamp(min=32 * torch.finfo(dtype).eps * size_of(found.values))
    assert found.converged == (bool(within.all()) or found.products == D)


def test_relative_to_each_tells_a_small_eigenvalue_from_zero() -> None:
    expected = torch.cat([torch.tensor([1e-4]), torch.linspace(0.1, 1.0, 399)]).double()
    operator = Dense(with_spectrum(expected))
    coarse, fine = lanczos(operator, rtol=0.1), lanczos(operator, rtol=0.1, relative_to="each")
    assert coarse.errors[0] > 1e-4
    assert abs(fine.values[0] - 1e-4) <= fine.errors[0] <= 1e-5
    assert coarse.products < fine.products < 400


@dtypes
@pytest.mark.parametrize(
    ("eigenvalues", "k"),
    [([1.0] * 10, 3), ([0.0] * 10, 2), ([0.0] * 8 + [1.0, 2.0], 3), ([-1.0] * 5 + [1.0] * 5, 2), ([5.0], 3)],
)
def test_goes_on_where_the_krylov_space_is_invariant(dtype: torch.dtype, eigenvalues: list[float], k: int) -> None:
    expected = torch.tensor(eigenvalues, dtype=torch.float64)
    d = len(expected)
    found = lanczos(Dense(with_spectrum(expected).to(dtype)), k, vectors=True)
    assert found.converged
    assert min(2 * k, d) <= found.products <= d
    nearest = (found.values[:, None] - expected).abs().min(dim=1).values
    allowed = tolerance(dtype, operations=d * d) * size_of(expected)
    assert (nearest <= allowed).all()
    assert abs(found.values[0] - expected.min()) <= allowed
    assert abs(found.values[-1] - expected.max()) <= allowed
    assert found.vectors is not None
    gram = found.vectors.double() @ found.vectors.double().mT
    assert (gram - torch.eye(len(gram))).abs().max() <= tolerance(dtype, operations=d * d)


@dtypes
def test_ritz_vectors_are_orthonormal_eigenvectors(dtype: torch.dtype) -> None:
    d, k = 300, 4
    matrix = with_spectrum(torch.logspace(0, -4, d)).to(dtype)
    found = lanczos(Dense(matrix), k, rtol=0.0, maxiter=200, vectors=True)  # long after the first have converged
    y = found.vectors
    assert y is not None
    assert y.dtype == dtype
    assert y.shape == (2 * k, d)
    y, ends = y.double(), [*range(k), *range(-k, 0)]
    allowed = tolerance(dtype, operations=d * 200)
    assert (y @ y.mT - torch.eye(2 * k)).abs().max() <= allowed
    residuals = (y @ matrix.double() - found.values[ends, None] * y).norm(dim=1)
    assert (residuals <= found.errors[ends] + allowed).all()


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_tiny_matrices(d: int) -> None:
    expected = torch.arange(d, dtype=torch.float64) - 1.5
    found = lanczos(Dense(with_spectrum(expected)), k=3, vectors=True)
    assert (found.values - expected).abs().max() <= tolerance(torch.float64, operations=d * d) * size_of(expected)
    assert found.vectors is not None
    assert found.vectors.shape == (d, d)


def test_the_starting_vector_is_the_same_each_time_and_torchs_generator_is_left_alone() -> None:
    operator = Dense(with_spectrum(torch.linspace(0.1, 1.0, D)))
    before = torch.get_rng_state()
    one, other = lanczos(operator, maxiter=5), lanczos(operator, maxiter=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.values, other.values)
    assert not torch.equal(one.values, lanczos(operator, maxiter=5, generator=torch.Generator().manual_seed(1)).values)


class _Largest(TorchDispatchMode):
    """The most entries of any result of an operation."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, Tensor):
                self.entries = max(self.entries, t.untyped_storage().nbytes() // t.element_size())
        return result


def test_a_step_copies_none_of_the_vectors_before_it() -> None:
    d, steps = 5000, 150
    diagonal = torch.linspace(0.1, 1.0, d)
    operator = Multiplied(lambda rows: rows * diagonal, diagonal)
    with _Largest() as largest:
        found = lanczos(operator, rtol=0.0, maxiter=steps)
    assert found.products == steps
    assert largest.entries == 32 * d  # a block of vectors, and what an eigh has is less
    assert steps**2 < 32 * d


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_products_that_are_not_finite(bad: float) -> None:
    operator: LinearOperator = Multiplied(lambda rows: rows * bad, torch.zeros(4))
    with pytest.raises(ValueError, match="not finite"):
        lanczos(operator)


@pytest.mark.parametrize("options", [{"k": 0}, {"maxiter": 0}])
def test_wrong_arguments(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="k, maxiter: expected at least 1"):
        lanczos(Dense(torch.eye(3)), **options)
