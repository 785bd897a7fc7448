"""Direct solves with a dense symmetric matrix, factored once and used for every right-hand side."""

from __future__ import annotations

import time
import warnings

import torch
from torch import Tensor

from torch_influence.solvers._base import NegativeCurvatureWarning, SolveReport


class Factor:
    """A factorisation of a symmetric matrix: Cholesky where it is positive definite, LU with a warning where not.

    Args:
        matrix: [d, d], symmetric.

    Attributes:
        definite: whether it is positive definite.
        matrix: as given.

    Raises:
        ValueError: the matrix is not finite.
        torch.linalg.LinAlgError: the matrix is singular.

    Warns:
        NegativeCurvatureWarning: the matrix is indefinite; with the smallest eigenvalue and the damping that cures it.

    Cost:
        d³/3 multiplications once, d² per right-hand side; memory 2 d².
    """

    def __init__(self, matrix: Tensor) -> None:
        start = time.perf_counter()
        self.matrix = matrix
        if not matrix.sum(dtype=torch.float64).isfinite():  # any NaN or infinity shows in it
            raise ValueError(
                "the curvature matrix has entries that are not finite: a second derivative of the training loss is NaN "
                "or infinite at these parameters"
            )
        lower, failed = torch.linalg.cholesky_ex(matrix)
        self.definite = not bool(failed)
        if self.definite:
            self._factor: tuple[Tensor, ...] = (lower,)
        else:
            del lower
            smallest = float(torch.linalg.eigvalsh(matrix)[0])
            lu, pivots, singular = torch.linalg.lu_factor_ex(matrix)
            if singular:
                raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                    f"the curvature matrix is singular (smallest eigenvalue {smallest:.3g}): add damping, damp > 0"
                )
            self._factor = (lu, pivots)
            warnings.warn(
                f"the damped curvature is not positive definite: smallest eigenvalue {smallest:.3g}. Scores are "
                f"those of a saddle point; damping larger by {1.1 * max(-smallest, torch.finfo(matrix.dtype).eps):.3g} "
                "makes it positive definite, gnh=True (in the iterative modules) does too",
                NegativeCurvatureWarning,
                stacklevel=4,
            )
        self.seconds = time.perf_counter() - start

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveReport]:
        """A⁻¹ b for each row b of [k, d], and the report; its residual is |b - Ax| / |b|."""
        start = time.perf_counter()
        x = self._solve(rows)
        size = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
        residual = torch.linalg.vector_norm(rows - x @ self.matrix, dim=-1, dtype=torch.float64)
        none = torch.zeros(len(rows), dtype=torch.bool)
        report = SolveReport(
            method="Cholesky" if self.definite else "LU",
            iterations=torch.zeros(len(rows), dtype=torch.int64),
            residual=torch.where(size > 0, residual / size, residual),
            converged=x.isfinite().all(dim=-1),
            precision_limit=none,
            negative_curvature=none if self.definite else ~none,
            products=0,
            seconds=time.perf_counter() - start,
        )
        return x, report

    def inverse(self) -> Tensor:
        """The inverse itself, [d, d]."""
        return self._solve(torch.eye(len(self.matrix), dtype=self.matrix.dtype, device=self.matrix.device))

    def _solve(self, rows: Tensor) -> Tensor:
        if self.definite:
            return torch.cholesky_solve(rows.mT, self._factor[0]).mT.contiguous()
        return torch.linalg.lu_solve(*self._factor, rows.mT).mT.contiguous()
