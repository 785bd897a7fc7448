"""Recipes of preconditioners: against their formulas and bounds on dense matrices, and the products they save."""

from __future__ import annotations

import doctest
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrices import Counted
from oracles import Supervised, assert_close, with_spectrum
from problems import module
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import CGInfluenceModule, InfluenceModule
from torch_influence.linop import Dense, LinearOperator
from torch_influence.solvers import Jacobi, Nystrom, Preconditioner, SolveReport, _preconditioners, cg
from torch_influence.solvers._base import rounding
from torch_influence.solvers._preconditioners import estimated_diagonal, low_rank

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import preconditioners as benchmark

pytestmark = pytest.mark.filterwarnings("error")

D, K, RANK, MU = 60, 4, 12, 1e-2
DTYPES = [torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])]  # fmt: skip # noqa: E501
devices = pytest.mark.parametrize("device", DEVICES)


class Recorded:
    """A recipe of somebody's own, which counts how often it is used."""

    def __init__(self, recipe: Preconditioner) -> None:
        self.recipe, self.made = recipe, 0

    def of(self, operator: LinearOperator) -> LinearOperator:
        self.made += 1
        return self.recipe.of(operator)


def decaying(d: int = D, last: float = -6.0) -> Tensor:
    """Eigenvalues 1 to 10^last."""
    return with_spectrum(torch.logspace(0, last, d, dtype=torch.float64))


def scaled(d: int = D, condition: float = 4.0, spread: float = 3.0) -> Tensor:
    """S K S: K of that condition, scales S from 1 to 10^spread."""
    matrix = with_spectrum(torch.logspace(0, -math.log10(condition), d, dtype=torch.float64))
    scales = torch.logspace(0, spread, d, dtype=torch.float64)
    return matrix * scales[:, None] * scales


def indefinite(d: int = 400) -> Tensor:
    """A few large eigenvalues, and many of either sign, as Hessians of networks have."""
    return with_spectrum(torch.cat([torch.logspace(1, 3, 20).double(), torch.randn(d - 20, dtype=torch.float64)]))


def dense(operator: LinearOperator) -> Tensor:
    return operator.product(torch.eye(operator.size, dtype=operator.dtype, device=operator.device)).double().cpu()


def spectrum(M: LinearOperator, matrix: Tensor) -> Tensor:
    """Of M A, ascending, by those of Lᵀ A L, M = L Lᵀ."""
    lower = torch.linalg.cholesky(0.5 * (dense(M) + dense(M).mT))
    return torch.linalg.eigvalsh(lower.mT @ matrix.double() @ lower)


def condition(eigenvalues: Tensor) -> float:
    return float(eigenvalues[-1] / eigenvalues[0])


def most_iterations(condition: float, condition_of_a: float, rtol: float) -> int:
    """|e|_A falls by 2 ((√κ - 1) / (√κ + 1))^m, κ that of M A (Saad, Iterative Methods, 6.128); |r| within √κ(A)."""
    root = math.sqrt(condition)
    return math.ceil(math.log(2 * math.sqrt(condition_of_a) / rtol) / math.log((root + 1) / (root - 1)))


def report(operator: LinearOperator, M: Any = None, rtol: float = 1e-5, k: int = K) -> SolveReport:
    """Of k right-hand sides, always the same."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(k, operator.size, dtype=torch.float64, generator=generator).to(operator.device, operator.dtype)
    found = cg(operator, rows, M=M, rtol=rtol, maxiter=100 * operator.size)[1]
    assert found.converged.all()
    return found


# -- M is symmetric positive definite, whatever it is made of ----------------------------------------------------------

RECIPES: dict[str, Callable[[], Preconditioner]] = {
    "Jacobi, exact": lambda: Jacobi(probes=1000),
    "Jacobi, estimated": lambda: Jacobi(probes=10),
    "Nystrom": lambda: Nystrom(RANK),
    "Nystrom of rank 1": lambda: Nystrom(1),
    "Nystrom of more than all": lambda: Nystrom(1000),
}
MATRICES: dict[str, Callable[[], Tensor]] = {
    "decaying": decaying,
    "decaying beyond rounding": lambda: decaying(last=-40),
    "scaled": scaled,
    "indefinite": indefinite,
    "all but negative": lambda: torch.diag(torch.cat([-torch.ones(D - 1), torch.ones(1)])).double(),
    "of rank 3": lambda: with_spectrum(torch.cat([torch.tensor([9.0, 5.0, 1.0]), torch.zeros(D - 3)])),
    "of one entry": lambda: torch.tensor([[4.0]], dtype=torch.float64),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize(("shift", "dtype"), [(None, DTYPES[0]), (1e-9, DTYPES[0]), (1.0, DTYPES[1])], ids=str)
def test_m_is_symmetric_positive_definite(recipe: str, name: str, shift: float | None, dtype: torch.dtype) -> None:
    matrix = MATRICES[name]().to(dtype)
    operator: LinearOperator = Counted(matrix)
    M = RECIPES[recipe]().of(operator if shift is None else operator.damped(shift))
    assert (M.size, M.dtype, M.device) == (len(matrix), dtype, matrix.device)
    square = dense(M)
    size = float(square.abs().max())
    # Entries of 1 + Σ over the rank of products of entries of unit vectors.
    assert_close(square.to(dtype), square.mT, operations=2 * min(RANK, len(matrix)) + 2, scale=size)
    if "Jacobi" in recipe:
        assert (square.diagonal() > 0).all()
        assert torch.equal(square, torch.diag(square.diagonal()))
    else:
        assert torch.linalg.eigvalsh(0.5 * (square + square.mT))[0] >= 0.5 * rounding(dtype)


@pytest.mark.parametrize("recipe", RECIPES)
@dtypes
def test_rows_are_multiplied_each_by_itself(recipe: str, dtype: torch.dtype) -> None:
    M = RECIPES[recipe]().of(Counted(decaying().to(dtype)).damped(MU))
    rows = torch.randn(K, D).to(dtype)
    before = rows.clone()
    alone = torch.cat([M.product(row[None]) for row in rows])
    assert_close(M.product(rows), alone, operations=2 * D)
    assert torch.equal(rows, before)


@pytest.mark.parametrize("recipe", ["Jacobi, estimated", "Nystrom"])
def test_randomness_is_the_generators(recipe: str) -> None:
    def made(generator: torch.Generator | None) -> Tensor:
        it = Jacobi(10, generator) if "Jacobi" in recipe else Nystrom(RANK, generator)
        return dense(it.of(Counted(matrix)))

    matrix = decaying()
    state = torch.get_rng_state()
    assert torch.equal(made(None), made(None))
    assert torch.equal(made(torch.Generator().manual_seed(5)), made(torch.Generator().manual_seed(5)))
    assert not torch.equal(made(torch.Generator().manual_seed(5)), made(None))
    assert torch.equal(torch.get_rng_state(), state)


# -- Jacobi ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("shift", [0.0, 0.3])
@pytest.mark.parametrize("entries", [1, 7 * D, 1 << 24])
@dtypes
def test_jacobi_is_the_inverse_diagonal(
    known: bool, shift: float, entries: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_preconditioners, "_ENTRIES", entries)
    matrix = scaled().to(dtype)
    operator = Dense(matrix) if known else Counted(matrix)
    M = Jacobi(probes=2 if known else D).of(operator.damped(shift))
    expected = 1 / (matrix.double().diagonal() + shift)
    assert_close((dense(M).diagonal() / expected).to(dtype), torch.ones(D), operations=4)
    if isinstance(operator, Counted):
        assert sum(operator.rows) == D
        assert len(operator.rows) == {1: D, 7 * D: math.ceil(D / 7)}.get(entries, 1)


@pytest.mark.parametrize("entries", [1, 7 * D, 1 << 24])
@dtypes
def test_the_estimate_is_the_mean_over_signs(entries: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_preconditioners, "_ENTRIES", entries)
    matrix, probes = scaled().to(dtype), 50
    operator = Counted(matrix)
    mean, error = estimated_diagonal(operator, probes, torch.Generator().manual_seed(3))
    signs = 2.0 * torch.randint(2, (probes, D), generator=torch.Generator().manual_seed(3)).double() - 1
    terms = signs * (signs @ matrix.double())
    largest = matrix.double().abs().sum(dim=0)  # of a term, by column
    assert_close((mean / largest).to(dtype), terms.mean(0) / largest, operations=D + 2, scale=1.0)
    expected = terms.std(0) / probes**0.5
    assert_close((error / largest).to(dtype), expected / largest, operations=2 * D + 4, scale=1.0)
    assert operator.rows == {1: [1] * probes, 7 * D: [7] * 7 + [1]}.get(entries, [probes])


def test_the_estimate_is_unbiased_and_its_error_as_the_paper_has_it() -> None:
    matrix, probes = decaying(last=-2.0), 4000
    mean, error = estimated_diagonal(Counted(matrix), probes, None)
    variance = (matrix.square().sum(0) - matrix.diagonal().square()) / probes
    assert ((mean - matrix.diagonal()).abs() <= 5 * variance.sqrt()).all()
    # A term is a sum of signs with weights: its fourth moment is at most 3 variances squared, as a normal one's, so the
    # relative variance of the estimated variance is at most 2 / (probes - 1).
    assert ((error.square() / variance - 1).abs() <= 5 * (2 / (probes - 1)) ** 0.5).all()


def test_entries_below_their_standard_error_are_lifted() -> None:
    """Where scales differ much, estimates of small entries are noise of large ones."""
    operator = Counted(scaled(300, 10.0)).damped(1.0)
    mean, _ = estimated_diagonal(operator.base, 50, None)
    assert (mean < 0).any()
    as_estimated = Dense(torch.diag(1 / (mean.clamp(min=0.0) + 1.0)))
    lifted = report(operator, Jacobi(probes=50)).products
    assert lifted < 0.5 * report(operator, as_estimated).products
    assert lifted < 0.1 * report(operator).products


def test_a_diagonal_that_is_not_positive_is_lifted_or_refused() -> None:
    values = torch.tensor([4.0, 0.0, -3.0], dtype=torch.float64)
    square = dense(Jacobi().of(Dense(torch.diag(values))))
    eps = torch.finfo(torch.float64).eps
    assert_close(square.diagonal(), 1 / torch.tensor([4.0, 4.0 * eps, 4.0 * eps]).double(), operations=2)
    for bad in (-values.abs(), torch.tensor([1.0, float("nan"), 1.0]), torch.tensor([1.0, float("inf"), 1.0])):
        with pytest.raises(ValueError, match="Jacobi: expected a finite diagonal with a positive entry, got"):
            Jacobi().of(Dense(torch.diag(bad.double())))


# -- Nyström -----------------------------------------------------------------------------------------------------------


def by_definition(matrix: Tensor, rank: int) -> tuple[Tensor, float]:
    """H Ω (Ωᵀ H Ω)⁺ Ωᵀ H, (2.1), with the Ω of seed 0; and |H Ω (Ωᵀ H Ω)⁺|, Ω orthonormal."""
    normal = torch.randn(rank, len(matrix), generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    omega = torch.linalg.qr(normal.double().mT).Q
    sketch = matrix.double() @ omega
    inverse = torch.linalg.pinv(omega.mT @ sketch, rtol=1e-10, hermitian=True)
    return sketch @ inverse @ sketch.mT, float(torch.linalg.matrix_norm(sketch @ inverse, 2))


@dtypes
@pytest.mark.parametrize("rank", [1, RANK])
def test_the_approximation_is_nystroms(rank: int, dtype: torch.dtype) -> None:
    matrix = decaying(last=-1.0).to(dtype)
    values, vectors = low_rank(Counted(matrix), rank, None)
    expected, growth = by_definition(matrix, rank)
    u = vectors.double()
    assert_close((u @ u.mT).to(dtype), torch.eye(rank), operations=8 * D)
    assert (values[:-1] >= values[1:]).all()
    # The shift, 32 units of |H Ω| (Frobenius), is taken off again up to first order: what is left is at most
    # ν (1 + |H Ω (Ωᵀ H Ω)⁻¹|)². A product of d roundings is no more than the shift.
    shift = rounding(dtype) * rank**0.5
    assert_close((u.mT * values) @ u, expected, operations=1, scale=1.0, inherent=2 * shift * (1 + growth) ** 2)


@dtypes
def test_of_an_indefinite_matrix_positive_eigenvalues_remain(dtype: torch.dtype) -> None:
    """Exactly, at full rank; the shift is taken off again."""
    eigenvalues = torch.linspace(-1, 2, D, dtype=torch.float64)
    matrix = with_spectrum(eigenvalues).to(dtype)
    values, _ = low_rank(Counted(matrix), D, None)
    assert_close(values.to(dtype), eigenvalues.flip(0).clamp(min=0), operations=16 * D, condition=(2 + 2) / (2 - 1))


@dtypes
@pytest.mark.parametrize("shift", [None, 0.0, MU])
def test_m_is_the_papers(shift: float | None, dtype: torch.dtype) -> None:
    """(λ_ℓ + μ) U (Λ + μI)⁻¹ Uᵀ + I - U Uᵀ, equation (5.3)."""
    operator: LinearOperator = Counted(decaying(last=-2.0).to(dtype))
    values, vectors = low_rank(operator, RANK, None)
    mu, u = shift or 0.0, vectors.double()
    M = Nystrom(RANK).of(operator if shift is None else operator.damped(shift))
    expected = (u.mT * ((values[-1] + mu) / (values + mu))) @ u + torch.eye(D) - u.mT @ u
    assert_close(dense(M).to(dtype), expected, operations=2 * RANK + 2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rank", [5, 10, 20, 40])
def test_the_condition_number_is_within_the_papers_bound(rank: int, seed: int) -> None:
    """(λ_ℓ + μ + |E|) / μ, proposition 5.3."""
    matrix, mu = decaying(), 1e-5
    base = Counted(matrix)
    values, vectors = low_rank(base, rank, torch.Generator().manual_seed(seed))
    error = torch.linalg.eigvalsh(matrix - (vectors.mT * values) @ vectors)
    # E is semi-definite up to the shift and rounding.
    noise = rounding(torch.float64) * D**0.5
    assert error[0] >= -noise
    bound = (float(values[-1]) + mu + float(error[-1])) / mu
    M = Nystrom(rank, torch.Generator().manual_seed(seed)).of(base.damped(mu))
    damped = matrix + mu * torch.eye(D, dtype=torch.float64)
    found = condition(spectrum(M, damped))
    assert found <= bound * (1 + 2 * noise / mu)
    assert found <= condition(torch.linalg.eigvalsh(damped))


@pytest.mark.parametrize("mu", [1e-2, 1e-3, 1e-4])
def test_the_condition_number_is_small_at_the_effective_dimension(mu: float) -> None:
    """Below 28 on average, theorem 5.1."""
    eigenvalues = torch.logspace(0, -24, 200, dtype=torch.float64)
    matrix = with_spectrum(eigenvalues)
    rank = 2 * math.ceil(1.5 * float((eigenvalues / (eigenvalues + mu)).sum())) + 1
    assert rank < 200
    damped = matrix + mu * torch.eye(200, dtype=torch.float64)
    found = [
        condition(spectrum(Nystrom(rank, torch.Generator().manual_seed(s)).of(Counted(matrix).damped(mu)), damped))
        for s in range(10)
    ]
    assert sum(found) / 10 < 28


@dtypes
@pytest.mark.parametrize("rank", [RANK + 2, 2 * RANK, D, 2 * D])
def test_a_matrix_of_less_rank_is_inverted_up_to_a_factor(rank: int, dtype: torch.dtype) -> None:
    """Then λ_ℓ = 0, and M A = μI: one iteration."""
    mu = 0.1
    exact = with_spectrum(torch.cat([torch.logspace(0, -1, RANK), torch.zeros(D - RANK)]))
    operator = Counted(exact.to(dtype)).damped(mu)
    eigenvalues = spectrum(Nystrom(rank).of(operator), dense(operator)) / mu
    # What shift and rounding leave of the approximation's error, as above, relative to μ.
    growth = by_definition(exact, min(rank, D))[1]
    noise = 2 * rounding(dtype) * min(rank, D) ** 0.5 * (1 + growth) ** 2 / mu
    assert noise < 0.1
    assert_close(eigenvalues, torch.ones(D), operations=1, scale=1.0, inherent=noise)
    # With eigenvalues in μ (1 ± δ) an iteration leaves no more than δ of the error in the norm of A.
    rtol = noise * (1 / mu + 1) ** 0.5
    assert report(operator, Nystrom(rank), rtol=rtol).iterations.tolist() == [1] * K
    assert report(operator, rtol=rtol).iterations.min() > 1


@dtypes
def test_a_zero_matrix(dtype: torch.dtype) -> None:
    operator = Counted(torch.zeros(D, D, dtype=dtype))
    for shift in (0.0, 1.0):
        assert_close(dense(Nystrom(RANK).of(operator.damped(shift))).to(dtype), torch.eye(D), operations=8 * D)
    assert report(operator.damped(2.0), Nystrom(RANK)).iterations.tolist() == [1] * K


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_is_never_silent(value: float) -> None:
    matrix = decaying()
    matrix[3, 3] = value
    with pytest.raises(ValueError, match="Nystrom: a product with the curvature is not finite"):
        Nystrom(RANK).of(Counted(matrix))


# -- iterations that are saved; counts of products, which are the same each time ---------------------------------------

RTOL = {torch.float32: 1e-3, torch.float64: 1e-8}


@dtypes
@pytest.mark.parametrize("known", [True, False])
def test_jacobi_cuts_iterations_of_a_badly_scaled_matrix(dtype: torch.dtype, known: bool) -> None:
    """κ(M A) = κ(D^½ K D^½), D = 1 / diag(K): at most κ(K)², as diag(K) is within K's eigenvalues."""
    spread = 1.0 if dtype == torch.float32 else 3.0
    matrix = scaled(200, 4.0, spread).to(dtype)
    operator = Dense(matrix) if known else Counted(matrix)
    plain, better = report(operator, rtol=RTOL[dtype]), report(operator, Jacobi(200), rtol=RTOL[dtype])
    of_a = condition(torch.linalg.eigvalsh(matrix.double()))
    assert better.iterations.max() <= most_iterations(16.0, of_a, RTOL[dtype])
    assert better.products < (0.5 if dtype == torch.float32 else 0.2) * plain.products
    smallest, largest = better.eigenvalues
    assert largest / smallest <= 16.0


@dtypes
def test_nystrom_cuts_iterations_where_the_spectrum_decays(dtype: torch.dtype) -> None:
    d, rank, mu = 300, 60, 1e-3 if dtype == torch.float32 else 1e-6
    eigenvalues = torch.arange(1, d + 1, dtype=torch.float64).pow(-4)
    operator = Counted(with_spectrum(eigenvalues).to(dtype)).damped(mu)
    plain, better = report(operator, rtol=RTOL[dtype]), report(operator, Nystrom(rank), rtol=RTOL[dtype])
    found = condition(spectrum(Nystrom(rank).of(operator), dense(operator)))
    assert better.iterations.max() <= most_iterations(found, 1 / mu, RTOL[dtype])
    assert better.products < (0.35 if dtype == torch.float32 else 0.25) * plain.products
    # |E| is about the next eigenvalue, that of rank 60 is below μ.
    assert found < 28


@pytest.mark.parametrize("rank", [30, 100])
def test_nystrom_cuts_iterations_of_a_hessian_with_both_signs(rank: int) -> None:
    """Shifted by just what makes the core definite, it took more than without."""
    matrix = indefinite()
    mu = -1.05 * float(torch.linalg.eigvalsh(matrix)[0])
    operator = Counted(matrix).damped(mu)
    assert report(operator, Nystrom(rank)).products < 0.6 * report(operator).products


def test_products_of_making_are_counted() -> None:
    matrix = decaying(300, last=-3.0)
    base = Counted(matrix)
    for M in (Nystrom(RANK), Jacobi(probes=40), Recorded(Nystrom(RANK))):
        base.rows.clear()
        found = report(base.damped(1e-3), M)
        assert found.products == len(base.rows)
        assert base.rows[0] == (40 if isinstance(M, Jacobi) else RANK)
    operator = Dense(matrix)  # which knows its diagonal
    assert report(operator, Jacobi()).products == report(operator, Jacobi().of(operator)).products


# -- modules -----------------------------------------------------------------------------------------------------------


def digits(hidden: int = 0, n: int = 200, spread: float = 3.0) -> tuple[Any, ...]:
    """A classifier of digits whose pixels are in units from 1 to 10^spread; trained a little."""
    x, y = load_digits(return_X_y=True)
    units = torch.logspace(0, spread, 64, dtype=torch.float64)
    x = torch.from_numpy(x[:n]).double() / 16 * units
    train = TensorDataset(x, torch.from_numpy(y[:n]))
    torch.manual_seed(0)
    first = nn.Linear(64, hidden or 10)
    model = (nn.Sequential(first, nn.Tanh(), nn.Linear(hidden, 10)) if hidden else first).double()
    with torch.no_grad():
        first.weight /= units
    loader = DataLoader(train, batch_size=100)
    return model, Supervised(F.cross_entropy, 1e-4), loader, loader, "cpu"


def products_of(arguments: tuple[Any, ...], M: Any) -> int:
    it = CGInfluenceModule(*arguments, 1e-2, gnh=True, M=M, rtol=1e-3)
    it.stests(range(3))
    assert it.last_report is not None
    assert it.last_report.converged.all()
    return it.last_report.products


def test_products_saved_on_a_linear_head_of_badly_scaled_features() -> None:
    arguments = digits()
    plain = products_of(arguments, None)
    assert products_of(arguments, Jacobi()) < 0.1 * plain  # its diagonal is known
    assert products_of(arguments, Nystrom(150)) < 0.2 * plain


def test_products_saved_on_a_network_of_badly_scaled_features() -> None:
    arguments = digits(hidden=8)
    plain = products_of(arguments, None)
    assert products_of(arguments, Jacobi()) < 0.5 * plain  # estimated
    assert products_of(arguments, Nystrom(150)) < 0.1 * plain


@pytest.mark.parametrize("M", [Jacobi(), Nystrom(10)], ids=str)
@pytest.mark.parametrize("gnh", [False, True])
def test_stests_are_the_same_with_and_without(M: Any, gnh: bool) -> None:
    plain = module(gnh=gnh)
    other = module(gnh=gnh, M=M)
    inverse = torch.linalg.cond(plain._problem.curvature().dense() + torch.eye(43, dtype=torch.float64))
    assert_close(other.stests(), plain.stests(), operations=1, inherent=2e-12 * float(inverse))
    assert f"preconditioned by {M}" in other.explain()["solver"].path
    assert "preconditioned by M" in module(M=lambda r: r).explain()["solver"].path
    assert "preconditioned" not in plain.explain()["solver"].path


def options_of(kind: type) -> dict[str, Any]:
    return {"solver": "cg", "rtol": 1e-10, "damp": 1.0} if kind is InfluenceModule else {}


@pytest.mark.parametrize("kind", [CGInfluenceModule, InfluenceModule])
@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda it: None, False),
        (lambda it: setattr(it, "damp", 2.0), True),
        (lambda it: setattr(it, "gnh", True), True),
        (lambda it: it.model[0].bias.data.add_(0.1), True),
        (lambda it: it.clear_cache(), True),
        (lambda it: it.train_loader.dataset.tensors[0].mul_(1.1), True),
    ],
    ids=["nothing", "damp", "gnh", "parameters", "clear_cache", "data"],
)
def test_what_a_recipe_makes_is_kept_until_something_changes(
    kind: type, change: Callable[[Any], Any], again: bool
) -> None:
    M = Recorded(Nystrom(10))
    it = module(kind, M=M, **options_of(kind))
    it.stest([0])
    first = it.last_report.products
    it.stests()
    it.stest([0])
    assert M.made == 1
    assert it.last_report.products == first - 1
    change(it)
    x = it.stest([0])
    assert M.made == 1 + again
    changed = {"model": it.model, "train_loader": it.train_loader, "gnh": it.gnh, "damp": it.damp}
    fresh = module(kind, **options_of(kind) | changed)
    assert (x - fresh.stest([0])).norm() <= 1e-8 * x.norm()  # solved to 1e-10, at a condition of less than 10


def test_another_recipe_takes_the_place_of_what_is_kept() -> None:
    one, other = Recorded(Nystrom(10)), Recorded(Nystrom(10))
    it = module(M=one)
    it.stest([0])
    it.cg_kwargs["M"] = other
    it.stest([0])
    assert (one.made, other.made) == (1, 1)


def test_memory_of_what_is_kept_is_in_the_plan() -> None:
    more = module(M=Nystrom(10)).explain()["solver"].nbytes - module().explain()["solver"].nbytes
    assert more == 10 * 43 * 8


# -- arguments, examples, devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Nystrom(0), ValueError, "rank: expected an integer >= 1, got 0"),
        (lambda: Nystrom(2.5), ValueError, "rank: expected an integer >= 1, got 2.5"),
        (lambda: Jacobi(1), ValueError, "probes: expected an integer >= 2, got 1"),
        (lambda: Jacobi("all"), ValueError, "probes: expected an integer >= 2, got 'all'"),
        (lambda: module(M=Nystrom).stest([0]), TypeError, r"M: expected an instance, got the class Nystrom; write Nystrom\(\.\.\.\)"),  # noqa: E501
        (lambda: module(InfluenceModule, damp=1.0, M=Nystrom(5)), ValueError, "M: a preconditioner is for solver=\"cg\", \"block\" or \"minres\", got solver='auto'"),  # noqa: E501
        (lambda: module(InfluenceModule, damp=1.0, M=Nystrom(5), solver="dual"), ValueError, "got solver='dual'"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_examples_in_docstrings() -> None:
    failed, attempted = doctest.testmod(_preconditioners)
    assert attempted > 0
    assert failed == 0


def test_the_benchmark_counts_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SIZES", {"U": {"n": 60, "features": 20}})
    lines = benchmark.measure("U")
    record = {"rtol": benchmark.RTOL, "damp": benchmark.DAMP, "maxiter": benchmark.MAXITER, "rows": lines}
    record = json.loads(json.dumps({"provenance": benchmark.harness.provenance(), **record}))
    rank = {which: getattr(M, "rank", 0) for which, M in benchmark.recipes().items()}
    d = lines[0]["parameters"]
    for line in lines:
        assert line["converged"] + line["precision_limit"] <= line["k"]
        if line["converged"] == line["k"]:
            assert line["residual"] <= 1.01 * benchmark.RTOL  # rounded otherwise than the solver's
        assert line["products"] > line["iterations"]
        assert line["rows"] <= min(rank[line["recipe"]], d) + line["products"] * line["k"]
        assert line["rows"] >= min(rank[line["recipe"]], d) + line["iterations"]
    table = [cells for cells in benchmark.report(record).splitlines() if cells.startswith("| U ")]
    assert len(table) == len(rank)
    assert {cells.count("|") for cells in table} == {len(benchmark.HEADER) + 1}


@devices
@dtypes
def test_recipes_work_where_the_operator_is(device: str, dtype: torch.dtype) -> None:
    matrix = decaying(last=-2.0).to(dtype)
    for M in (Nystrom(RANK), Jacobi(probes=10), Jacobi(probes=D)):
        there, here = M.of(Counted(matrix.to(device)).damped(MU)), M.of(Counted(matrix).damped(MU))
        assert there.device.type == device
        # The same random rows; the approximation's own shift and rounding are as in the test of its definition.
        growth = by_definition(matrix, RANK)[1]
        inherent = rounding(dtype) * (RANK**0.5 * 4 * (1 + growth) ** 2 / MU if isinstance(M, Nystrom) else D)
        assert_close(dense(there).to(dtype), dense(here), operations=1, inherent=inherent)
        report(Counted(matrix.to(device)).damped(MU), M)
