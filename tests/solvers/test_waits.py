"""Solvers on a device that this machine doesn't have: what they wait for in an iteration, and that nothing is mixed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from elsewhere import Elsewhere, elsewhere, numbers
from matrices import positive_definite
from oracles import with_spectrum
from torch import Tensor

from torch_influence.linop import LinearOperator
from torch_influence.solvers import Jacobi, Nystrom, block_cg, cg, direct, lanczos, lissa, minres

pytestmark = pytest.mark.filterwarnings("error")

D, K, STEPS = 60, 2, 20
quiet: dict[str, Any] = {"on_failure": "ignore"}


class Watched(LinearOperator):
    """A matrix that notes at each product how often the host has waited so far: at all, and for an earlier event."""

    def __init__(self, matrix: Tensor, mode: Elsewhere) -> None:
        self.matrix, self.size, self.dtype, self.device = matrix, len(matrix), matrix.dtype, matrix.device
        self.mode = mode
        self.seen: list[tuple[int, int]] = []

    def product(self, rows: Tensor) -> Tensor:
        self.seen.append((self.mode.waits.total(), self.mode.late))
        return rows @ self.matrix

    def sampled(self, steps: int, generator: torch.Generator | None) -> Iterator[LinearOperator]:
        yield from [self] * steps

    def waits(self) -> list[tuple[int, int]]:
        """Between each product and the next."""
        return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(self.seen, self.seen[1:], strict=False)]


def problem(condition: float = 1e4) -> tuple[Tensor, Tensor]:
    return positive_definite(D, condition), torch.randn(K, D, dtype=torch.float64)


# An iteration's waits while the device is idle, and those for the step before, while it is busy with the last one.
none_but_late = [(0, 0)] + (STEPS - 2) * [(0, 1)]
COUNTS: dict[str, tuple[Callable[..., Any], list[tuple[int, int]]]] = {
    "cg": (functools.partial(cg, rtol=1e-14, maxiter=STEPS, **quiet), none_but_late),
    "cg, history": (functools.partial(cg, rtol=1e-14, maxiter=STEPS, history=True, **quiet), none_but_late),
    "cg, truncated": (functools.partial(cg, rtol=1e-14, maxiter=STEPS, truncate=True, **quiet), none_but_late),
    "minres": (functools.partial(minres, rtol=1e-14, maxiter=STEPS, **quiet), none_but_late),
    "lissa": (functools.partial(lissa, depth=STEPS, scale=1.0, **quiet), none_but_late),
    # Two Gram matrices; in each 16th iteration how far rounding reaches.
    "block_cg": (
        functools.partial(block_cg, rtol=1e-14, maxiter=STEPS, **quiet),
        [(2 + (step % 16 == 0), 0) for step in range(1, STEPS)],
    ),
    # The matrix that it makes is on the host: its next diagonal entry, and the one beside it.
    "lanczos": (lambda A, B: lanczos(A, maxiter=STEPS, rtol=0.0), (STEPS - 1) * [(2, 0)]),
}


@pytest.mark.parametrize("name", COUNTS)
def test_waits_of_an_iteration(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    solve, expected = COUNTS[name]
    matrix, rows = problem()
    with elsewhere(monkeypatch) as mode:
        operator = Watched(matrix.to(mode.device), mode)
        solve(operator, rows.to(mode.device))
    assert operator.waits()[: STEPS - 1] == expected


def test_waits_of_a_preconditioned_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, rows = problem()
    for solve in (cg, minres):
        with monkeypatch.context() as patch, elsewhere(patch) as mode:
            operator = Watched(matrix.to(mode.device), mode)
            M = Watched(torch.diag(1 / matrix.diagonal()).to(mode.device), mode)
            solve(operator, rows.to(mode.device), M=M, rtol=1e-14, maxiter=STEPS, **quiet)
        assert operator.waits()[: STEPS - 1] == none_but_late


def indefinite() -> Tensor:
    return with_spectrum(torch.linspace(-0.3, 1.0, D, dtype=torch.float64))


def singular() -> Tensor:
    return with_spectrum(torch.linspace(0.0, 1.0, D, dtype=torch.float64))


# Ways through the solvers, restarts and ends included, that must not mix devices.
WAYS: dict[str, tuple[Callable[[], Tensor], Callable[..., Any]]] = {
    "cg": (lambda: positive_definite(D), functools.partial(cg, history=True)),
    "cg, out of float32": (lambda: positive_definite(D).float(), functools.partial(cg, rtol=1e-9)),
    "cg, Jacobi": (lambda: positive_definite(D), functools.partial(cg, M=Jacobi())),
    "cg, Nystrom": (lambda: positive_definite(D), functools.partial(cg, M=Nystrom(5))),
    "cg, indefinite": (indefinite, functools.partial(cg, maxiter=3 * D)),
    "cg, truncated": (indefinite, functools.partial(cg, truncate=True)),
    "minres": (indefinite, functools.partial(minres, history=True)),
    "minres, Jacobi": (lambda: positive_definite(D), functools.partial(minres, M=Jacobi())),
    "minres, inconsistent": (singular, minres),
    "block_cg": (lambda: positive_definite(D), functools.partial(block_cg, history=True)),
    "block_cg, out of float32": (lambda: positive_definite(D, 1e5).float(), functools.partial(block_cg, rtol=1e-9)),
    "block_cg, indefinite": (indefinite, functools.partial(block_cg, maxiter=3 * D)),
    "lissa": (lambda: positive_definite(D), functools.partial(lissa, depth=50, repeat=3, rtol=1e-3)),
    "lissa, diverging": (indefinite, functools.partial(lissa, depth=200, scale=0.2)),
    "direct": (lambda: positive_definite(D), lambda A, B, **how: direct(A.matrix, B, **how)),
}


@pytest.mark.parametrize("name", WAYS)
def test_no_way_mixes_devices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, solve = WAYS[name]
    matrix = make()
    rows = torch.randn(4, D, dtype=torch.float64).to(matrix.dtype)
    rows[1] = 0
    expected, plain = solve(Watched(matrix, Elsewhere()), rows, **quiet)
    with elsewhere(monkeypatch) as mode:
        x, report = solve(Watched(matrix.to(mode.device), mode), rows.to(mode.device), **quiet)
        assert x.device == mode.device
        str(report)  # the eigenvalues that it has seen
    assert torch.equal(report.converged, plain.converged)
    assert torch.equal(report.negative_curvature, plain.negative_curvature)
    if plain.converged.all():
        assert torch.allclose(numbers(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_devices_that_are_mixed_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with elsewhere(monkeypatch) as mode:
        there = torch.ones(3, device=mode.device)
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            there + torch.ones(3)
        assert float((2 * there).sum()) == 6.0
        assert mode.waits.total() == 1
        there[there > 2]
        there[torch.tensor([1])]
        there.cpu()
        there.to("cpu", non_blocking=True)
        assert mode.waits.total() == 4
